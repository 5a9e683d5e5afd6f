"""The search of words against a slow one that spells every caption out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from attack_world import MAX_TOKENS, World
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.encoding import encode_captions
from trainables.attacks.rivals import SHARPNESS, Loss
from trainables.attacks.search import TextSearch, search_words
from trainables.attacks.text import BertAttack

CPU = torch.device("cpu")
LOSSES: tuple[Loss, ...] = ("cross", "margin", "cosine")


def changed(words: list[str], options: list[list[str]], count: int) -> Iterator[str]:
    """Every version of a caption with at most `count` words changed."""
    yield " ".join(words)
    for number in range(1, count + 1):
        for places in combinations([place for place, own in enumerate(options) if own], number):
            for chosen in product(*(options[place] for place in places)):
                version = list(words)
                for place, word in zip(places, chosen, strict=True):
                    version[place] = word
                yield " ".join(version)


def loss_of(features: Tensor, row: int, images: Tensor, own: Tensor, owner: Any, texts: list[str], loss: Loss) -> float:
    """The loss of one version of caption `row`, image by image in double precision; `texts` are the clean captions."""
    clean = encode(WORLD[0], [texts[row]])[0].double()
    right = {int(owner[other]) for other, text in enumerate(texts) if text == texts[row]}
    spread = float(np.std([float(clean @ image.double()) for image in images], ddof=1))
    wrong = [float(features.double() @ images[j].double()) for j in range(len(images)) if j not in right]
    held = [float(features.double() @ own.double())]
    if loss == "cosine":
        return -held[0]
    held += [float(features.double() @ images[j].double()) for j in right if j != owner[row]]
    if loss == "margin":
        return max(wrong) - max(held)
    sharp = SHARPNESS / spread
    return float(np.log(np.sum(np.exp(sharp * np.array(wrong))))) / sharp - max(held)


WORLD: list[World] = []


def encode(world: World, texts: list[str]) -> Tensor:
    return encode_captions(world.model, texts, MAX_TOKENS, CPU)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("candidates", [1, 10])
def test_one_word_is_the_best_of_all(world: World, loss: Loss, candidates: int) -> None:
    WORLD[:] = [world]
    victim, batch, table = world.victim, world.batch(), world.table()
    moved = F.normalize(victim.image_features + 0.3 * victim.image_features.roll(1, 0), dim=-1)  # not the clean ones
    found = TextSearch(words=1, candidates=candidates, loss=loss).captions(victim, batch, moved)
    for row, text in enumerate(found):
        versions = list(changed(table.words_of(row), table.options_of(row, candidates), 1))
        features = encode(world, versions)
        own = moved[world.owner[row]]
        values = [loss_of(one, row, victim.image_features, own, world.owner, world.texts, loss) for one in features]
        assert text in versions
        assert values[versions.index(text)] >= max(values) - 1e-6
    if candidates == 10:
        assert sum(text != clean for text, clean in zip(found, world.texts, strict=True)) >= 5


def test_equal_captions_are_no_rivals(world: World) -> None:
    """With the same caption in two images, leading from one to the other gains nothing."""
    WORLD[:] = [world]
    twins = World(
        world.model,
        world.masked_lm,
        world.tokenizer,
        world.pixels,
        [*world.captions[:8], world.captions[0]],
        world.owner,
    )
    victim, batch = twins.victim, twins.batch()
    features = victim.image_features
    found = TextSearch(loss="margin").captions(victim, batch, features)
    for row in (0, 8):
        versions = list(changed(twins.table().words_of(row), twins.table().options_of(row), 1))
        values = [
            loss_of(one, row, features, features[twins.owner[row]], twins.owner, twins.texts, "margin")
            for one in encode(twins, versions)
        ]
        assert values[versions.index(found[row])] >= max(values) - 1e-6


@given(words=st.integers(2, 3), seed=st.integers(0, 999), candidates=st.integers(1, 3))
@settings(max_examples=5, deadline=None)
def test_no_exchange_of_words_is_better(world: World, words: int, seed: int, candidates: int) -> None:
    """For several words: no single change of the result, and no word exchanged for another change, is better."""
    batch, table = world.batch(), world.table()
    images = F.normalize(torch.randn(len(world.texts), 32, generator=torch.Generator().manual_seed(seed)), dim=-1)

    def misfit(features: Tensor, rows: Tensor) -> Tensor:
        return -(features * images[rows]).sum(1)

    found, features = search_words(batch.encode, batch.candidates(count=candidates), misfit, words=words)
    torch.testing.assert_close(features, encode(world, list(found)), rtol=0, atol=1e-5)
    greedy, _ = search_words(batch.encode, batch.candidates(count=candidates), misfit, words=words, converge=False)
    for row, text in enumerate(found):
        clean, options, now = table.words_of(row), table.options_of(row, candidates), text.split()
        places = [place for place, word in enumerate(now) if word != clean[place]]
        assert len(places) <= words
        bases = [[*now[:place], clean[place], *now[place + 1 :]] for place in places] if len(places) == words else [now]
        others = [version for base in bases for version in changed(base, options, 1)]
        reached, greedily, *values = misfit(
            encode(world, [text, greedy[row], *others]), torch.full((2 + len(others),), row)
        ).tolist()
        assert reached >= max(values) - 1e-6
        assert reached >= greedily - 1e-6


@pytest.mark.parametrize("words", [1, 2])
def test_is_stronger_than_the_attack_that_takes_important_words_first(world: World, words: int) -> None:
    victim, batch = world.victim, world.batch()
    images = batch.clean_features(victim)[batch.owner]

    def cosines(captions: Any) -> Tensor:
        return (batch.encode(captions) * images).sum(1)

    ours = cosines(TextSearch(words=words, loss="cosine").run(victim, batch).captions)
    theirs = cosines(BertAttack(words=words).run(victim, batch).captions)
    assert (ours <= theirs + 1e-6).all()
    assert (ours < theirs - 1e-3).any()
