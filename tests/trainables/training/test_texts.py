"""A step's captions: drawn as numbers, augmented by EDA, the same for any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainables.attacks.lexicon import NONE, lexicon_of
from trainables.attacks.noise import sample_keys
from trainables.config import Point, TrialConfig
from trainables.prepare import prepare
from trainables.training.batches import draw_batch
from trainables.training.texts import draw_texts, eda

WORDS = np.array([[*range(10, 20)], [*range(20, 26), *[NONE] * 4], [NONE] * 10, [30, *[NONE] * 9]])
"""Captions of ten words, of six, of none and of one."""

OPTIONS = np.full((4, 10, 2), NONE)
OPTIONS[0, [1, 2, 3, 6, 8], 0] = [101, 102, 103, 106, 108]
OPTIONS[0, 2, 1] = 112


def augmented(row: int, draws: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """One caption under many keys, without what fills it up."""
    keys = sample_keys(0, 0, torch.arange(draws))
    words, options = eda(WORDS[[row] * draws], OPTIONS[[row] * draws], keys)
    assert words.shape == options.shape[:2]
    kept = [[word for word in own if word != NONE] for own in words.tolist()]
    assert all(
        own[len(text) :] == [NONE] * (len(own) - len(text)) for own, text in zip(words.tolist(), kept, strict=True)
    )
    return kept, [own[: len(text)] for own, text in zip(options.tolist(), kept, strict=True)]


def test_eda_changes_little_and_keeps_words_and_options_together() -> None:
    known = dict(zip(WORDS[0].tolist(), OPTIONS[0].tolist(), strict=True))
    kinds, put = [], set()
    for text, ways in zip(*augmented(0, 400), strict=True):
        assert abs(len(text) - 10) <= 1
        kinds.append((len(text) - 10, sorted(text) == sorted(known)))
        new = [word for word in text if word not in known]
        put.update(new)
        assert len(new) <= 1
        for word, found in zip(text, ways, strict=True):
            assert found == known[word] if word in known else found in ([NONE, NONE], *OPTIONS[0].tolist())
        moved = sum(a != b for a, b in zip(text, known, strict=False)) if kinds[-1] == (0, True) else 2
        assert moved == 2, "two words change places"
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert counts.keys() == {(0, False), (1, False), (0, True), (-1, False)}, "all four operations happen"
    assert min(counts.values()) > 70, "equally often"
    assert put == {101, 102, 103, 106, 108, 112}


def test_a_tenth_of_the_words_is_replaced_rounded_down_and_none_twice() -> None:
    words = np.arange(100, 139)[None].repeat(200, 0)
    replaced, _ = eda(words, words[..., None] + 1000, sample_keys(0, 0, torch.arange(200)))
    as_long = replaced[((replaced != NONE) == (np.arange(replaced.shape[1]) < 39)).all(1)]
    changes = [changed for changed in (as_long >= 1000).sum(1).tolist() if changed]  # others change places
    assert len(changes) > 20
    assert set(changes) == {3}


@pytest.mark.parametrize("row", [1, 2, 3])
def test_eda_leaves_what_it_cannot_change(row: int) -> None:
    """Without substitutes words only move or go; of one word none goes."""
    texts, _ = augmented(row, 60)
    own = [word for word in WORDS[row].tolist() if word != NONE]
    assert all(set(text) <= set(own) and len(own) - len(text) in (0, 1) for text in texts)
    assert (len({tuple(text) for text in texts}) > 1) == (len(own) > 1)


def test_edas_randomness_belongs_to_the_caption() -> None:
    keys = sample_keys(0, 1, torch.arange(4))
    words, options = eda(WORDS, OPTIONS, keys)
    for row in range(4):
        alone, ways = eda(WORDS[[row]], OPTIONS[[row]], keys[[row]])
        np.testing.assert_array_equal(alone[0], words[row, : alone.shape[1]])
        np.testing.assert_array_equal(ways[0], options[row, : alone.shape[1]])
    assert (eda(WORDS[[0] * 9], OPTIONS[[0] * 9], sample_keys(0, 2, torch.arange(9)))[0] != WORDS[0][:1]).any()


@pytest.mark.parametrize("augmentation", ["none", "eda"])
def test_workers_share_a_batchs_captions(tiny_trial: TrialConfig, augmentation: str) -> None:
    point = Point(words=1, captions_per_image=2, text_augmentation=augmentation)
    config = tiny_trial.model_copy(update={"point": point})
    prepared = prepare(tiny_trial)
    lexicon = lexicon_of(prepared.base.tokenizer)
    drawn = draw_batch(config, prepared.dataset.train, 3)
    alone = draw_texts(config, prepared.train, lexicon, [drawn], 0)
    both = [
        draw_texts(config, prepared.train, lexicon, [drawn.share(0, 2), drawn.share(1, 2)], rank) for rank in (0, 1)
    ]
    assert {part.longest for part in both} == {alone.longest}

    def texts(part: object) -> list[str]:
        return lexicon.texts(part.candidates.words[part.back])

    assert texts(both[0]) + texts(both[1]) == texts(alone)
    clean = [" ".join(prepared.train.words_of(row)) for row in drawn.captions.flat]
    assert (texts(alone) == clean) == (augmentation == "none")
    counts = lexicon.counts(alone.candidates.words, 77)
    assert counts.tolist() == sorted(counts.tolist()) == alone.candidates.lengths.tolist()
    assert torch.equal(alone.order[alone.back], torch.arange(len(counts)))
