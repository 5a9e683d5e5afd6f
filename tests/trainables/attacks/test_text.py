"""Attacks on captions: the batched ones equal the plain ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from attack_world import World
from rapidfuzz.distance import Levenshtein
from torch.nn import functional as F

from benchmarks.published.attacks import Pairs, guided_captions, unguided_captions
from benchmarks.published.words import masked_lm_candidates
from trainables.attacks.characters import ALPHABET, ROUNDING, CharacterAttack
from trainables.attacks.noise import step_keys, uniform
from trainables.attacks.proposals import masked_lm_substitutes
from trainables.attacks.quirks import SUBSTITUTE_QUIRKS, TEXT_QUIRKS, Quirk, Quirks
from trainables.attacks.substitutes import STOP_WORDS, Substitutes
from trainables.attacks.text import BertAttack

NONE: Quirks = frozenset()
MODES = {"correct": NONE, "compat": TEXT_QUIRKS, **{quirk: frozenset({quirk}) for quirk in sorted(TEXT_QUIRKS)}}


def seen(text: str, quirks: Quirks) -> str:
    """What the attack sees of a caption."""
    return " ".join(text.split()[: 30 if "first_30_words" in quirks else None])


@pytest.mark.parametrize("mode", MODES)
def test_substitutes_equal_the_plain_ones(world: World, mode: str) -> None:
    table, reading = world.table(MODES[mode]), world.reading(MODES[mode])
    for row, text in enumerate(world.texts):
        expected = masked_lm_candidates(reading, seen(text, MODES[mode]))
        assert table.words_of(row) == text.split()
        assert table.options_of(row) == expected + [[]] * (len(text.split()) - len(expected))


@pytest.mark.parametrize("quirk", sorted(SUBSTITUTE_QUIRKS))
def test_every_quirk_of_the_substitutes_shows(world: World, quirk: Quirk) -> None:
    def options(quirks: Quirks) -> list[list[list[str]]]:
        return [world.table(quirks).options_of(row) for row in range(len(world.texts))]

    assert options(NONE) != options(frozenset({quirk})) or options(TEXT_QUIRKS) != options(TEXT_QUIRKS - {quirk})


def test_logits_beyond_the_tokenizer_are_not_seen(world: World) -> None:
    padded = copy.deepcopy(world.masked_lm)
    padded.resize_token_embeddings(len(world.tokenizer) + 3)
    with torch.no_grad():
        padded.get_output_embeddings().bias[-3:] = 100
    found = masked_lm_substitutes(world.texts, padded, world.tokenizer)
    assert [found.options_of(row) for row in range(len(world.captions))] == [
        world.table().options_of(row) for row in range(len(world.captions))
    ]


def test_fewer_candidates_are_the_best_of_them(world: World) -> None:
    for quirks in (NONE, SUBSTITUTE_QUIRKS):
        table, reading = world.table(quirks), world.reading(quirks, candidates=4)
        for row, text in enumerate(world.texts):
            expected = masked_lm_candidates(reading, seen(text, quirks))
            assert table.options_of(row, 4)[: len(expected)] == expected


def test_correct_substitutes_are_whole_new_words(world: World) -> None:
    table = world.table()
    for row in range(len(world.texts)):
        for word, found in zip(table.words_of(row), table.options_of(row), strict=True):
            assert len(found) == (0 if word in STOP_WORDS else 10)
            assert all(option.isalpha() and option != word and option not in STOP_WORDS for option in found)


@pytest.mark.parametrize(
    ("mode", "objective", "words"),
    [
        *product(("correct", "compat"), ("cross", "deviation"), (1, 2)),
        *((quirk, "cross", 1) for quirk in sorted(TEXT_QUIRKS)),
    ],
)
def test_bert_attack_equals_the_plain_one(
    world: World, mode: str, objective: Literal["cross", "deviation"], words: int
) -> None:
    batch, victim = world.batch(), world.victim
    attacked = BertAttack(words=words, objective=objective, quirks=MODES[mode]).run(victim, batch)
    captions, reading = [seen(text, MODES[mode]) for text in world.texts], world.reading(MODES[mode])
    if objective == "cross":
        pairs, guides = Pairs(batch.pixels, captions, world.owner.tolist()), [(1.0, batch.clean_features(victim))]
        expected = guided_captions(world.plain_victim, reading, pairs, guides, words)
    else:
        expected = unguided_captions(world.plain_victim, reading, captions, words)
    rests = [text.split()[len(own.split()) :] for text, own in zip(world.texts, captions, strict=True)]
    assert attacked.captions == [" ".join([own, *rest]) for own, rest in zip(expected, rests, strict=True)]
    for before, after in zip(world.texts, attacked.captions, strict=True):
        assert sum(a != b for a, b in zip(before.split(), after.split(), strict=True)) <= words
    assert torch.equal(attacked.pixels, batch.pixels)


@pytest.mark.parametrize("quirk", sorted(TEXT_QUIRKS))
def test_every_text_quirk_changes_a_caption(world: World, quirk: Quirk) -> None:
    """Otherwise the comparisons above would compare nothing."""

    def run(quirks: Quirks) -> list[str]:
        return BertAttack(words=2, quirks=quirks).run(world.victim, world.batch()).captions

    assert run(NONE) != run(frozenset({quirk})) or run(TEXT_QUIRKS - {quirk}) != run(TEXT_QUIRKS)


def test_no_words_no_change(world: World) -> None:
    assert BertAttack(words=0).run(world.victim, world.batch()).captions == world.texts


def first_highest(options: list[Any], value_of: Callable[[Any], float]) -> Any:
    """Of options that differ by rounding only, the first."""
    best, reached = None, -float("inf")
    for option in options:
        value = value_of(option)
        if value > reached + ROUNDING:
            best, reached = option, value
    return best


def plain_characters(world: World, attack: CharacterAttack, row: int) -> str:
    """`CharacterAttack` as described, on one caption, one encoding at a time."""
    batch = world.batch()
    image = batch.clean_features(world.victim)[batch.owner[row]]
    victim = world.plain_victim

    def loss(text: str) -> float:
        return -(victim.texts([text])[0] @ image).item()

    current = world.texts[row]

    def edited(spot: int, character: str) -> str:
        """Even spots stand before character spot / 2, odd ones are that character."""
        if spot % 2 == 0:
            return current[: spot // 2] + character + current[spot // 2 :]
        return current[: spot // 2] + character + current[spot // 2 + 1 :]

    for step in range(attack.characters):
        draws = uniform(
            step_keys(batch.caption_keys[row : row + 1], step), (2, max(attack.positions, attack.replacements))
        )
        spots = sorted({int(d * (2 * len(current) + 1)) for d in draws[0, 0, : attack.positions].tolist()})
        place = first_highest(spots, lambda spot: loss(edited(spot, " ")))
        tried = ["", *(ALPHABET[int(d * len(ALPHABET))] for d in draws[0, 1, : attack.replacements].tolist())]
        best = first_highest(tried, lambda character, place=place: loss(edited(place, character)))
        if loss(edited(place, best)) > loss(current) + ROUNDING:
            current = edited(place, best)
    return current


@pytest.mark.parametrize("characters", [1, 2])
def test_character_attack_equals_the_plain_one(world: World, characters: int) -> None:
    attack = CharacterAttack(characters=characters, positions=8, replacements=6)
    attacked = attack.run(world.victim, world.batch()).captions
    assert attacked == [plain_characters(world, attack, row) for row in range(len(world.texts))]
    distances = [Levenshtein.distance(a, b) for a, b in zip(world.texts, attacked, strict=True)]
    assert max(distances) == characters


def test_words_that_do_not_help_are_left(world: World) -> None:
    """The clean word is among the choices, so no caption gets closer to its image."""
    batch, victim = world.batch(), world.victim
    features = F.normalize(batch.clean_features(victim), dim=-1)
    reached = BertAttack(words=2).captions(batch, features)

    def score(captions: list[str]) -> torch.Tensor:
        return (batch.encode(captions) * features[batch.owner]).sum(1)

    assert (score(reached) <= score(world.texts)).all()


def test_words_and_substitutes(tmp_path: Path) -> None:
    words, options = [["a", "red", "cat"], [], ["dog"]], [[[], ["blue", "green"], ["cow"]], [], [["bird"]]]
    table = Substitutes.build(words, options)
    assert [table.words_of(i) for i in range(3)] == words
    assert [table.options_of(i) for i in range(3)] == options
    picked = table.take(np.array([2, 0]))
    assert [picked.words_of(0), picked.words_of(1)] == [words[2], words[0]]
    assert table.texts() == ["a red cat", "", "dog"]
    table.save(tmp_path / "table")
    again = Substitutes.load(tmp_path / "table")
    assert again is not None
    assert again.options_of(0) == options[0]


def test_a_rank_without_a_substitute_is_left_empty() -> None:
    table = Substitutes.build([["cat"]], [[["cow", "", "dog"]]])
    assert table.options_of(0, 2) == [["cow"]]
    assert table.options_of(0, 3) == [["cow", "dog"]]
