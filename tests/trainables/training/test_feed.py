"""Batches come as they were drawn, whoever copies them."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from trainables.attacks.noise import sample_keys
from trainables.config import Point, TrialConfig
from trainables.prepare import Prepared, prepare
from trainables.training.batches import draw_batch
from trainables.training.feed import AHEAD, Feed, ahead

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tiny_trial: TrialConfig) -> tuple[TrialConfig, Prepared]:
    config = tiny_trial.model_copy(update={"point": Point(captions_per_image=2)})
    return config, prepare(config)


def test_a_batch_is_what_was_drawn(world: tuple[TrialConfig, Prepared]) -> None:
    config, prepared = world
    train, groups = prepared.dataset.train, prepared.caption_groups
    for step, batch in enumerate(Feed(config, prepared, CPU).batches(6, 10), 6):
        drawn = draw_batch(config, train, step)
        np.testing.assert_array_equal(batch.images, drawn.images)
        np.testing.assert_array_equal((batch.pixels * 255).round(), train.pixels[drawn.images])
        expected = [
            [groups[caption] in groups[train.caption_image == image] for caption in drawn.captions.flat]
            for image in drawn.images
        ]
        np.testing.assert_array_equal(batch.positives[0], expected)
        np.testing.assert_array_equal(batch.positives[1], np.transpose(expected))
        epoch = drawn.epoch
        assert torch.equal(batch.keys, sample_keys(0, epoch, torch.from_numpy(train.image_ids[drawn.images])))
        assert torch.equal(batch.caption_keys, sample_keys(0, epoch, torch.from_numpy(drawn.captions.flatten())))


def test_a_thread_is_a_little_ahead_and_keeps_the_order() -> None:
    begun: list[int] = []
    reached = threading.Event()

    def make(step: int) -> int:
        begun.append(step)
        if step == 3 + AHEAD:
            reached.set()
        return step * step

    made = ahead(make, range(3, 9))
    assert next(made) == 9
    assert reached.wait(10), "it goes on while nobody asks"
    assert begun == list(range(3, 4 + AHEAD)), "and no further"
    assert list(made) == [16, 25, 36, 49, 64]


def test_what_fails_ahead_is_raised_at_its_step_and_the_thread_ends() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise OSError("the cache is gone")
        return step

    made = ahead(make, range(6))
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(OSError, match="the cache is gone"):
        next(made)
    for step in (made := ahead(lambda step: step, range(100))):
        if step == 1:
            break
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]
