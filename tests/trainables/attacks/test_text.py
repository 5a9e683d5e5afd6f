"""Attacks on captions: the batched ones equal the plain ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trainables.attacks.substitutes import Substitutes, split_words
from trainables.attacks.text import CaptionEncoder, attack_words, away_from, encode_captions
from trainables.config import TrialConfig
from trainables.prepare import prepare


def plain_attack(model: object, words: list[str], options: list[list[str]], feature: torch.Tensor, budget: int) -> str:
    """The description in `attack_words`, one caption and one word at a time."""
    encode = lambda text: encode_captions(model, [text], 32, feature.device)[0]  # type: ignore[arg-type]  # noqa: E731
    clean = encode(" ".join(words))
    moved = {
        place: (encode(" ".join(words[:place] + words[place + 1 :])) - clean).square().sum().item()
        for place in range(len(words))
        if options[place]
    }
    current, best = list(words), (clean @ feature).item()
    for place in sorted(moved, key=lambda place: -moved[place]):
        if budget == 0:
            break
        tries = [(([*current[:place], o, *current[place + 1 :]]), o) for o in options[place]]
        fits = [((encode(" ".join(text)) @ feature).item(), text) for text, _ in tries]
        lowest, text = min(fits, key=lambda fit: fit[0])
        if lowest < best - 1e-7:
            current, best, budget = text, lowest, budget - 1
    return " ".join(current)


@pytest.mark.parametrize("words", [0, 1, 2])
def test_batched_text_attack_equals_the_plain_one(tiny_trial: TrialConfig, words: int) -> None:
    prepared = prepare(tiny_trial)
    model = prepared.base.eval()
    captions = list(range(0, 40, 3))
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(len(captions), 32, generator=generator), dim=-1)
    attack = lambda rows, f: attack_words(  # noqa: E731
        CaptionEncoder(model, 32, f.device),
        [prepared.train.words_of(row) for row in rows],
        [prepared.train.options_of(row) for row in rows],
        away_from(f),
        words=words,
    )
    together = attack(captions, features)
    for row, (caption, text) in enumerate(zip(captions, together, strict=True)):
        before = prepared.train.words_of(caption)
        assert sum(a != b for a, b in zip(before, text.split(), strict=True)) <= words
        assert text == attack([caption], features[row : row + 1])[0]
        assert text == plain_attack(model, before, prepared.train.options_of(caption), features[row], words)
    assert (together != [" ".join(prepared.train.words_of(c)) for c in captions]) == (words > 0)


def test_words_and_substitutes(tmp_path: object) -> None:
    assert split_words("A man, half-asleep/sad: it's 2!") == ["a", "man", "half", "asleep", "sad", "it's", "2"]
    words, options = [["a", "red", "cat"], [], ["dog"]], [[[], ["blue", "green"], ["cow"]], [], [["bird"]]]
    table = Substitutes.build(words, options)
    assert [table.words_of(i) for i in range(3)] == words
    assert [table.options_of(i) for i in range(3)] == options
    picked = table.take(np.array([2, 0]))
    assert [picked.words_of(0), picked.words_of(1)] == [words[2], words[0]]
    assert table.texts() == ["a red cat", "", "dog"]
    table.save(tmp_path / "s.npz")  # type: ignore[operator]
    assert Substitutes.load(tmp_path / "s.npz").options_of(0) == options[0]  # type: ignore[operator]
