"""The worker loop: resumed equals uninterrupted, what fails says so, what is frozen stays."""

from __future__ import annotations

import contextlib
import copy
import errno
import itertools
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainables.training.test_resume import same
from trainables.config import Point, Protocol, TrialConfig
from trainables.evaluation.robustness import Evaluation, Gallery, evaluate
from trainables.execution.checkpoints import CheckpointError, seal
from trainables.models.loading import load
from trainables.prepare import prepare
from trainables.results import TrialResult
from trainables.training.clock import Clock
from trainables.training.finetune import Diverged, finetune

POINT = Point(temperature=0.1, temperature_learned=True, epsilon=2 / 255, attack_steps=1, words=1)
CPU = torch.device("cpu")


class Stop(Exception):
    """Ends a run after a report, as a lost worker does."""


def run(
    config: TrialConfig,
    scratch: Path,
    checkpoint: Path | None = None,
    stop_after: int = 99,
    asked: Callable[[], bool] = lambda: False,
    **fields: Any,
) -> list[Any]:
    reports: list[Any] = []

    def report(metrics: dict[str, Any], written: Future[Path] | None) -> None:
        reports.append((metrics, written and written.result()))
        if len(reports) == stop_after:
            raise Stop

    with contextlib.suppress(Stop):
        finetune(config, prepare(config), CPU, checkpoint, scratch, report, asked=asked, **fields)
    return reports


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def asked_once(after: int) -> Callable[[], bool]:
    """Asks for a checkpoint after so many steps of the run."""
    steps = itertools.count(1)
    return lambda: next(steps) == after


def test_a_checkpoint_in_the_middle_of_an_epoch(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    config, logged = tiny_trial.model_copy(update={"point": POINT}), {"log_every_steps": 2}
    config = config.model_copy(update={"training": config.training.model_copy(update=logged)})
    whole = run(config, tmp_path / "whole", asked=asked_once(3))
    assert [(metrics["step"], metrics["epoch"]) for metrics, _ in whole] == [(3, 0), (8, 1), (16, 2), (16, 2)]
    assert [len([name for name in metrics if "/" in name]) > 0 for metrics, _ in whole] == [False, True, False, True]
    assert [metrics["last"] for metrics, _ in whole] == [False, False, False, True]
    steps = [[entry["step"] for entry in json.loads(metrics.get("history", "[]"))] for metrics, _ in whole]
    assert steps == [[], [2, 4, 6, 8], [], [10, 12, 14, 16]]
    made = [json.loads(metrics.get("hashes", "{}")).keys() for metrics, _ in whole]
    assert [keys >= {"data", "base", "substitutes"} for keys in made] == [False, True, False, True]
    rest = run(config, tmp_path / "rest", checkpoint=whole[0][1])
    assert [metrics["resumed_from_step"] for metrics, _ in rest] == [3, 3, 3]
    for one, two in zip(whole[1:], rest, strict=True):
        same(one[1], two[1])


def test_what_nobody_may_have_written_down_is_reported_again(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    whole = run(tiny_trial, tmp_path / "whole", asked=asked_once(11))
    assert [metrics["step"] for metrics, _ in whole] == [8, 11, 16, 16]
    rung, final = whole[0][0], whole[3][0]
    for place, others in ((1, [16, 16]), (2, [16]), (3, [])):
        again = run(tiny_trial, tmp_path / f"again {place}", checkpoint=whole[place][1])
        told, rest = again[0], again[1:]
        assert told == ({**rung, "resumed_from_step": whole[place][0]["step"]}, None), "once, and whole"
        assert [metrics["step"] for metrics, _ in rest] == [*others, *([16] if place == 3 else [])]
        assert {name: rest[-1][0][name] for name in final if "/" in name} == {n: final[n] for n in final if "/" in n}
        entries = [[entry["loss"] for entry in json.loads(last["history"])] for last in (rest[-1][0], final)]
        assert entries[0] == entries[1]
        known = run(tiny_trial, tmp_path / f"known {place}", checkpoint=whole[place][1], logged=8)
        assert [metrics["step"] for metrics, _ in known] == [metrics["step"] for metrics, _ in rest]


def test_what_earlier_attempts_held_counts(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    first = run(tiny_trial, tmp_path / "first", stop_after=1)
    known = Clock(CPU, held_before=1000)
    told = run(tiny_trial, tmp_path / "told", checkpoint=first[0][1], clock=known)
    result = TrialResult.model_validate_json((told[-1][1] / "result.json").read_text())
    assert 1000 < told[1][0]["device_seconds"] < told[-1][0]["device_seconds"] < result.device_seconds < 1100
    assert told[0][0]["device_seconds"] == first[0][0]["device_seconds"], "as it was then"


def test_the_phases_of_an_attempt_are_all_of_it(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    config = tiny_trial.model_copy(update={"protocol": tiny_trial.protocol.model_copy(update={"audit": True})})
    clock = Clock(CPU)
    time.sleep(0.5)  # the data are read
    reports = run(config, tmp_path, clock=clock)
    result = TrialResult.model_validate_json((reports[-1][1] / "result.json").read_text())
    assert result.seconds.keys() == {"load", "attack", "train", "evaluate", "audit", "save"}
    assert result.seconds["load"] > 0.5
    assert min(result.seconds[phase] for phase in ("train", "evaluate", "audit", "save")) > 0
    assert sum(result.seconds.values()) == pytest.approx(result.device_seconds, rel=0.03)


def test_a_phase_that_goes_on_is_added_up_until_now(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("trainables.training.clock.time.perf_counter", lambda: now[0])
    clock, found = Clock(CPU), []
    for now[0] in (2.0, 2.0, 5.0):
        clock.settle()
        found.append(clock.seconds["load"])
    assert found == [2, 2, 5]


def test_training_goes_on_while_a_checkpoint_is_written(
    tiny_trial: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(tiny_trial, tmp_path / "plain")
    later = threading.Event()

    def late(weights: dict[str, torch.Tensor], path: Path) -> None:
        assert later.wait(60), "training waits for it"
        save_file(weights, path)

    def reported(metrics: dict[str, Any], written: Future[Path] | None) -> None:
        assert written is not None
        if metrics["step"] == 16:
            assert written.result().name == "step-16" if metrics["last"] else "step-16-unmeasured"
        else:
            assert not written.done()

    steps = itertools.count(1)

    def asked() -> bool:
        if next(steps) > 9:  # in the second epoch
            later.set()
        return False

    monkeypatch.setattr("trainables.training.snapshot.save_file", late)
    finetune(tiny_trial, prepare(tiny_trial), CPU, None, tmp_path / "late", reported, asked=asked)
    same(plain[0][1], tmp_path / "late" / "step-8")


@pytest.mark.parametrize("writes", ["snapshot.save_file", "reports.seal"])
def test_a_checkpoint_that_cannot_be_written_ends_the_trial(
    tiny_trial: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(f"trainables.training.{writes}", full)
    epochs = tiny_trial.training.model_copy(update={"epochs": 1 if "seal" in writes else 2})
    config = tiny_trial.model_copy(update={"training": epochs})
    with pytest.raises(OSError, match="no space left"):
        finetune(config, prepare(config), CPU, None, tmp_path, lambda metrics, written: None)


@pytest.mark.parametrize("family", ["clip", "albef"])
def test_resumed_equals_uninterrupted(tiny_trial: TrialConfig, tmp_path: Path, family: str) -> None:
    distilled = {"contrastive_weight": 0.5, "distillation": 0.4}
    point = POINT if family == "clip" else POINT.model_copy(update=distilled)
    model = tiny_trial.model.model_copy(update={"family": family})
    config = tiny_trial.model_copy(update={"point": point, "model": model})
    whole = run(config, tmp_path / "whole")
    first = run(config, tmp_path / "first", stop_after=1)
    rest = run(config, tmp_path / "rest", checkpoint=first[-1][1])
    one, two = weights(whole[-1][1]), weights(rest[-1][1])
    assert all(torch.equal(one[name], two[name]) for name in one)
    results = [TrialResult.model_validate_json((r[-1][1] / "result.json").read_text()) for r in (whole, rest)]
    assert results[0].metrics == results[1].metrics
    assert results[0].correct == results[1].correct
    assert results[0].resumed_from_steps == []
    assert results[1].resumed_from_steps == [8]
    assert results[1].device_seconds > first[-1][0]["device_seconds"]
    assert load(str(whole[-1][1] / "model")).resize == config.data.resize == "crop"
    if family == "albef":
        assert prepare(config).base.resize == "stretch"
        saved, base = load_file(first[-1][1] / "model.safetensors"), prepare(config).base.state_dict()
        moved = {name: (saved[f"teacher.{name}"] - value).abs().max() for name, value in base.items()}
        trained = {name: (saved[f"model.{name}"] - value).abs().max() for name, value in base.items()}
        assert all(0 < moved[name] < 0.1 * trained[name] for name in base if "query.weight" in name)
    held = [first[-1][0]["peak_memory_gb"], results[1].peak_memory_gb]
    assert 0.05 < held[0] <= held[1] < psutil.virtual_memory().total / 1e9
    assert results[1].peak_memory_gb == rest[-1][0]["peak_memory_gb"]


def test_memory_of_an_earlier_attempt_counts(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    folder = run(tiny_trial, tmp_path / "first", stop_after=1)[-1][1]
    state = json.loads((folder / "state.json").read_text())
    seal(folder, {**state, "peak_memory_gb": 1e6})
    assert run(tiny_trial, tmp_path / "rest", checkpoint=folder)[-1][0]["peak_memory_gb"] == 1e6


def test_later_small_evaluations_are_larger_and_stronger(
    tiny_trial: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"rung_gallery_images": 4, "image_steps": 4, "rung_image_steps": 1, "rung_growth": 1.0}
    config = tiny_trial.model_copy(
        update={
            "protocol": tiny_trial.protocol.model_copy(update=changes),
            "training": tiny_trial.training.model_copy(update={"epochs": 4, "epoch_images": 8}),
        }
    )
    seen = []

    def recorded(model: Any, gallery: Gallery, protocol: Protocol, **fields: Any) -> Evaluation:
        seen.append((len(gallery.pixels), protocol.image_steps))
        return evaluate(model, gallery, protocol, **fields)

    monkeypatch.setattr("trainables.training.finetune.evaluate", recorded)
    first = run(config, tmp_path / "first", stop_after=2)
    run(config, tmp_path / "rest", checkpoint=first[-1][1])
    assert seen == [(4, 1), (6, 2), (9, 3), (12, 4)]


@pytest.mark.parametrize(
    ("growth", "share", "expected"),
    [(0.0, 0.9, (50, 3)), (0.5, 0.2, (50, 3)), (0.5, 0.8, (80, 4)), (1.0, 0.5, (100, 5)), (1.0, 0.99, (198, 10))],
)
def test_growth_of_small_evaluations(growth: float, share: float, expected: tuple[int, int]) -> None:
    rung = Protocol(rung_growth=growth).rung(share, 200)
    assert (rung.gallery_images, rung.image_steps) == expected
    small = Protocol(image_steps=2, rung_growth=growth).rung(share, 20)
    assert (small.gallery_images, small.image_steps) == (20, 2), "never more than the final evaluation"


def test_finished_run_is_reported_again_and_nothing_redone(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    whole = run(tiny_trial, tmp_path / "whole")
    again = run(tiny_trial, tmp_path / "again", checkpoint=whole[-1][1])
    assert [(metrics["step"], folder) for metrics, folder in again] == [(8, None), (16, whole[-1][1])]
    assert not (tmp_path / "again").exists()


def test_damaged_checkpoint_is_named(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    folder = run(tiny_trial, tmp_path / "a", stop_after=1)[-1][1]
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=str(folder)):
        run(tiny_trial, tmp_path / "b", checkpoint=folder)


def test_divergence_is_told(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    prepared = prepare(tiny_trial)
    next(iter(prepared.base.image_parameters())).data.fill_(float("nan"))
    with pytest.raises(Diverged, match="nan by step"):
        finetune(tiny_trial, prepared, CPU, None, tmp_path, lambda metrics, folder: None)


def test_fare_trains_the_image_side_only(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    fare = Point(
        contrastive_weight=0.0, epsilon=2 / 255, attack_steps=1, trainable="image", attack_objective="deviation"
    )
    config = tiny_trial.model_copy(update={"point": fare})
    prepared = prepare(config)
    before = copy.deepcopy(prepared.base.state_dict())
    finetune(config, prepared, CPU, None, tmp_path, lambda metrics, folder: None)
    changed = {name for name, value in prepared.base.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("vision" in name or "visual" in name for name in changed)


@pytest.mark.parametrize(("start", "factors"), [(0.005, (2.0, 3.0)), (1.0, (0.4, 0.7))])
def test_a_learned_temperature_learns_at_any_rate_of_the_model(
    tiny_trial: TrialConfig, tmp_path: Path, start: float, factors: tuple[float, float]
) -> None:
    training = tiny_trial.training.model_copy(update={"learning_rate": 1e-5})
    point = Point(temperature=start, temperature_learned=True)
    reports = run(tiny_trial.model_copy(update={"point": point, "training": training}), tmp_path)
    history = [entry["temperature"] for metrics, _ in reports for entry in json.loads(metrics.get("history", "[]"))]
    assert factors[0] < history[-1] / start < factors[1]
    assert 0.9 < history[0] / start < 1.1, "no clamp moves it from its start"


def test_a_fixed_temperature_stays(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    reports = run(tiny_trial.model_copy(update={"point": Point(temperature=0.1)}), tmp_path)
    result = TrialResult.model_validate_json((reports[-1][1] / "result.json").read_text())
    assert result.temperature == pytest.approx(0.1, abs=1e-8)
