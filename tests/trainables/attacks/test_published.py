"""What the published code does where papers are silent or say otherwise, one row a test.

The attacks as a whole are held against it in `test_text` and `test_multimodal`, quirk by quirk.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_world import MAX_TOKENS, World
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from benchmarks.published import words as peers
from benchmarks.published.images import mixture_weights, random_start
from trainables.attacks import image
from trainables.attacks.co_attack import CoAttack
from trainables.attacks.contract import Attacked
from trainables.attacks.noise import uniform
from trainables.attacks.proposals import masked_lm_substitutes
from trainables.attacks.quirks import TEXT_QUIRKS, Quirks
from trainables.attacks.sga import Dra, Sga, mixture_table
from trainables.attacks.substitutes import STOP_WORDS
from trainables.attacks.text import BertAttack, divergence_from, embedding_divergence
from trainables.captions import albef_text


@pytest.fixture(scope="module")
def coco(real_data: Path) -> list[str]:
    entries = json.loads((real_data / "coco_karpathy_test_captions.json").read_text())
    return [caption for entry in entries for caption in entry["caption"]]


def test_the_stop_list_is_the_published_one(coco: list[str]) -> None:
    """Its 292 entries leave the published share of COCO's words."""
    assert STOP_WORDS == peers.STOP_WORDS
    assert len(STOP_WORDS) == 292
    words = [word for caption in coco for word in albef_text(caption).split()]
    stopped = sum(word in STOP_WORDS for word in words)
    assert stopped / len(words) == pytest.approx(0.458, abs=5e-4)
    assert (len(words) - stopped) / len(coco) == pytest.approx(5.65, abs=5e-3)


def test_captions_are_cleaned_as_published(coco: list[str]) -> None:
    assert [albef_text(caption) for caption in coco] == list(map(peers.clean, coco))


@given(
    st.text(alphabet="aZé'’,.-/!?\"()*#:;~ 3&", min_size=1, max_size=60).filter(lambda text: peers.clean(text) != "")
)
def test_odd_captions_are_cleaned_as_published(caption: str) -> None:
    assert albef_text(caption) == peers.clean(caption)


def fixed_language_model(favourites: list[str]) -> tuple[BertForMaskedLM, BertTokenizer]:
    """It expects the same entries everywhere, in this order."""
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *favourites, "dog", "runs", "the"]
    tokenizer = BertTokenizer(vocab={entry: place for place, entry in enumerate(entries)})
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(vocab_size=len(entries), max_position_embeddings=16, **sizes)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        model.cls.predictions.bias.copy_(-torch.arange(len(entries)).float() + 50)
        model.cls.predictions.bias[:5] = -50
    return model, tokenizer


def test_marks_of_the_stop_list_are_never_put() -> None:
    """The published code has them for words; only those in its list are blocked."""
    model, tokenizer = fixed_language_model([".", ",", "!", "cat", "-", "'", "2", "some", "sits"])
    found = masked_lm_substitutes(["the dog runs"], model, tokenizer, TEXT_QUIRKS)
    assert found.options_of(0) == [[], ["cat", "'", "2", "sits"], ["cat", "'", "2", "sits", "dog"]]
    assert masked_lm_substitutes(["the dog runs"], model, tokenizer).options_of(0)[1] == ["cat", "sits", "runs"]


@pytest.mark.parametrize(("quirks", "ends"), [(frozenset(), True), (TEXT_QUIRKS, False)])
def test_the_language_model_reads_no_end_token(quirks: Quirks, ends: bool) -> None:
    model, tokenizer = fixed_language_model(["cat", "sits"])
    read: list[list[int]] = []
    model.register_forward_pre_hook(lambda _, given: read.extend(given[0].tolist()))
    masked_lm_substitutes(["the dog runs"], model, tokenizer, quirks)
    expected = tokenizer.convert_tokens_to_ids(["[CLS]", "the", "dog", "runs", *(["[SEP]"] if ends else [])])
    assert read == [expected]


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_divergence_is_that_of_the_clean_embedding_from_the_attacked() -> None:
    """KL(clean || attacked): in texts, in importance and in images."""
    clean, other = unit(2, 40, 6).unbind()
    expected = peers.divergence(clean, other)
    torch.testing.assert_close(embedding_divergence(clean, other), expected)
    torch.testing.assert_close(divergence_from(clean)(other, torch.arange(40)), expected)
    assert (expected - peers.divergence(other, clean)).abs().min() > 1e-9


def test_images_leave_themselves_by_the_same_divergence(world: World) -> None:
    batch, victim = world.batch(), world.victim
    objective = image.Pgd(objective="deviation")._objective(victim, batch)
    pixels = torch.rand_like(batch.pixels)
    expected = peers.divergence(batch.clean_features(victim), victim.encode_image(pixels))
    torch.testing.assert_close(objective(pixels, 0), expected.float())


def test_mixtures_are_weighed_as_published() -> None:
    """The chance of each outcome of drawing, again where nothing is left, by counting all of them."""
    chances: Counter[tuple[int, ...]] = Counter()
    for first in range(1, 101):
        for second in range(1, max(100 - first, 1) + 1):
            weights = mixture_weights(first, second)
            if weights is not None:
                chances[tuple(round(100 * weight) for weight in weights)] += 1 / max(100 - first, 1)
    reached, table = mixture_table()
    keys = map(tuple, (100 * table).round().long().tolist())
    ours = dict(zip(keys, reached.diff(prepend=torch.zeros(1)).tolist(), strict=True))
    assert len(ours) == len(table)
    assert ours == pytest.approx({key: chance / sum(chances.values()) for key, chance in chances.items()}, abs=1e-12)


def test_mixtures_are_drawn_by_their_chances() -> None:
    reached, table = mixture_table()
    draws = uniform(torch.arange(20_000), (5,)).double().flatten()
    found = table[torch.searchsorted(reached, draws, right=True)]
    chances = reached.diff(prepend=torch.zeros(1)).float()
    assert found.sum(1).sub(1).abs().max() < 1e-6
    assert found.min() > 0.009
    torch.testing.assert_close(found.mean(0), (chances[:, None] * table).sum(0), rtol=0, atol=5e-3)


@pytest.mark.parametrize("steps", [1, 3])
def test_look_aheads_are_at_one_scale(world: World, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later step reads 15 images an image, with gradients to 10: five mixtures, their look-aheads, five copies."""
    read = {True: 0, False: 0}
    batch, victim = world.batch([0, 1]), world.victim
    batch.clean_features(victim)
    encode = type(victim).encode_image

    def counted(own: Any, pixels: Tensor) -> Tensor:
        read[pixels.requires_grad] += len(pixels)
        return encode(own, pixels)

    monkeypatch.setattr(type(victim), "encode_image", counted)
    Dra(steps=steps).run(victim, batch)
    ends = 2 * 2  # the images that captions are attacked against
    assert read == {True: 2 * (5 + 10 * (steps - 1)), False: 2 * 5 * (steps - 1) + ends}


def test_starts_lie_on_one_side() -> None:
    pixels, keys = torch.full((3, 3, 8, 8), 0.5), torch.arange(3)
    draws = 2 * uniform(keys, (3, 8, 8)) - 1
    for sides, own in ((False, draws), (True, (draws + 1) / 2)):
        started = image.random_start(pixels, 0.1, keys, one_sided=sides)
        torch.testing.assert_close(started, random_start(pixels, 0.1, own))
        assert bool(started.min() < 0.5) != sides


def test_the_loader_of_pairs_leaves_the_last_captions_image(world: World) -> None:
    """What the other captions of an image say changes nothing."""
    few = world.permuted([2, 0])
    others = few.permuted([0, 1])
    others.captions[0] = "Three dogs are playing with red balls"

    def run(own: World, quirks: Quirks) -> Attacked:
        return CoAttack(epsilon=8 / 255, steps=3, words=0, quirks=quirks).run(own.victim, own.batch())

    last: Quirks = frozenset({"last_caption"})
    assert torch.equal(run(few, last).pixels, run(others, last).pixels)
    assert not torch.equal(run(few, frozenset()).pixels, run(others, frozenset()).pixels)


def test_images_are_led_from_the_first_30_tokens(world: World) -> None:
    """What follows in a caption changes no image."""
    long = world.permuted([2])
    text = " ".join(["boat"] * 40)
    long = type(long)(long.model, long.masked_lm, long.tokenizer, long.pixels, [text, f"{text} sea"], long.owner[:2])
    others = type(long)(long.model, long.masked_lm, long.tokenizer, long.pixels, [text, text], long.owner[:2])
    assert len(long.tokenizer(text)["input_ids"]) < MAX_TOKENS

    def pixels(own: World, quirks: Quirks) -> Tensor:
        return Sga(epsilon=8 / 255, steps=2, words=0, quirks=quirks).run(own.victim, own.batch()).pixels

    assert torch.equal(
        pixels(long, frozenset({"supervision_30_tokens"})), pixels(others, frozenset({"supervision_30_tokens"}))
    )
    assert not torch.equal(pixels(long, frozenset()), pixels(others, frozenset()))


def test_a_caption_is_left_where_nothing_is_worse(world: World) -> None:
    """The original is among the tries, and wins where they are equal."""
    batch = world.batch()
    same = BertAttack(words=3).captions(batch, torch.zeros(len(batch.pixels), 32))
    assert same == world.texts
