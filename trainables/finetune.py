"""The per-worker loop: adversarial fine-tuning with checkpoints, small evaluations and the full one at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from trainables.attacks.image import pgd
from trainables.attacks.noise import sample_keys
from trainables.attacks.text import CaptionEncoder, attack_words, away_from
from trainables.config import Point, TrialConfig, TrialResult
from trainables.evaluation.audit import audit
from trainables.evaluation.robustness import correct_bits, evaluate, result_metrics
from trainables.losses import (
    anchor_loss,
    contrastive_loss,
    embedding_deviation,
    gather_with_gradient,
    positive_pairs,
)
from trainables.models import RetrievalModel, tokenize
from trainables.prepare import Prepared

ATTACK_TEMPERATURE = 0.05
"""Of the training attack's cross-entropy: fixed, so that the searched temperature cannot weaken the attack."""


class Diverged(Exception):
    """The loss is not a number any more: the point itself cannot work."""


class CheckpointError(Exception):
    """A checkpoint that cannot be read."""


Report = Callable[[dict[str, Any], Path | None], None]
"""Called after every epoch on every worker with plain metrics and, on rank 0, the checkpoint folder."""


class Trainee(nn.Module):
    """The model with the temperature, and the loss as its forward pass, so that one DDP wrapper sees both."""

    def __init__(self, model: RetrievalModel, point: Point) -> None:
        super().__init__()
        self.model = model
        self.point = point
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(point.temperature)), requires_grad=point.temperature_learned
        )
        image_only = point.trainable == "image"
        images = {id(parameter) for parameter in model.image_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and (not image_only or id(parameter) in images))

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor, original: Tensor, positives: Tensor) -> Tensor:
        """Loss of the global batch: `w * contrastive + (1 - w) * anchor`.

        Args:
            pixels: (batch, 3, height, width), this worker's adversarial images.
            tokens: (batch, length).
            mask: (batch, length).
            original: (batch, dim), the frozen original's embeddings of the clean images.
            positives: bool (world x batch, world x batch).
        """
        weight = self.point.contrastive_weight
        image_features = self.model.encode_image(pixels).float()
        loss = image_features.new_zeros(())
        if weight > 0:
            text_features = self.model.encode_text(tokens, mask).float()
            loss = weight * contrastive_loss(
                gather_with_gradient(image_features),
                gather_with_gradient(text_features),
                positives,
                self.log_temperature.exp(),
            )
        if weight < 1:
            loss = loss + (1 - weight) * anchor_loss(
                gather_with_gradient(image_features), gather_with_gradient(original)
            )
        return loss


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


def epoch_shape(config: TrialConfig, images: int) -> tuple[int, int]:
    """Global batch size and steps of an epoch over so many training images."""
    drawn = min(images, config.training.epoch_images or images)
    size = min(config.training.batch_size, drawn)
    return size, drawn // size


def batch_rows(config: TrialConfig, prepared: Prepared, step: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Epoch, image rows and caption rows of the global batch at `step`: a function of seed and step alone."""
    images = len(prepared.dataset.train.image_ids)
    size, per_epoch = epoch_shape(config, images)
    epoch, place = divmod(step, per_epoch)
    rng = np.random.default_rng([config.seed, epoch])
    rows = rng.permutation(images)[place * size : (place + 1) * size]
    draws = rng.random(images)[rows]
    starts, ends = _caption_bounds(prepared)
    captions = starts[rows] + (draws * (ends[rows] - starts[rows])).astype(np.int64)
    return epoch, rows, captions


def _caption_bounds(prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    caption_image, images = prepared.dataset.train.caption_image, np.arange(len(prepared.dataset.train.image_ids))
    return np.searchsorted(caption_image, images), np.searchsorted(caption_image, images, side="right")


def attack_pairs(
    model: RetrievalModel,
    config: TrialConfig,
    prepared: Prepared,
    pixels: Tensor,
    epoch: int,
    rows: np.ndarray,
    captions: np.ndarray,
    original: Tensor,
    share: slice,
) -> tuple[Tensor, list[str]]:
    """This worker's adversarial pairs: the captions first, then the images against the adversarial captions.

    Args:
        model: in eval mode, parameters without gradient.
        pixels: this worker's clean images, in [0, 1].
        rows: image rows of the global batch.
        captions: caption rows of the global batch.
        original: the frozen original's embeddings of this worker's clean images.
        share: this worker's part of the global batch.
    """
    point, device, max_tokens = config.point, pixels.device, config.model.max_tokens
    own = captions[share]
    encode = CaptionEncoder(model, max_tokens, device)
    words = [prepared.train.words_of(row) for row in own]
    if point.words:
        with torch.no_grad():
            clean = F.normalize(model.encode_image(pixels).float(), dim=-1)
        texts = attack_words(
            encode,
            words,
            [prepared.train.options_of(row, config.training.attack_candidates) for row in own],
            away_from(clean),
            words=point.words,
        )
    else:
        texts = [" ".join(caption) for caption in words]
    if point.epsilon == 0:
        return pixels, texts
    keys = sample_keys(config.seed, epoch, torch.from_numpy(prepared.dataset.train.image_ids[rows[share]]))
    if point.attack_objective == "deviation":
        objective = lambda adversarial: embedding_deviation(model.encode_image(adversarial).float(), original)  # noqa: E731
    else:
        with torch.no_grad():
            against = gather_with_gradient(encode(texts))
        targets = _positives(prepared, rows, captions).to(device)[share].float()
        targets = targets / targets.sum(1, keepdim=True)

        def objective(adversarial: Tensor) -> Tensor:
            scores = F.normalize(model.encode_image(adversarial).float(), dim=-1) @ against.T
            return F.cross_entropy(scores / ATTACK_TEMPERATURE, targets, reduction="none")

    return pgd(pixels, objective, epsilon=point.epsilon, steps=point.attack_steps, keys=keys), texts


def _positives(prepared: Prepared, rows: np.ndarray, captions: np.ndarray) -> Tensor:
    return positive_pairs(torch.from_numpy(rows), torch.from_numpy(prepared.caption_groups[captions]))


def worker_loss(
    ddp: nn.Module,
    trainee: Trainee,
    config: TrialConfig,
    prepared: Prepared,
    originals: Tensor,
    step: int,
    clock: Clock,
) -> Tensor:
    """The global batch's loss at `step`, with this worker's adversarial pairs made on the way."""
    epoch, rows, captions = batch_rows(config, prepared, step)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    size = len(rows) // world
    share = slice(rank * size, (rank + 1) * size)
    rows, captions = rows[: size * world], captions[: size * world]
    device = originals.device
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    pixels = _to_device(prepared.dataset.train.pixels[rows[share]], device)
    original = originals[torch.from_numpy(rows[share])]

    clock.mark("attack")
    trainee.eval()
    trained = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    with autocast:
        pixels, texts = attack_pairs(trainee.model, config, prepared, pixels, epoch, rows, captions, original, share)
    for parameter in trained:
        parameter.requires_grad_(True)

    clock.mark("train")
    trainee.train()
    torch.manual_seed((config.seed * 1_000_003 + step) * 1024 + rank)  # dropout belongs to the step, not to history
    tokens, mask = tokenize(trainee.model, texts, config.model.max_tokens)
    with autocast:
        return ddp(
            pixels, tokens.to(device), mask.to(device), original, _positives(prepared, rows, captions).to(device)
        )


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


def rate_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Linear warm-up, then cosine to zero; the learning rate's factor at `step`."""
    warmup = max(1, round(warmup_fraction * steps))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def finetune(
    config: TrialConfig,
    prepared: Prepared,
    device: torch.device,
    checkpoint: Path | None,
    scratch: Path,
    report: Report,
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

    Raises:
        Diverged: the loss became NaN or infinite.
        CheckpointError: the checkpoint is damaged.
    """
    started = time.time()
    clock = Clock(device)
    clock.mark("load")
    training = config.training
    leader = not dist.is_initialized() or dist.get_rank() == 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    prepared.base.to(device)
    originals = original_embeddings(prepared, device)
    trainee = Trainee(prepared.base, config.point).to(device)
    _, per_epoch = epoch_shape(config, len(prepared.dataset.train.image_ids))
    steps = training.epochs * per_epoch
    trained = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    state: dict[str, Any] = {"step": 0, "device_seconds": 0.0, "resumed_from_steps": []}
    if checkpoint is not None:
        state, complete = _restore(checkpoint, trainee, optimiser)
        if complete:
            report({**state["report"], "device_seconds": state["device_seconds"]}, checkpoint if leader else None)
            return
        state["resumed_from_steps"].append(state["step"])
    ddp: nn.Module = trainee
    if world > 1:
        ddp = DistributedDataParallel(trainee, device_ids=[device] if device.type == "cuda" else None)
    history: list[dict[str, Tensor | float]] = []

    for step in range(state["step"], steps):
        loss = worker_loss(ddp, trainee, config, prepared, originals, step, clock)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, training.gradient_clip)
        for group in optimiser.param_groups:
            group["lr"] = training.learning_rate * rate_factor(step, steps, training.warmup_fraction)
        optimiser.step()
        if (step + 1) % training.log_every_steps == 0 or (step + 1) % per_epoch == 0:
            temperature = trainee.log_temperature.detach().exp().clone()
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
        protocol = config.protocol
        gallery = prepared.gallery if last else prepared.gallery.first(protocol.rung_gallery_images)
        ranks = evaluate(
            trainee.model,
            gallery,
            protocol if last else protocol.rung,
            max_tokens=config.model.max_tokens,
            device=device,
        ).ranks
        metrics = result_metrics(ranks, protocol)
        clock.settle()
        clock.mark("train")
        device_seconds = state["device_seconds"] + world * (time.time() - started)
        message = {
            "step": step + 1,
            "epoch": (step + 1) // per_epoch,
            "last": last,
            "device_seconds": device_seconds,
            "resumed_from_step": float(state["resumed_from_steps"][-1]) if state["resumed_from_steps"] else -1.0,
            "history": json.dumps(entries),
            **{name: metric.value for name, metric in metrics.items()},
        }
        folder = None
        if leader:
            result = None
            if last:
                result = TrialResult(
                    metrics=metrics,
                    correct=correct_bits(ranks, protocol),
                    queries={"tr": len(ranks["clean"].tr), "ir": len(ranks["clean"].ir)},
                    device_seconds=device_seconds,
                    seconds={name: round(value, 3) for name, value in clock.seconds.items() if name},
                    steps=steps,
                    resumed_from_steps=state["resumed_from_steps"],
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
                    hashes=prepared.hashes,
                    versions=library_versions(),
                )
            folder = scratch / f"step-{step + 1}"
            folder.mkdir(parents=True, exist_ok=True)
            saved = {**state, "step": step + 1, "device_seconds": device_seconds, "report": message}
            (folder / "state.json").write_text(json.dumps(saved))
            if result is None:
                _save_training(folder, trainee, optimiser)
            else:
                (folder / "result.json").write_text(result.model_dump_json())
                (folder / "trial.json").write_text(config.model_dump_json())
                trainee.model.save(folder / "model")
        report(message, folder)


def _save_training(folder: Path, trainee: Trainee, optimiser: torch.optim.Optimizer) -> None:
    """Weights and optimiser. Learning rate and random numbers are functions of the step and need no state."""
    save_file(
        {name: tensor.contiguous() for name, tensor in trainee.state_dict().items()}, folder / "model.safetensors"
    )
    torch.save(optimiser.state_dict(), folder / "optimiser.pt")


def _restore(folder: Path, trainee: Trainee, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Any], bool]:
    """Position, and whether the trial is complete; weights and optimiser are only read if it is not."""
    try:
        state = json.loads((folder / "state.json").read_text())
        if (folder / "result.json").exists():
            return state, True
        trainee.load_state_dict(load_file(folder / "model.safetensors"))
        optimiser.load_state_dict(torch.load(folder / "optimiser.pt", map_location="cpu", weights_only=True))
    except Exception as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read ({type(error).__name__}: {error})") from error
    return state, False


def library_versions() -> dict[str, str]:
    """Of what decides a measurement."""
    from importlib.metadata import version

    names = ("paretovl", "torch", "transformers", "torchattacks", "ray", "numpy")
    return {name: version(name) for name in names}
