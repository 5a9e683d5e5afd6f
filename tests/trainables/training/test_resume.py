"""Every point of the space goes on from every checkpoint it writes, to the bit."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.trainables.models.test_families import FAMILIES, LENGTH
from trainables.config import Point, TrialConfig
from trainables.errors import InputError
from trainables.prepare import Prepared, prepare
from trainables.training.finetune import finetune
from trainables.training.objective import Trainee

DRAWN, DRAWN_LONG = 3, 80
"""Points of a family."""

KNOBS: dict[str, list[Any]] = {
    "contrastive_weight": [0.0, 0.37, 1.0],
    "temperature_learned": [False, True],
    "epsilon": [0.0, 4 / 255],
    "attack_steps": [1, 2],
    "words": [0, 1],
    "text_search": ["importance", "exact"],
    "companion": ["auto", "anchor", "matching", "consistency"],
    "pairs": ["adversarial", "crossed"],
    "distillation": [0.0, 0.4],
    "ramp_end": [0.0, 0.5],
    "captions_per_image": [1, 2],
    "text_augmentation": ["none", "eda"],
    "image_augmentation": ["none", "crop"],
    "trainable": ["all", "all", "image", "text", "fusion"],
    "attack_objective": ["cross", "deviation"],
}
"""What a knob is drawn from: its ends, and something between."""


@pytest.fixture(scope="module")
def started(tiny_trial: TrialConfig) -> tuple[TrialConfig, Prepared]:
    """A trial of three epochs of two steps, and what it starts from."""
    training = {"epochs": 3, "epoch_images": 16}
    protocol = {"gallery_images": 8, "rung_gallery_images": 4, "attacks": tiny_trial.protocol.attacks[2:]}
    config = tiny_trial.model_copy(
        update={
            "training": tiny_trial.training.model_copy(update=training),
            "model": tiny_trial.model.model_copy(update={"max_tokens": LENGTH}),
            "protocol": tiny_trial.protocol.model_copy(update=protocol),
        }
    )
    return config, prepare(config)


def of_family(family: str, prepared: Prepared) -> Prepared:
    torch.manual_seed(0)
    return dataclasses.replace(prepared, base=FAMILIES[family](prepared.base.tokenizer).eval(), cache_dir=None)


IDLE: list[dict[str, Any]] = [
    {"contrastive_weight": 0.0, "companion": "anchor", "temperature_learned": True},
    {"contrastive_weight": 1.0, "companion": "auto"},
]
"""Where whole parts of a model have no gradient: the first points of every family."""


def drawn(rng: np.random.Generator, prepared: Prepared, fixed: dict[str, Any]) -> Point:
    """A point that the family can train."""
    while True:
        fields = {name: ends[rng.integers(len(ends))] for name, ends in KNOBS.items()} | fixed
        fields["attack_steps"] *= fields["epsilon"] > 0
        try:
            point = Point.model_validate({**fields, "temperature": 0.1})
            Trainee(copy.deepcopy(prepared.base), point)
        except ValueError:  # what the schema or the family refuses
            continue
        return point


ASKED = (1, 2, 5)
"""Steps after which a checkpoint is asked for: in the middle of an epoch, and before an evaluation."""


class Stop(Exception):
    """Ends a run after a report, as a lost worker does."""


def run(
    config: TrialConfig,
    prepared: Prepared,
    folder: Path,
    checkpoint: Path | None = None,
    reports: int = 99,
    shelf: Any = None,
) -> list[Path]:
    """The checkpoints of a run that is asked for some; what changes in what it starts from is a copy."""
    reported: list[Future[Path]] = []
    begun = json.loads((checkpoint / "state.json").read_text())["step"] if checkpoint else 0
    steps = itertools.count(begun + 1)

    def report(metrics: dict[str, Any], written: Future[Path] | None) -> None:
        if written is not None:
            reported.append(written)
        if len(reported) == reports:
            raise Stop

    base, device = copy.deepcopy(prepared.base), torch.device("cpu")
    with contextlib.suppress(Stop):
        started = dataclasses.replace(prepared, base=base)
        finetune(config, started, device, checkpoint, folder, report, asked=lambda: next(steps) in ASKED, shelf=shelf)
    return [written.result() for written in reported]


def same(one: Path, two: Path) -> None:
    """Two checkpoints are equal to the bit, but for what tells the time."""
    names = {str(path.relative_to(one)) for path in one.rglob("*.safetensors")}
    assert names == {str(path.relative_to(two)) for path in two.rglob("*.safetensors")} != set()
    for name in names:
        equal(load_file(one / name), load_file(two / name), name)
    states = [
        torch.load(folder / "optimiser.pt", weights_only=True)["state"]
        for folder in (one, two)
        if (folder / "optimiser.pt").exists()
    ]
    assert len(states) in (0, 2)
    if states:
        assert states[0].keys() == states[1].keys()
        for name, state in states[0].items():
            equal(state, states[1][name], name)
    found = [json.loads((folder / "state.json").read_text()) for folder in (one, two)]
    reports = [state["report"] for state in found]
    losses = [[entry["loss"] for entry in json.loads(report.get("history", "[]"))] for report in reports]
    assert losses[0] == losses[1]
    losses = [[entry["loss"] for entry in state["history"]] for state in found]
    assert losses[0] == losses[1]
    measured = [{name: value for name, value in report.items() if "/" in name} for report in reports]
    assert measured[0] == measured[1]


def equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor], where: str) -> None:
    assert one.keys() == two.keys()
    different = [name for name, tensor in one.items() if not torch.equal(tensor, two[name])]
    assert not different, f"{where}: {different}"


def goes_on(config: TrialConfig, prepared: Prepared, folder: Path) -> None:
    """From each of its checkpoints, the run comes to the next one as if it had not been interrupted, so to all others;
    and it ends as if there were no checkpoints but those of its epochs."""
    whole = run(config, prepared, folder / "whole")
    assert [path.name for path in whole[-3:]] == ["step-5-unmeasured", "step-6-unmeasured", "step-6"]
    for place, checkpoint in enumerate(whole[:-1], 1):
        (after,) = run(config, prepared, folder / str(place), checkpoint, reports=1)
        assert after.name == whole[place].name
        same(whole[place], after)
    base = copy.deepcopy(prepared.base)
    plain = folder / "plain"
    finetune(
        config,
        dataclasses.replace(prepared, base=base),
        torch.device("cpu"),
        None,
        plain,
        lambda metrics, written: None,
    )
    for step in ("step-2", "step-4", "step-6-unmeasured", "step-6"):
        same(plain / step, folder / "whole" / step)


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_points_go_on_from_every_checkpoint(
    family: str, started: tuple[TrialConfig, Prepared], tmp_path: Path, long_chaos: bool
) -> None:
    config, prepared = started[0], of_family(family, started[1])
    rng = np.random.default_rng(sorted(FAMILIES).index(family))
    for number in range(DRAWN_LONG if long_chaos else DRAWN):
        corner = {**IDLE[number], "trainable": "all"} if number < len(IDLE) else {}
        point = drawn(rng, prepared, corner)
        try:
            goes_on(config.model_copy(update={"point": point}), prepared, tmp_path / str(number))
        except Exception as error:
            raise AssertionError(f"{family}: {point}: {error}") from error


def test_a_point_that_trains_only_what_its_loss_leaves_out_is_refused(started: tuple[TrialConfig, Prepared]) -> None:
    text = Point(contrastive_weight=0.0, trainable="text")  # whose companion is the family's
    with pytest.raises(InputError, match="trainable: text, but at contrastive_weight 0 with companion anchor"):
        Trainee(of_family("clip", started[1]).base, text)
    Trainee(of_family("albef", started[1]).base, text)
