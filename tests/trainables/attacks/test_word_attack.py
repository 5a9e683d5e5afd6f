"""The attack on words by numbers equals the one on strings, on real captions and on odd ones."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from attack_world import MAX_TOKENS, World
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_text_attack import CaptionEncoder as PlainEncoder
from plain_text_attack import attack_words as plain_attack
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from trainables.attacks import encoding, search, text
from trainables.attacks.candidates import Candidates, numbered
from trainables.attacks.encoding import CaptionEncoder, encode_captions
from trainables.attacks.lexicon import lexicon_of
from trainables.attacks.search import search_words
from trainables.attacks.substitutes import STOP_WORDS, Substitutes
from trainables.attacks.text import attack_words, away_from, score_words
from trainables.captions import albef_text, clip_text
from trainables.training.attack import REVISITS

CPU = torch.device("cpu")


class Reader:
    """A cheap encoder that sees which token stands where."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        generator = torch.Generator().manual_seed(0)
        self.words, self.places = (torch.randn(rows, 16, generator=generator) for rows in (len(tokenizer), 77))

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(batch, length) -> (batch, 16)."""
        states = torch.tanh(self.words[tokens] + self.places[: tokens.shape[1]])
        return (states * mask[:, :, None]).sum(1)


def image_features(captions: int, dim: int = 16) -> Tensor:
    return F.normalize(torch.randn(captions, dim, generator=torch.Generator().manual_seed(1)), dim=-1)


def plainly(model: Any, table: Substitutes, max_tokens: int, **budget: Any) -> list[str]:
    rows = range(len(table.starts) - 1)
    encode = PlainEncoder(model, max_tokens, CPU)
    dim = encode(["a"]).shape[1]
    words, options = [table.words_of(row) for row in rows], [table.options_of(row) for row in rows]
    return plain_attack(encode, words, options, away_from(image_features(len(rows), dim)), **budget)


def by_numbers(model: Any, table: Substitutes, max_tokens: int, once: bool = False, **budget: Any) -> list[str]:
    """The same in order of length, as in training, or with an encoder that keeps what it has seen."""
    lexicon, rows = lexicon_of(model.tokenizer), np.arange(len(table.starts) - 1)
    words, options = numbered(table, rows, lexicon)
    order = lexicon.lengths[words].sum(1).argsort(kind="stable")
    encode = CaptionEncoder(model, max_tokens, CPU)
    if not once:
        encode = partial(encode_captions, model, max_tokens=max_tokens, device=CPU)
    captions = Candidates.of(lexicon, words[order], options[order])
    images = image_features(len(rows), encode(captions.captions).shape[1])[order]
    attacked, features = attack_words(encode, captions, away_from(images), **budget)
    torch.testing.assert_close(features, encode(attacked), rtol=0, atol=1e-6)
    return [attacked[place] for place in order.argsort()]


@pytest.fixture(scope="module", params=["CLIP", "BERT"])
def real(request: pytest.FixtureRequest, real_data: Path, clip_bpe: CLIPTokenizer) -> tuple[Reader, Substitutes]:
    """2,000 captions of COCO under a published vocabulary, with words of others for their words."""
    entries = json.loads((real_data / "coco_karpathy_test_captions.json").read_text())
    raw = [caption for entry in entries for caption in entry["caption"]][:2000]
    bert = BertTokenizer(str(real_data / "text_resources" / "bert_base_uncased_vocab.txt"))
    words = [(clip_text if request.param == "CLIP" else albef_text)(caption).split() for caption in raw]
    others = sorted({word for caption in words for word in caption if word.isalpha()} - STOP_WORDS)
    draw = np.random.default_rng(0)
    options = [
        [
            []
            if word in STOP_WORDS
            else [others[place] for place in draw.integers(len(others), size=draw.integers(5, 11))]
            for word in caption
        ]
        for caption in words
    ]
    return Reader(clip_bpe if request.param == "CLIP" else bert), Substitutes.build(words, options)


@pytest.mark.parametrize(("words", "max_tokens"), [(1, 77), (2, 12)])
def test_real_captions_are_attacked_the_same(real: tuple[Reader, Substitutes], words: int, max_tokens: int) -> None:
    model, table = real
    assert lexicon_of(model.tokenizer).word_tokens.by_words
    expected = plainly(model, table, max_tokens, words=words)
    assert by_numbers(model, table, max_tokens, once=words == 1, words=words) == expected
    assert sum(a != b for a, b in zip(expected, table.texts(), strict=True)) > 1900
    limited = by_numbers(model, table, max_tokens, words=words, visits=words + REVISITS)
    assert sum(a != b for a, b in zip(limited, expected, strict=True)) <= 20, "few need more visits than training has"


WORDS = ["a", "red", "dogs", "half-asleep", "kitchens", "[UNK]", "helmet,", "2"]
captions = st.lists(st.sampled_from(WORDS), max_size=9)
tables = st.lists(captions, min_size=1, max_size=5).flatmap(
    lambda texts: st.tuples(
        st.just(texts),
        st.tuples(*(st.tuples(*(st.lists(st.sampled_from(WORDS), max_size=4) for _ in text)) for text in texts)),
    )
)


@given(
    made=tables,
    words=st.integers(0, 3),
    importance=st.sampled_from(["deletion", "unknown"]),
    max_tokens=st.sampled_from([4, 7, MAX_TOKENS]),
    once=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_odd_captions_are_attacked_the_same(
    world: World, made: Any, words: int, importance: Literal["deletion", "unknown"], max_tokens: int, once: bool
) -> None:
    """Empty ones, of one word, with words that come again, cut, and without anything to put in."""
    table = Substitutes.build(*made)
    budget: dict[str, Any] = {"words": words, "importance": importance}
    expected = plainly(Reader(world.tokenizer), table, max_tokens, **budget)
    assert by_numbers(Reader(world.tokenizer), table, max_tokens, once, **budget) == expected


class NothingRead(TorchDispatchMode):
    """Refuses what has to wait for a device: reading a value, and shapes that depend on values."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave.Tensor")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.WAIT), func
        if str(func).startswith("aten.index"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("words", [1, 2])
def test_where_reading_means_waiting_nothing_is_read(world: World, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the result is the same."""
    budget = {"words": words, "visits": words + REVISITS}
    expected = by_numbers(world.model, world.table(), MAX_TOKENS, **budget)
    lexicon = lexicon_of(world.tokenizer)
    made = Candidates.of(lexicon, *numbered(world.table(), np.arange(len(world.captions)), lexicon))
    encode = partial(encode_captions, world.model, max_tokens=MAX_TOKENS, device=CPU)
    images = image_features(len(world.captions), 32)
    encode(made.captions)  # the tables are there
    for module in (encoding, text):
        monkeypatch.setattr(module, "READ_FREELY", set())
    with NothingRead():
        attacked, _ = attack_words(encode, made, away_from(images), **budget)
    assert attacked == expected
    assert attacked != world.texts
    for row in range(len(world.captions)):  # whatever it is attacked with
        own = Candidates.of(lexicon, *numbered(world.table(), np.array([row]), lexicon))
        assert attack_words(encode, own, away_from(images[[row]]), **budget)[0] == [expected[row]]


@pytest.mark.parametrize("words", [1, 2])
def test_the_search_reads_nothing_either(world: World, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As training searches."""
    lexicon = lexicon_of(world.tokenizer)
    made = Candidates.of(lexicon, *numbered(world.table(), np.arange(len(world.captions)), lexicon))
    encode = partial(encode_captions, world.model, max_tokens=MAX_TOKENS, device=CPU)
    away = away_from(image_features(len(world.captions), 32))
    expected, _ = search_words(encode, made, away, words=words, converge=False)
    for module in (encoding, search):
        monkeypatch.setattr(module, "READ_FREELY", set())
    with NothingRead():
        found, features = search_words(encode, made, away, words=words, converge=False)
    assert found == expected
    assert found != world.texts
    torch.testing.assert_close(features, encode(expected), rtol=0, atol=1e-5)


def test_an_exhaustive_search_is_an_argmax(world: World) -> None:
    lexicon = lexicon_of(world.tokenizer)
    made = Candidates.of(lexicon, *numbered(world.table(), np.arange(len(world.captions)), lexicon))
    encode = partial(encode_captions, world.model, max_tokens=MAX_TOKENS, device=CPU)
    images = image_features(len(world.captions), 32)
    scores = score_words(encode, made, away_from(images))
    assert scores.shape == made.options.shape
    for row, (written, found) in enumerate(zip(scores, made.options, strict=True)):
        words, options = world.table().words_of(row), world.table().options_of(row)
        tries = [
            (place, rank, " ".join([*words[:place], option, *words[place + 1 :]]))
            for place, own in enumerate(options)
            for rank, option in enumerate(own)
        ]
        expected = -encode([text for _, _, text in tries]) @ images[row]
        place, rank = (torch.tensor(part) for part in list(zip(*tries, strict=True))[:2])
        torch.testing.assert_close(written[place, rank], expected, rtol=0, atol=1e-6)
        assert (written > -torch.inf).sum() == len(tries) == (found >= 0).sum()


def test_the_first_of_equal_candidates_is_taken(world: World) -> None:
    table = Substitutes.build([["a", "dog"]], [[[], ["helmet", "boat", "helmet"]]])
    lexicon = lexicon_of(world.tokenizer)
    made = Candidates.of(lexicon, *numbered(table, np.arange(1), lexicon))
    encode = partial(encode_captions, world.model, max_tokens=MAX_TOKENS, device=CPU)

    def attacked(tried: list[float], clean: float = 0.0) -> str:
        """Where the misfit of the candidates is as given, and that of the caption."""

        def misfit(features: Tensor, _: Tensor) -> Tensor:
            return torch.tensor([clean] if len(features) == 1 else tried, dtype=torch.float32)

        (caption,) = attack_words(encode, made, misfit, words=1)[0]
        return caption

    assert attacked([0, 1, 1]) == "a boat"
    assert attacked([math.nan, 1, 0]) == "a boat"
    assert attacked([math.nan] * 3, math.nan) == "a dog"


def test_no_attack_makes_a_caption_longer_than_is_told(world: World) -> None:
    """A letter is a token where no word of the vocabulary is."""
    words = [["a", "xyz", "runs"], ["dogs"], ["xyz", "boats"]]
    options = [[["boat"], ["x", "vwxyz"], ["qq", "xx"]], [["zz"]], [["qqqq"], []]]
    lexicon = lexicon_of(world.tokenizer)
    made = Candidates.of(lexicon, *numbered(Substitutes.build(words, options), np.arange(3), lexicon))
    tokens = [world.tokenizer(" ".join(caption))["input_ids"] for caption in words]
    assert made.lengths.tolist() == list(map(len, tokens))
    assert made.growth.tolist() == [2, 1, 1]
    assert made.longest(2).tolist() == [own + 2 * more for own, more in zip(made.lengths, [2, 1, 1], strict=True)]
    assert made.attackable.tolist() == [3, 1, 1]
    assert made.owner.tolist() == [0, 0, 0, 1, 2]
    assert made.place.tolist() == [0, 1, 2, 0, 0]
