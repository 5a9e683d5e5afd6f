"""A final evaluation that is interrupted goes on from what is kept of it."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from trainables.config import TrialConfig
from trainables.execution.checkpoints import RunFolder, seal
from trainables.execution.shelf import FOLDER, Shelf
from trainables.prepare import prepare
from trainables.results import TrialResult
from trainables.training.finetune import finetune


class Lost(Exception):
    """Ends a run in the middle of an evaluation."""


def run(
    config: TrialConfig, folder: Path, checkpoint: Path | None = None, shelf: Shelf | None = None, parts: int = 99
) -> tuple[int, list[Path]]:
    """How many parts of evaluations were done, and the checkpoints; the process is lost after so many parts."""
    done: list[int] = []
    reported: list[Future[Path]] = []

    def beat() -> None:
        done.append(1)
        if len(done) == parts:
            raise Lost

    def report(metrics: dict[str, Any], written: Future[Path] | None) -> None:
        if written is not None:
            reported.append(written)

    with contextlib.suppress(Lost):
        device = torch.device("cpu")
        finetune(config, prepare(config), device, checkpoint, folder, report, beat=beat, shelf=shelf)
    return len(done), [written.result() for written in reported]


def result(folder: Path) -> TrialResult:
    return TrialResult.model_validate_json((folder / "result.json").read_text())


@pytest.mark.parametrize("family", ["clip", "albef"])
def test_a_final_evaluation_goes_on(tiny_trial: TrialConfig, tmp_path: Path, family: str) -> None:
    rerank = {"rerank": 3} if family == "albef" else {}
    config = tiny_trial.model_copy(
        update={
            "storage_path": str(tmp_path / "runs"),
            "model": tiny_trial.model.model_copy(update={"family": family}),
            "training": tiny_trial.training.model_copy(update={"epochs": 1, "epoch_images": 16}),
            "protocol": tiny_trial.protocol.model_copy(update={"batch_images": 3, **rerank}),
        }
    )
    parts, whole = run(config, tmp_path / "whole")
    assert [path.name for path in whole] == ["step-2-unmeasured", "step-2"]
    run(config, tmp_path / "first", shelf=Shelf(config, 0), parts=7)  # in the third of four batches
    (kept,) = (tmp_path / "runs" / config.key).iterdir()
    assert kept.name.startswith(FOLDER)
    assert len(list(kept.iterdir())) == 2
    rest, ended = run(config, tmp_path / "rest", whole[0], Shelf(config, 1e9))
    assert rest == parts - 6
    assert len(list(kept.iterdir())) == 2, "no other was due"
    one, two = result(whole[-1]), result(ended[-1])
    assert (one.metrics, one.correct) == (two.metrics, two.correct)
    assert len(list(Shelf(config, 0).of(kept.name.removeprefix(FOLDER)).load())) == 2
    assert list(Shelf(config, 0).of("another").load()) == []
    for piece, damage in zip(sorted(kept.iterdir()), (torn, zeros), strict=True):
        damage(piece)
    assert run(config, tmp_path / "damaged", whole[0], Shelf(config, 1e9))[0] == parts


def torn(piece: Path) -> None:
    piece.write_bytes(piece.read_bytes()[:-9])


def zeros(piece: Path) -> None:
    content = piece.read_bytes()
    piece.write_bytes(content[:-64] + bytes(64))


def test_a_piece_is_due_after_its_time_or_at_once(tmp_path: Path) -> None:
    now, hurry = [0.0], [False]
    config = TrialConfig(key="k", storage_path=str(tmp_path))
    shelf = Shelf(config, 60, hurry=lambda: hurry[0], clock=lambda: now[0]).of("x")
    now[0] = 59
    assert not shelf.due()
    hurry[0] = True
    assert shelf.due()
    hurry[0], now[0] = False, 60
    assert shelf.due()
    shelf.save({"images": torch.arange(3)})
    assert not shelf.due()
    (piece,) = Shelf(config, 60).of("x").load()
    assert piece["images"].tolist() == [0, 1, 2]


def checkpoint(folder: Path, name: str, **state: Any) -> None:
    (folder / name).mkdir(parents=True)
    seal(folder / name, {"report": {"last": False}, **state})


def test_of_one_step_the_evaluated_checkpoint_is_the_newest_and_what_was_kept_goes_in_the_end(tmp_path: Path) -> None:
    config = TrialConfig(key="k", storage_path=str(tmp_path))
    run = tmp_path / "k"
    checkpoint(run, "checkpoint_c", step=3, measured=False)
    checkpoint(run, "checkpoint_b", step=4, measured=False)
    checkpoint(run, "checkpoint_a", step=4, measured=True)
    Shelf(config, 0).of("x").save({"images": torch.arange(3)})
    assert [found.name[-1] for found in RunFolder(config).checkpoints()] == ["a", "b", "c"]
    newest = RunFolder(config).begin(())
    assert newest is not None
    assert newest.name == "checkpoint_a", "though its node's clock is behind"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint_a", "checkpoint_b", "evaluation-x"]
    checkpoint(run, "checkpoint_d", step=4, measured=True, report={"last": True})
    RunFolder(config).keep(1)
    assert [path.name for path in run.iterdir()] == ["checkpoint_d"]
