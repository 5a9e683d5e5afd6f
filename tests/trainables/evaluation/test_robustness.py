"""What is scored obeys the threat model, and does not depend on batches or scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainables.attacks.threat_model import ThreatModelError, check_captions, check_images
from trainables.config import TrialConfig
from trainables.evaluation.retrieval import Ranks
from trainables.evaluation.robustness import evaluate
from trainables.models.clip import Clip
from trainables.prepare import prepare


def test_threat_model_is_checked() -> None:
    pixels = torch.full((1, 3, 4, 4), 0.5)
    check_images(pixels, pixels + 0.01, 0.0101)
    with pytest.raises(ThreatModelError, match="more than epsilon"):
        check_images(pixels, pixels + 0.02, 0.01)
    with pytest.raises(ThreatModelError, match="outside"):
        check_images(pixels, pixels + 0.6, 0.7)
    with pytest.raises(ThreatModelError):
        check_images(pixels, pixels * float("nan"), 0.01)
    with pytest.raises(ThreatModelError, match="2 words"):
        check_captions(["a red cat"], ["a blue dog"], 1)


def test_evaluation_ignores_batching_and_the_scale_of_embeddings(tiny_trial: TrialConfig) -> None:
    prepared = prepare(tiny_trial)

    def run(batch: int) -> dict[str, Ranks]:
        protocol = tiny_trial.protocol.model_copy(update={"batch_images": batch})
        return evaluate(prepared.base, prepared.gallery, protocol, max_tokens=32, device=torch.device("cpu")).ranks

    prepared.base.train()
    frozen = next(prepared.base.parameters()).requires_grad_(False)
    whole = run(50)
    assert prepared.base.training
    assert not frozen.requires_grad
    few = run(5)
    with torch.no_grad():
        assert isinstance(prepared.base, Clip)
        prepared.base.clip.visual_projection.weight *= 1000
    scaled = run(50)
    for target in whole:
        np.testing.assert_array_equal(whole[target].tr, few[target].tr)
        np.testing.assert_array_equal(whole[target].ir, scaled[target].ir)
