"""The per-worker loop: adversarial fine-tuning with checkpoints, small evaluations and the full one at the end."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from trainables.attacks.noise import sample_keys
from trainables.config import TrialConfig
from trainables.errors import InputError
from trainables.evaluation.audit import audit
from trainables.evaluation.robustness import attackable, autocast, evaluate
from trainables.evaluation.scores import correct_bits, recall_metrics
from trainables.execution.checkpoints import RESULT, other_origin, read_sealed, seal
from trainables.identity import made_from, protocol_hash
from trainables.models import tokenize
from trainables.prepare import Prepared
from trainables.results import TrialResult, library_versions
from trainables.training.attack import attack_pairs
from trainables.training.batches import (
    draw_batch,
    eda,
    epoch_shape,
    ramped_distillation,
    ramped_epsilon,
    random_crops,
    rate_factor,
)
from trainables.training.effect import trained_weights, untouched
from trainables.training.losses import positive_pairs
from trainables.training.objective import Pairs, Trainee
from trainables.training.sharding import distribute, full_state, gather, load_full_state, merge, whole


class Diverged(Exception):
    """The loss is not a number any more: the point itself cannot work."""


WEIGHTS, OPTIMISER = "model.safetensors", "optimiser.pt"
"""Of a checkpoint in the middle of training."""

Report = Callable[[dict[str, Any], Path | None], None]
"""Called after every epoch on every worker with plain metrics and, on rank 0, the checkpoint folder."""


@dataclass
class Clock:
    """Seconds by phase. On a GPU, events are read once an epoch, so that the loop never waits for the device."""

    device: torch.device
    seconds: dict[str, float] = field(
        default_factory=lambda: {"load": 0.0, "attack": 0.0, "train": 0.0, "evaluate": 0.0}
    )
    _marks: list[tuple[str, Any]] = field(default_factory=list)

    def mark(self, phase: str) -> None:
        """What follows belongs to `phase`."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def settle(self) -> None:
        """Add up everything since the last call; waits for the device."""
        self.mark("")
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            elapsed = start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed
        self._marks.clear()


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that a worker has held, in 1e9 bytes; the same on all workers.

    On a GPU, what was allocated there since `finetune` began, without what the allocator only keeps. On CPUs, what the
    process had resident since it began.
    """
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        held = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    most = torch.tensor(held / 1e9, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


def worker_loss(
    ddp: nn.Module,
    trainee: Trainee,
    config: TrialConfig,
    prepared: Prepared,
    originals: Tensor | None,
    step: int,
    steps: int,
    clock: Clock,
    device: torch.device,
) -> Tensor:
    """The global batch's loss at `step`, with this worker's adversarial pairs made on the way."""
    train, point, seed = prepared.dataset.train, config.point, config.seed
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    drawn = draw_batch(config, train, step)
    parts = [drawn.share(other, world) for other in range(world)]
    own = parts[rank]
    everyone = np.concatenate([part.images for part in parts]), np.concatenate([part.captions for part in parts])
    positives = _positives(prepared, *everyone).to(device)
    keys = sample_keys(seed, own.epoch, torch.from_numpy(train.image_ids[own.images])).to(device)
    caption_keys = sample_keys(seed, own.epoch, torch.from_numpy(own.captions.flatten())).to(device)
    pixels = _to_device(train.pixels[own.images], device)
    if point.image_augmentation == "crop":
        pixels = random_crops(pixels, keys)
    original = None if originals is None else originals[torch.from_numpy(own.images)]
    words = [prepared.train.words_of(row) for row in own.captions.flat]
    options = [prepared.train.options_of(row, config.training.attack_candidates) for row in own.captions.flat]
    if point.text_augmentation == "eda":
        augmented = [
            eda(caption, ways, np.random.default_rng([seed, own.epoch, row]))
            for caption, ways, row in zip(words, options, own.captions.flat, strict=True)
        ]
        words, options = [caption for caption, _ in augmented], [ways for _, ways in augmented]

    clock.mark("attack")
    gather(trainee)
    with attackable(trainee), autocast(device):
        attacked, texts = attack_pairs(
            trainee.model,
            config,
            pixels,
            words,
            options,
            positives[rank * len(own.images) : (rank + 1) * len(own.images)],
            epsilon=ramped_epsilon(config, step, steps),
            keys=keys,
            original=original,
        )

    clock.mark("train")
    trainee.train()
    torch.manual_seed((seed * 1_000_003 + step) * 1024 + rank)  # dropout belongs to the step, not to history
    pairs = Pairs(attacked, *_tokens(trainee, texts, config.model.max_tokens, device))
    clean = None
    if trainee.needs_clean:
        plain = [" ".join(caption) for caption in words]
        clean = Pairs(pixels, *_tokens(trainee, plain, config.model.max_tokens, device))
    with autocast(device):
        return ddp(pairs, clean, original, positives, caption_keys, ramped_distillation(config, step, steps))


def _positives(prepared: Prepared, images: np.ndarray, captions: np.ndarray) -> Tensor:
    groups = torch.from_numpy(prepared.caption_groups[captions.flatten()])
    rows = torch.from_numpy(images)
    return positive_pairs(rows, rows.repeat_interleave(captions.shape[1]), groups)


def _tokens(trainee: Trainee, texts: list[str], max_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, as long on all workers where the loss gathers text tokens."""
    tokens, mask = tokenize(trainee.model, texts, max_tokens)
    if trainee.companion == "matching" and dist.is_initialized():
        longest = torch.tensor(tokens.shape[1], device=device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        missing = int(longest) - tokens.shape[1]
        tokens = F.pad(tokens, (0, missing), value=trainee.model.tokenizer.pad_token_id)
        mask = F.pad(mask, (0, missing))
    return tokens.to(device), mask.to(device)


def _to_device(pixels: np.ndarray, device: torch.device) -> Tensor:
    batch = torch.from_numpy(np.ascontiguousarray(pixels))
    if device.type == "cuda":
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=True) / 255


@torch.no_grad()
def original_embeddings(prepared: Prepared, device: torch.device) -> Tensor:
    """The frozen original's clean embeddings of all training images, (images, dim); computed once, before training."""
    pixels = prepared.dataset.train.pixels
    parts = np.array_split(np.arange(len(pixels)), 1 + len(pixels) // 128)
    model = prepared.base.eval()
    return torch.cat([model.encode_image(_to_device(pixels[rows], device)).float() for rows in parts])


def finetune(
    config: TrialConfig,
    prepared: Prepared,
    device: torch.device,
    checkpoint: Path | None,
    scratch: Path,
    report: Report,
    passed_over: Sequence[str] = (),
) -> None:
    """Train, evaluate and report; go on from `checkpoint` where there is one.

    The last report's checkpoint folder holds `result.json`, a `TrialResult`, the trial as `trial.json`, and `model`,
    which is in its family's own layout. A checkpoint that is already complete is reported again and nothing is redone.

    Args:
        config: the trial.
        prepared: see `prepare`.
        device: of this worker.
        checkpoint: folder written by an earlier attempt.
        scratch: where checkpoint folders are written before they are reported.
        report: hands metrics and checkpoint on.
        passed_over: why newer checkpoints than this could not be used; it is reported, and kept with the result.

    Raises:
        Diverged: the loss became NaN or infinite.
        CheckpointError: the checkpoint is damaged.
        InputError: it is another trial's, or the point cannot be trained.
    """
    started = time.time()
    clock = Clock(device)
    clock.mark("load")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    training = config.training
    leader = not dist.is_initialized() or dist.get_rank() == 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    prepared.base.to(device)
    if training.gradient_checkpointing:
        prepared.base.checkpoint_layers()
    trainee = Trainee(prepared.base, config.point).to(device)
    begun_with = trained_weights(trainee) if leader else {}
    originals = original_embeddings(prepared, device) if trainee.needs_original else None
    _, per_epoch = epoch_shape(config, len(prepared.dataset.train.image_ids))
    steps = training.epochs * per_epoch
    ddp = distribute(trainee, device, config.workers.sharded)
    trained = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    state: dict[str, Any] = {
        "step": 0,
        "device_seconds": 0.0,
        "peak_memory_gb": 0.0,
        "resumed_from_steps": [],
        "passed_over": [],
    }
    if checkpoint is not None:
        state |= read_sealed(checkpoint)
        if other := other_origin(state, config, prepared.hashes):
            raise InputError(f"checkpoint {checkpoint} was made from something else: {'; '.join(other)}")
        if (checkpoint / RESULT).exists():
            report({**state["report"], "device_seconds": state["device_seconds"]}, checkpoint if leader else None)
            return
        optimiser_state = torch.load(checkpoint / OPTIMISER, map_location="cpu", weights_only=True)
        load_full_state(trainee, optimiser, load_file(checkpoint / WEIGHTS), optimiser_state)
        state["resumed_from_steps"].append(state["step"])
    state["passed_over"].extend(passed_over)
    history: list[dict[str, Tensor | float]] = []

    for step in range(state["step"], steps):
        loss = worker_loss(ddp, trainee, config, prepared, originals, step, steps, clock, device)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, training.gradient_clip)
        for group in optimiser.param_groups:
            group["lr"] = training.learning_rate * rate_factor(step, steps, training.warmup_fraction)
        optimiser.step()
        trainee.clamp_temperature()
        trainee.update_teacher()
        if (step + 1) % training.log_every_steps == 0 or (step + 1) % per_epoch == 0:
            temperature = whole(trainee.log_temperature.detach()).exp()
            history.append({"step": step + 1, "time": time.time(), "loss": loss.detach(), "temperature": temperature})
        if (step + 1) % per_epoch:
            continue

        clock.settle()
        entries = [{name: float(value) for name, value in entry.items()} for entry in history]
        history.clear()
        if not all(math.isfinite(entry["loss"]) for entry in entries):
            raise Diverged(f"the loss became {entries[-1]['loss']} by step {step + 1}")
        clock.mark("evaluate")
        last = step + 1 == steps
        (merge if last else gather)(trainee)
        images = len(prepared.gallery.pixels)
        protocol = config.protocol if last else config.protocol.rung((step + 1) / steps, images)
        gallery = prepared.gallery if last else prepared.gallery.first(protocol.gallery_images)
        ranks = evaluate(
            trainee.model,
            gallery,
            protocol,
            max_tokens=config.model.max_tokens,
            device=device,
        ).ranks
        metrics = recall_metrics(ranks, protocol)
        clock.settle()
        clock.mark("train")
        device_seconds = state["device_seconds"] + world * (time.time() - started)
        peak = max(state["peak_memory_gb"], peak_memory_gb(device))
        message = {
            "step": step + 1,
            "epoch": (step + 1) // per_epoch,
            "last": last,
            "device_seconds": device_seconds,
            "peak_memory_gb": peak,
            "resumed_from_step": float(state["resumed_from_steps"][-1]) if state["resumed_from_steps"] else -1.0,
            "passed_over": json.dumps(list(passed_over)),
            "history": json.dumps(entries),
            **{name: metric.value for name, metric in metrics.items()},
        }
        folder = None
        weights, optimiser_state = ({}, {}) if last else full_state(trainee, optimiser)
        if leader:
            result = None
            if last:
                result = TrialResult(
                    metrics=metrics,
                    correct=correct_bits(ranks, protocol),
                    queries={"tr": len(ranks["clean"].tr), "ir": len(ranks["clean"].ir)},
                    captions_per_image=np.bincount(gallery.caption_image).tolist(),
                    untouched=untouched(trainee, begun_with, steps),
                    device_seconds=device_seconds,
                    peak_memory_gb=peak,
                    seconds={name: round(value, 3) for name, value in clock.seconds.items() if name},
                    steps=steps,
                    resumed_from_steps=state["resumed_from_steps"],
                    passed_over=state["passed_over"],
                    temperature=entries[-1]["temperature"],
                    audit=audit(
                        trainee.model,
                        gallery,
                        protocol,
                        temperature=entries[-1]["temperature"],
                        max_tokens=config.model.max_tokens,
                        device=device,
                    )
                    if protocol.audit
                    else None,
                    hashes={**prepared.hashes, "protocol": protocol_hash(config.protocol)},
                    versions=library_versions(),
                )
            folder = scratch / f"step-{step + 1}"
            folder.mkdir(parents=True, exist_ok=True)
            position = {"step": step + 1, "device_seconds": device_seconds, "peak_memory_gb": peak}
            if result is None:
                # Learning rate and random numbers are functions of the step and need no state.
                save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
                torch.save(optimiser_state, folder / OPTIMISER)
            else:
                (folder / RESULT).write_text(result.model_dump_json(), encoding="utf-8")
                (folder / "trial.json").write_text(config.model_dump_json(), encoding="utf-8")
                if config.point.contrastive_weight > 0:  # no other loss has one
                    trainee.model.own_temperature = entries[-1]["temperature"]
                trainee.model.resize = config.data.resize
                trainee.model.save(folder / "model")
            origin = made_from(config, prepared.hashes)
            seal(folder, {**state, **position, "report": message, "made_from": origin})
        report(message, folder)
