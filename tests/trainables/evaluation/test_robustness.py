"""What is scored obeys the threat model, and does not depend on batches or scales."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainables.attacks.contract import Attacked, Victim
from trainables.attacks.image import Pgd
from trainables.attacks.lexicon import Captions
from trainables.attacks.text import BertAttack
from trainables.attacks.threat_model import ThreatModelError, check_captions, check_images, eight_bit
from trainables.config import TrialConfig
from trainables.evaluation.parts import Made
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


@pytest.mark.parametrize("rounded", [True, False])
def test_attacked_pixels_are_kept_as_they_are_scored(tiny_trial: TrialConfig, tmp_path: Path, rounded: bool) -> None:
    prepared = prepare(tiny_trial)
    gallery = prepared.gallery.first(4)
    captions = gallery.captions(prepared.base)
    made = Made.empty(tmp_path, "image", gallery.pixels, captions, Pgd(), rounded)
    assert made.pixels.dtype == (np.uint8 if rounded else np.float32)
    clean = torch.tensor(gallery.pixels) / 255
    pixels = (clean + torch.rand(clean.shape) * 8 / 255).clamp(0, 1)
    if rounded:
        pixels = eight_bit(clean, pixels, 8 / 255)
    rows = np.arange(len(gallery.caption_image))
    made.add(np.arange(4), rows, Attacked(pixels, [f"caption {row}" for row in rows]))
    assert torch.equal(torch.from_numpy(np.array(made.pixels)) / (255 if rounded else 1), pixels)
    assert made.everyones(rows) == [f"caption {row}" for row in rows]
    words = Made.empty(tmp_path, "text", gallery.pixels, captions, BertAttack(), rounded)
    assert words.pixels is gallery.pixels
    some = captions.take(rows[3:5])
    words.add(np.array([1]), rows[5:7], Attacked(clean, Captions(some.rows, some.lexicon)))
    found = list(words.everyones(rows))
    assert found[5:7] == gallery.texts[3:5] != gallery.texts[5:7]
    assert found[:5] + found[7:] == gallery.texts[:5] + gallery.texts[7:]


def test_an_image_has_the_same_key_from_its_levels_as_from_its_pixels(tiny_trial: TrialConfig) -> None:
    prepared = prepare(tiny_trial)
    texts = torch.zeros(len(prepared.gallery.texts), 32)
    owners, groups = (
        torch.from_numpy(part) for part in (prepared.gallery.caption_image, prepared.gallery.caption_groups)
    )
    victim = Victim(prepared.base, 32, texts, torch.zeros(12, 32), owners, groups)
    batch = prepared.gallery.batch(victim, np.array([1, 4, 5]), seed=3)
    assert batch.levels is not None
    assert len(set(batch.keys.tolist())) == 3
    assert torch.equal(batch.keys, replace(batch, levels=None).keys)
