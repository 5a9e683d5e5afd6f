"""Workers with parts of a batch, whole or by chunks, are one worker with all of it."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from tests.trainables.training.test_resume import same
from trainables.config import Point, TrialConfig, WorkersConfig
from trainables.evaluation.robustness import evaluate
from trainables.prepare import Prepared, prepare
from trainables.training.clock import Clock
from trainables.training.feed import Feed
from trainables.training.finetune import finetune
from trainables.training.objective import Trainee
from trainables.training.original import Original
from trainables.training.sharding import distribute, merge, whole
from trainables.training.step import worker_loss

POINTS = {
    "cross": Point(
        contrastive_weight=0.6, temperature=0.1, temperature_learned=True, epsilon=4 / 255, attack_steps=2, words=1
    ),
    "deviation": Point(
        contrastive_weight=0.3, temperature=0.1, epsilon=4 / 255, attack_steps=2, attack_objective="deviation"
    ),
    "cropped": Point(
        contrastive_weight=0.3, temperature=0.1, epsilon=4 / 255, attack_steps=1, image_augmentation="crop"
    ),
    "crossed": Point(
        contrastive_weight=0.5, temperature=0.1, epsilon=4 / 255, attack_steps=1, words=1, pairs="crossed"
    ),
    "consistent, augmented": Point(
        contrastive_weight=0.5,
        temperature=0.1,
        epsilon=4 / 255,
        attack_steps=1,
        words=1,
        companion="consistency",
        captions_per_image=2,
        text_augmentation="eda",
        image_augmentation="crop",
        ramp_end=0.9,
    ),
    "albef": Point(contrastive_weight=0.5, temperature=0.1, epsilon=4 / 255, attack_steps=1, words=1, distillation=0.8),
    "sharded": Point(
        contrastive_weight=0.6,
        temperature=0.1,
        temperature_learned=True,
        epsilon=4 / 255,
        attack_steps=1,
        words=1,
        distillation=0.8,
    ),
    "albef, crossed": Point(contrastive_weight=0.5, temperature=0.1, words=1, pairs="crossed", captions_per_image=2),
    "albef, anchored": Point(
        contrastive_weight=0.5, temperature=0.1, epsilon=4 / 255, attack_steps=1, companion="anchor"
    ),
    "blip": Point(contrastive_weight=0.0, temperature=0.1, words=1, captions_per_image=2),
}

MICRO_BATCH = {1: 3, 2: 3, 4: 1}
"""Images in a chunk by the number of workers, who share a batch of eight: the last chunk is smaller, or each is one."""


def configs(tiny_trial: TrialConfig) -> dict[str, TrialConfig]:
    found = {}
    for name, point in POINTS.items():
        family, _, _ = name.partition(",")
        fusion = family in ("albef", "blip")
        changes = {
            "point": point,
            "model": tiny_trial.model.model_copy(update={"family": family if fusion else "clip"}),
            "workers": WorkersConfig(count=2, sharded=name == "sharded"),
            "protocol": tiny_trial.protocol.model_copy(update={"rerank": 5 if fusion else None}),
        }
        found[name] = tiny_trial.model_copy(update=changes)
    return found


@contextmanager
def double_precision() -> Iterator[None]:
    """In it a sum's order does not decide a gradient's sign, which an attack makes a whole step of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # what asks for the full precision gets it
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


@double_precision()
def step(config: TrialConfig, prepared: Prepared) -> dict[str, torch.Tensor]:
    """One forward and backward pass, and a small evaluation of whole batches: loss, gradients and ranks."""
    device = torch.device("cpu")
    trainee = Trainee(prepared.base, config.point, config.training.micro_batch).double()
    trainee.freeze_idle(config.data.image_pixels)
    if trainee.teacher is not None:
        for parameter in trainee.teacher.parameters():
            parameter.mul_(1.1)  # no copy of the model any more
    cropped = config.point.image_augmentation == "crop"
    original = Original(prepared, device, cropped=cropped) if trainee.needs_original else None
    module = distribute(trainee, device, config.workers.sharded)
    batch = next(Feed(config, prepared, device).batches(3, 4))
    loss = worker_loss(module, trainee, config, original, batch, 3, 16, Clock(device))
    loss.backward()
    saved = {name: whole(p.grad) for name, p in trainee.named_parameters() if p.grad is not None}
    sharded = any(isinstance(parameter, DTensor) for parameter in trainee.parameters())
    assert sharded == (config.workers.sharded and dist.is_initialized())
    merge(trainee)
    saved["loss"] = loss.detach()
    if config.training.micro_batch is not None:
        return saved
    ranks = evaluate(trainee.model, prepared.gallery, config.protocol, max_tokens=32, device=device).ranks
    return saved | {
        f"rank {target} {d}": torch.from_numpy(getattr(r, d)) for target, r in ranks.items() for d in ("tr", "ir")
    }


def worker(rank: int, world: int, trials: dict[str, TrialConfig], folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    found = {(name, False): step(config, prepare(config)) for name, config in trials.items()}
    for name, config in trials.items():
        training = config.training.model_copy(update={"micro_batch": MICRO_BATCH[world]})
        found[name, True] = step(config.model_copy(update={"training": training}), prepare(config))
    torch.save(found, Path(folder) / f"{world}-{rank}.pt")
    if world == 2:
        config = unattacked(trials["sharded"])
        finetune(config, prepare(config), torch.device("cpu"), None, Path(folder), lambda metrics, written: None)
        for name, config in interrupted(trials).items():
            whole, rest = Path(folder) / name / "whole", Path(folder) / name / "rest"
            for place, checkpoint, asks in ((whole, None, True), (rest, whole / "step-3-unmeasured", False)):
                steps = itertools.count(1)
                finetune(
                    config,
                    prepare(config),
                    torch.device("cpu"),
                    checkpoint,
                    place,
                    lambda metrics, written: None,
                    asked=lambda steps=steps, asks=asks: asks and next(steps) == 3,  # in the middle of the second epoch
                )
                dist.barrier()  # the first worker writes what all go on from
    if world > 1:
        dist.destroy_process_group()


def unattacked(config: TrialConfig) -> TrialConfig:
    """The signs of an attack turn the last bit of a sum into whole steps."""
    return config.model_copy(update={"point": Point(temperature_learned=True, distillation=0.8)})


IDLE = {"sharded, no text": True, "sharded, no fusion": True, "copied, no text": False}
"""By name, whether weights are sharded: points where some trained parameters never have a gradient."""


def interrupted(trials: dict[str, TrialConfig]) -> dict[str, TrialConfig]:
    """Trials of three epochs of two steps."""
    text = Point(contrastive_weight=0.0, temperature_learned=True, epsilon=4 / 255, attack_steps=1)
    found = {}
    for name, sharded in IDLE.items():
        trial = trials["albef" if "fusion" in name else "sharded"]
        changes = {
            "point": Point(temperature_learned=True, distillation=0.4) if "fusion" in name else text,
            "training": trial.training.model_copy(update={"epochs": 3, "epoch_images": 16}),
            "workers": WorkersConfig(count=2, sharded=sharded),
        }
        found[name] = trial.model_copy(update=changes)
    return found


Steps = list[dict[tuple[str, bool], dict[str, torch.Tensor]]]
"""A worker's, by the point and whether it went by chunks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def steps(tiny_trial: TrialConfig, folder: Path) -> dict[int, Steps]:
    """Every point's step by each of one, two and four workers; an import costs more than all the steps."""
    trials = configs(tiny_trial)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainables.training.finetune"])
    found = {}
    for world in MICRO_BATCH:
        processes = [context.Process(target=worker, args=(rank, world, trials, str(folder))) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            assert process.exitcode == 0
        found[world] = [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    return found


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("world", MICRO_BATCH)
@pytest.mark.parametrize("name", POINTS)
def test_workers_and_chunks_equal_one_whole(name: str, world: int, chunks: bool, steps: dict[int, Steps]) -> None:
    alone = steps[1][0][name, False]
    assert len([key for key in alone if "log_temperature" in key]) == POINTS[name].temperature_learned
    assert max(value.abs().max() for key, value in alone.items() if "model" in key) > 1e-3
    for found in steps[world]:
        together = found[name, chunks]
        assert together.keys() == {key for key in alone if not (chunks and key.startswith("rank"))}
        for key, value in together.items():
            if key.startswith("rank"):
                np.testing.assert_array_equal(value, alone[key], err_msg=key)
            else:
                torch.testing.assert_close(value, alone[key], rtol=1e-6, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("name", IDLE)
def test_two_workers_go_on_from_a_checkpoint(name: str, folder: Path) -> None:
    for step in ("step-4", "step-6-unmeasured", "step-6"):
        same(folder / name / "whole" / step, folder / name / "rest" / step)


@pytest.mark.usefixtures("steps")
def test_another_number_of_workers_goes_on(tiny_trial: TrialConfig, folder: Path, tmp_path: Path) -> None:
    config = interrupted(configs(tiny_trial))["sharded, no text"]
    alone = config.model_copy(update={"workers": WorkersConfig()})
    place = folder / "sharded, no text" / "whole"
    finetune(alone, prepare(alone), torch.device("cpu"), place / "step-2", tmp_path, lambda metrics, written: None)
    one, two = (torch.load(at / "step-4" / "optimiser.pt", weights_only=True)["state"] for at in (tmp_path, place))
    assert one.keys() == two.keys()
    assert {float(state["step"]) for state in one.values()} == {4}
    for name, state in one.items():
        torch.testing.assert_close(state["exp_avg"], two[name]["exp_avg"], rtol=0.1, atol=1e-4)


@pytest.mark.usefixtures("steps")
def test_one_worker_goes_on_from_a_sharded_checkpoint(tiny_trial: TrialConfig, folder: Path, tmp_path: Path) -> None:
    config, device = unattacked(configs(tiny_trial)["sharded"]), torch.device("cpu")
    finetune(config, prepare(config), device, folder / "step-8", tmp_path, lambda metrics, written: None)
    one, two = (load_file(place / "step-16" / "model" / "model.safetensors") for place in (tmp_path, folder))
    saved = load_file(folder / "step-8" / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    moved = [(one[name] - saved[f"model.clip.{name}"]).abs().mean() for name in one]
    apart = [(one[name] - two[name]).abs().mean() for name in one]
    assert sum(apart) < 0.01 * sum(moved)
