"""A plan that is calibrated on the machine at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console

from study import plan
from study.arguments import parse
from study.costs import calibration
from study.costs.calibration import Calibration, calibrate
from study.costs.cost_model import DEVICES, needs_original
from study.costs.shapes import architecture_of, shape_of
from trainables import measure
from trainables.config import ModelConfig, Point, TinyConfig
from trainables.errors import InputError
from trainables.synthetic import made_up_words, random_model, tokenizer_of
from trainables.training.objective import Trainee

SMALL = ("--data.image-pixels", "16", "--trial.training.batch-size", "4", "--trial.model.tiny.width", "32")


def test_phases_are_corrected_by_what_was_measured() -> None:
    found = Calibration(
        flops=1, bandwidth=1, batch_size=2, planned={"attack": 1, "evaluate": 2}, measured={"attack": 3, "evaluate": 1}
    )
    planned = {"load": 10.0, "attack": 10.0, "train": 10.0, "evaluate": 10.0}
    assert found.corrected(planned) == {"load": 5.0, "attack": 30.0, "train": 10.0, "evaluate": 5.0}


@pytest.mark.parametrize(
    ("seconds", "fits", "batches"),
    [(1e9, 64, [2, 2, 4, 8, 16, 32]), (1e9, 8, [2, 2, 4, 8, 16]), (0.0, 64, [2, 2])],
)
def test_a_batch_grows_as_time_and_memory_allow(
    monkeypatch: pytest.MonkeyPatch, seconds: float, fits: int, batches: list[int]
) -> None:
    tried: list[int] = []

    def short_trial(*given: Any) -> tuple[dict[str, float], dict[str, float]]:
        tried.append(given[-1])
        if given[-1] > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"train": 1.0}, {"train": 2.0}

    monkeypatch.setattr(calibration, "_short_trial", short_trial)
    monkeypatch.setattr(measure, "matmul_flops", lambda device: 1.0)
    monkeypatch.setattr(measure, "memory_bandwidth", lambda device: 1.0)
    config = parse(["--trial.training.batch-size", "64", "--trial.workers.count", "2"])
    found = calibrate(config, shape_of(config), DEVICES["cpu"], on_gpu=False, seconds=seconds)
    assert tried == batches
    assert found.batch_size == min(batches[-1], fits)


def test_the_plan_shows_the_data_sheet_beside_the_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SMALL, "--device", "cpu", "--measure"]
    assert plan.main([*flags, "--as-json"]) == 0
    found = plan.Plan.model_validate_json(capsys.readouterr().out)
    assert found.measured is not None
    assert 1e9 < found.measured.flops < 1e13
    for phase, planned in found.measured.planned.items():
        ratio = found.measured.measured[phase] / planned
        assert found.phase_seconds[phase] == pytest.approx(ratio * found.sheet_seconds[phase])
    assert set(found.measured.planned) == {"attack", "train", "evaluate"}
    Console().print(plan.page(found, shape_of(parse(list(SMALL)))))
    assert "A short trial here, steps of 4 pairs" in capsys.readouterr().out


def test_a_gpu_that_is_not_here_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = parse([])
    with pytest.raises(InputError, match="--measure: this machine has no GPU"):
        calibrate(config, shape_of(config), DEVICES["h100"], on_gpu=True)


@pytest.mark.parametrize("family", ["clip", "siglip", "albef", "blip"])
def test_a_random_model_has_the_architecture(family: str) -> None:
    words = made_up_words(50)
    image, text = (TinyConfig(width=width, layers=2, heads=2, patch_pixels=8) for width in (32, 64))
    model = random_model(family, image, text, 16, 16, tokenizer_of(words), torch.device("cpu"))
    parts = model.image_parameters(), model.text_parameters()
    assert [max(p.shape[0] for p in part if p.ndim == 1) for part in parts] == [4 * 32, 4 * 64]


@pytest.mark.parametrize("family", ["clip", "albef"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"contrastive_weight": 0.5},
        {"contrastive_weight": 0.5, "companion": "anchor"},
        {"contrastive_weight": 0.5, "companion": "consistency"},
        {"attack_objective": "deviation"},
    ],
)
def test_embeddings_of_the_original_are_planned_where_training_asks_for_them(family: str, fields: Any) -> None:
    tiny, point = TinyConfig(width=16, layers=2, heads=2, patch_pixels=8), Point(**fields)
    model = random_model(family, tiny, tiny, 16, 16, tokenizer_of(["bababa"]), torch.device("cpu"))
    assert needs_original(point, family == "albef") == Trainee(model, point).needs_original


def test_published_architectures_are_those_that_plans_count() -> None:
    family, image, text = architecture_of(ModelConfig(base="openai/clip-vit-large-patch14"))
    assert (family, image.width, image.layers, image.heads, image.patch_pixels) == ("clip", 1024, 24, 16, 14)
    assert (text.width, text.layers, text.heads) == (768, 12, 12)
    assert architecture_of(ModelConfig(family="albef", base="ALBEF.pth"))[0] == "albef"
    assert architecture_of(ModelConfig(base="Salesforce/blip-itm-base-coco"))[0] == "blip"
    with pytest.raises(InputError, match="is not known here"):
        architecture_of(ModelConfig(base="someone/else"))
