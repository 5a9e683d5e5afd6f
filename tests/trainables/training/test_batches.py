"""What a step trains on is a function of seed, epoch and sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from trainables.attacks.noise import sample_keys
from trainables.config import Point, TrialConfig
from trainables.prepare import prepare
from trainables.training.batches import (
    draw_batch,
    epoch_shape,
    ramped_distillation,
    ramped_epsilon,
    random_crops,
    rate_factor,
)


def with_point(config: TrialConfig, **fields: Any) -> TrialConfig:
    return config.model_copy(update={"point": Point(**fields)})


@pytest.mark.parametrize("each", [1, 3])
def test_batches_cover_an_epoch_and_depend_on_seed_and_step_only(tiny_trial: TrialConfig, each: int) -> None:
    config = with_point(tiny_trial, captions_per_image=each)
    train = prepare(tiny_trial).dataset.train
    size, steps = epoch_shape(config, 64)
    drawn = [draw_batch(config, train, step) for step in range(steps)]
    assert sorted(np.concatenate([batch.images for batch in drawn])) == list(range(64))
    assert size * steps == 64
    for batch in drawn:
        np.testing.assert_array_equal(train.caption_image[batch.captions], np.tile(batch.images[:, None], each))
        assert all(len(set(own)) == each for own in batch.captions.tolist())
        halves = [batch.share(rank, 2) for rank in range(2)]
        np.testing.assert_array_equal(np.concatenate([half.captions for half in halves]), batch.captions)
    np.testing.assert_array_equal(draw_batch(config, train, 5).captions, drawn[5].captions)
    assert (draw_batch(config, train, 5 + steps).captions != drawn[5].captions).any(), "an epoch is not the next one"
    assert (draw_batch(config.model_copy(update={"seed": 1}), train, 5).images != drawn[5].images).any()


@pytest.mark.parametrize("each", [1, 2])
def test_an_images_captions_do_not_depend_on_the_batch(tiny_trial: TrialConfig, each: int) -> None:
    train, found = prepare(tiny_trial).dataset.train, []
    for size in (4, 16):
        training = tiny_trial.training.model_copy(update={"batch_size": size})
        config = with_point(tiny_trial, captions_per_image=each).model_copy(update={"training": training})
        drawn = [draw_batch(config, train, step) for step in range(64 // size)]
        found.append(
            {row: own.tolist() for batch in drawn for row, own in zip(batch.images, batch.captions, strict=True)}
        )
    assert found[0] == found[1]
    counts = np.bincount([own[0] - np.searchsorted(train.caption_image, row) for row, own in found[0].items()])
    assert len(counts) == np.bincount(train.caption_image).max(), "every place is drawn"
    assert counts.min() > 3


def test_learning_rate_rises_then_falls() -> None:
    factors = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:11] == sorted(factors[:11])
    assert factors[11:] == sorted(factors[11:], reverse=True)
    assert max(factors) == pytest.approx(1, abs=0.01)
    assert factors[-1] < 0.001


def test_radius_waits_then_rises_then_stays(tiny_trial: TrialConfig) -> None:
    ramp = {"epsilon": 0.08, "attack_steps": 1, "epsilon_start": 0.02, "ramp_begin": 0.25, "ramp_end": 0.75}
    radii = [ramped_epsilon(with_point(tiny_trial, **ramp), step, 8) for step in range(8)]
    assert radii == pytest.approx([0.02, 0.02, 0.02, 0.035, 0.05, 0.065, 0.08, 0.08])
    constant = with_point(tiny_trial, epsilon=0.08, attack_steps=1)
    assert {ramped_epsilon(constant, step, 8) for step in range(8)} == {0.08}
    assert ramped_epsilon(with_point(tiny_trial), 3, 8) == 0
    sudden = with_point(tiny_trial, **{**ramp, "ramp_begin": 0.5, "ramp_end": 0.5})
    assert [ramped_epsilon(sudden, step, 4) for step in range(4)] == [0.02, 0.02, 0.08, 0.08]


def test_the_teachers_share_rises_in_the_first_epoch(tiny_trial: TrialConfig) -> None:
    config = with_point(tiny_trial, distillation=0.4)
    assert config.training.epochs == 2
    shares = [ramped_distillation(config, step, 8) for step in range(8)]
    assert shares == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4])


def test_crops_belong_to_the_sample_and_keep_half_of_it() -> None:
    ramp = torch.linspace(0, 1, 32).expand(6, 3, 32, 32)
    keys = sample_keys(0, 3, torch.arange(6))
    crops = random_crops(ramp, keys)
    torch.testing.assert_close(random_crops(ramp[2:4], keys[2:4]), crops[2:4])
    assert not torch.equal(crops[0], crops[1])
    spans = crops[:, 0, 16, -1] - crops[:, 0, 16, 0]
    assert (spans.abs() > 0.6).all(), "a side of at least the root of half the area is seen"
    assert (spans > 0).any()
    assert (spans < 0).any(), "some are mirrored"
