"""Planted gradient masking is found, in the loss and in the model; an honest model passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainables.config import TrialConfig
from trainables.evaluation.audit import audit
from trainables.evaluation.robustness import evaluate
from trainables.models.clip import Clip
from trainables.prepare import Prepared, prepare
from trainables.results import Audit

CPU = torch.device("cpu")


class Staircase(Clip):
    """Rounds its pixels to few levels: what it computes is as good, but no gradient comes back through it."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        return super().encode_image((pixels * 16).round() / 16)


@pytest.fixture(scope="module")
def prepared(tiny_trial: TrialConfig) -> Prepared:
    pretrain = tiny_trial.model.pretrain.model_copy(update={"epochs": 40})
    model = tiny_trial.model.model_copy(update={"pretrain": pretrain})
    return prepare(tiny_trial.model_copy(update={"model": model}))


def audited(prepared: Prepared, trial: TrialConfig, temperature: float | None) -> Audit:
    return audit(prepared.base, prepared.gallery, trial.protocol, temperature=temperature, max_tokens=32, device=CPU)


def failed(result: Audit) -> set[tuple[str, str]]:
    return {(check.name, check.loss) for check in result.checks if not check.passed}


def test_an_honest_model_passes(prepared: Prepared, tiny_trial: TrialConfig) -> None:
    result = audited(prepared, tiny_trial, 0.05)
    assert failed(result) == set()
    assert result.verdict == "honest"
    radii = result.checks[0].evidence
    assert radii["0 epsilon"] > radii["4 epsilon"], "the model must have something to lose"


def test_a_temperature_that_hides_the_gradient_is_found_and_gains_nothing(
    prepared: Prepared, tiny_trial: TrialConfig
) -> None:
    result = audited(prepared, tiny_trial, 1e-6)
    assert result.verdict == "masked"
    assert ("gradients are there", "own") in failed(result)
    assert result.reliable, "the protocol's loss has no temperature to be fooled by"
    honest = audited(prepared, tiny_trial, 0.05)
    own = [c for c in result.checks if c.loss == "protocol"]
    assert own == [c for c in honest.checks if c.loss == "protocol"]


def test_a_model_without_gradients_is_not_reliable(prepared: Prepared, tiny_trial: TrialConfig) -> None:
    base = prepared.base
    assert isinstance(base, Clip)
    planted = Staircase(base.clip, base.tokenizer)
    result = audit(planted, prepared.gallery, tiny_trial.protocol, temperature=None, max_tokens=32, device=CPU)
    assert result.verdict == "masked"
    assert not result.reliable
    assert ("gradients are there", "protocol") in failed(result)


def test_eight_bit_images_are_on_the_levels_and_in_the_ball(prepared: Prepared, tiny_trial: TrialConfig) -> None:
    protocol = tiny_trial.protocol.model_copy(update={"epsilon": 2.4 / 255})
    seen = []
    evaluate(
        prepared.base,
        prepared.gallery,
        protocol,
        max_tokens=32,
        device=CPU,
        observe=lambda name, images, attacked: seen.append((name, images, attacked.pixels)),
    )
    moved = 0.0
    for name, images, pixels in seen:
        levels = pixels * 255
        assert (levels - levels.round()).abs().max() < 1e-3
        clean = torch.from_numpy(prepared.gallery.pixels[images]) / 255
        distance = (pixels - clean).abs().max().item()
        assert distance <= 2 / 255 + 1e-6
        moved = max(moved, distance if name == "image" else 0.0)
    assert moved == pytest.approx(2 / 255, abs=1e-6)
