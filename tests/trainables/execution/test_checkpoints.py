"""Which checkpoint a trial goes on from: one that is what was written, and made from what the trial is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainables.config import AttackConfig, Point, Protocol, TrialConfig, WorkersConfig
from trainables.errors import InputError
from trainables.execution.checkpoints import SNAPSHOT, CheckpointError, RunFolder, other_origin, read_sealed
from trainables.identity import made_from, protocol_hash
from trainables.prepare import Prepared, prepare
from trainables.training.finetune import finetune


@pytest.fixture(scope="module")
def written(tiny_trial: TrialConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A run of three checkpoints, the last of them complete, and the hashes of what it was made from."""
    folder, config, prepared = tmp_path_factory.mktemp("run"), three_epochs(tiny_trial), prepare(tiny_trial)
    finetune(config, prepared, torch.device("cpu"), None, folder, lambda metrics, checkpoint: None)
    return folder, prepared.hashes


def three_epochs(trial: TrialConfig) -> TrialConfig:
    training = trial.training.model_copy(update={"epochs": 3, "epoch_images": 16})
    return trial.model_copy(update={"training": training})


@pytest.fixture
def run(tiny_trial: TrialConfig, written: tuple[Path, dict[str, str]], tmp_path: Path) -> tuple[TrialConfig, Path]:
    """A trial of which the first two checkpoints are there, and its run folder."""
    config = three_epochs(tiny_trial).model_copy(update={"storage_path": str(tmp_path)})
    for step in (2, 4):
        shutil.copytree(written[0] / f"step-{step}", tmp_path / config.key / f"checkpoint_{step}")
    return config, tmp_path / config.key


def torn(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])


def zeros(folder: Path) -> None:
    """As a file system leaves it that lost its power: the length is right, the header too, and the rest is empty."""
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4096] + bytes(4096))


def exchanged(folder: Path) -> None:
    shutil.copy(folder.parent / "checkpoint_2" / "optimiser.pt", folder / "optimiser.pt")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "torn": torn,
    "zeros": zeros,
    "another one's optimiser": exchanged,
    "missing": lambda folder: (folder / "optimiser.pt").unlink(),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no JSON": lambda folder: (folder / "state.json").write_text('{"step": 4'),
    "other JSON": lambda folder: (folder / "state.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage: str, run: tuple[TrialConfig, Path]) -> None:
    config, folder = run
    newest = RunFolder(config).begin(())
    assert newest is not None
    assert (newest.name, newest.state["step"]) == ("checkpoint_4", 4)
    read_sealed(folder / "checkpoint_4")
    DAMAGES[damage](folder / "checkpoint_4")
    with pytest.raises(CheckpointError, match=r"checkpoint_4 cannot be read"):
        read_sealed(folder / "checkpoint_4")
    passed_over = {"checkpoint_4": "as a worker told", **RunFolder(config).incomplete()}
    before = RunFolder(config).begin(passed_over)
    assert before is not None
    assert before.name == "checkpoint_2"
    assert (folder / "checkpoint_4").is_dir(), "it can be looked at"
    torn(folder / "checkpoint_2")
    assert RunFolder(config).begin(passed_over | RunFolder(config).incomplete()) is None, "it begins anew"


def test_a_torn_account_of_ray_train_does_not_matter(run: tuple[TrialConfig, Path]) -> None:
    config, folder = run
    (folder / SNAPSHOT).write_text('{"ray_version": "2.60')
    newest = RunFolder(config).begin(())
    assert newest is not None
    assert newest.name == "checkpoint_4"
    assert not (folder / SNAPSHOT).exists()


def test_two_checkpoints_are_kept_and_one_at_the_end(run: tuple[TrialConfig, Path], written: tuple[Path, Any]) -> None:
    config, folder = run
    shutil.copytree(written[0] / "step-6", folder / "checkpoint_6")
    shutil.copytree(folder / "checkpoint_2", folder / "checkpoint_1")
    torn(folder / "checkpoint_4")
    newest = RunFolder(config).begin(())
    assert newest is not None
    assert newest.name == "checkpoint_6"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint_2", "checkpoint_6"]
    RunFolder(config).keep(1)
    assert [path.name for path in folder.iterdir()] == ["checkpoint_6"]


def changed(trial: TrialConfig, **fields: Any) -> TrialConfig:
    parts = {name: getattr(trial, name).model_copy(update=value) for name, value in fields.items()}
    return trial.model_copy(update=parts)


OTHERS: dict[str, Callable[[TrialConfig], TrialConfig]] = {
    "point.temperature": lambda trial: changed(trial, point={"temperature": 0.06}),
    "training.learning_rate": lambda trial: changed(trial, training={"learning_rate": 2e-3}),
    "protocol.words": lambda trial: changed(trial, protocol={"words": 0}),
    "protocol.attacks": lambda trial: changed(trial, protocol={"attacks": (AttackConfig(name="i", attack="image"),)}),
    "seed": lambda trial: trial.model_copy(update={"seed": 1}),
    "owner": lambda trial: trial.model_copy(update={"owner": "another study"}),
    "model.max_tokens": lambda trial: changed(trial, model={"max_tokens": 31}),
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_checkpoint_of_another_trial_is_refused(
    field: str, run: tuple[TrialConfig, Path], written: tuple[Path, dict[str, str]]
) -> None:
    other, hashes = OTHERS[field](run[0]), written[1]
    with pytest.raises(InputError, match=rf"(?s)made from something else:\n  {field}.*another key or storage_path"):
        RunFolder(other).refuse_others(other, hashes)
    prepared: Prepared = prepare(run[0])
    with pytest.raises(InputError, match=f"was made from something else: {field}"):
        finetune(other, prepared, torch.device("cpu"), run[1] / "checkpoint_4", run[1], lambda *_: None)


@pytest.mark.parametrize("name", ["data", "base", "substitutes"])
def test_other_contents_are_refused(name: str, run: tuple[TrialConfig, Path], written: tuple[Path, Any]) -> None:
    with pytest.raises(InputError, match=rf"{name} \(content\): {written[1][name]} -> 0123"):
        RunFolder(run[0]).refuse_others(run[0], {**written[1], name: "0123"})


def test_what_decides_no_result_may_change(run: tuple[TrialConfig, Path], written: tuple[Path, Any]) -> None:
    config = run[0]
    for other in (
        changed(config, protocol={"batch_images": 7}, training={"log_every_steps": 3, "gradient_checkpointing": True}),
        changed(config, training={"compile": "off", "micro_batch": 4}),
        config.model_copy(update={"workers": WorkersConfig(count=2, cpus_per_worker=0.5, gpus_per_worker=0)}),
        config.model_copy(update={"cache_dir": Path("elsewhere"), "key": "another"}),
        changed(config, data={"root": Path("/moved")}, model={"base": "/moved", "masked_lm": "/moved"}),
    ):
        RunFolder(config).refuse_others(other, written[1])


def test_an_attack_of_ones_own_counts_by_its_content(run: tuple[TrialConfig, Path], tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    trials = []
    for file in (one, two):
        file.write_text("x = 1")
        trials.append(changed(run[0], protocol={"attacks": (AttackConfig(name="m", attack=f"{file}:Mine"),)}))
    state = {"made_from": made_from(trials[0], {})}
    assert other_origin(state, trials[1], {}) == []
    two.write_text("x = 2")
    assert other_origin(state, trials[1], {}) != []


def test_a_checkpoint_of_an_earlier_version_says_no_owner(run: tuple[TrialConfig, Path]) -> None:
    trial = run[0].model_copy(update={"owner": "mine"})
    made = made_from(run[0], {})
    assert other_origin({"made_from": made}, trial, {}) == ["owner: None -> mine"]
    assert other_origin({"made_from": {k: v for k, v in made.items() if k != "owner"}}, trial, {}) == []


def test_state_tells_its_origin(run: tuple[TrialConfig, Path]) -> None:
    state = json.loads((run[1] / "checkpoint_2" / "state.json").read_text())
    assert state["made_from"]["point"] == Point().model_dump(mode="json")


def test_a_protocol_is_known_by_what_its_attacks_hold(tmp_path: Path) -> None:
    def hashed(folder: str, code: str) -> str:
        file = tmp_path / folder / "attack.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
        return protocol_hash(Protocol.model_validate({"attacks": ["both", {"name": "own", "attack": f"{file}:A"}]}))

    assert hashed("here", "class A: pass") == hashed("there", "class A: pass")
    assert hashed("here", "class A: rows = 2") != hashed("there", "class A: pass")
