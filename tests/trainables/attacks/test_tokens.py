"""Captions are tokenised word by word and cropped without changing what the model sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attack_world import MAX_TOKENS, World
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainables.attacks.candidates import numbered
from trainables.attacks.encoding import CaptionEncoder, encode_captions
from trainables.attacks.lexicon import GONE, NONE, Captions, Lexicon, WordTokens
from trainables.attacks.substitutes import Substitutes

TEXTS = ["a dog's dog", "", "half asleep [UNK] dogs", "two  dogs in 3 cars and one dog more than that", "the sea" * 9]


def byte_level() -> PreTrainedTokenizerBase:
    """As GPT-2's: a word at the start has other tokens than one after a space."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("max_tokens", [4, 9, 48])
@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_tokens_are_the_tokenizers(world: World, kind: str, max_tokens: int) -> None:
    tokenizer = world.model.tokenizer if kind == "words" else byte_level()
    texts = [*world.texts, *TEXTS]
    expected = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    assert list(map(list, WordTokens(tokenizer)(texts, max_tokens))) == expected


@pytest.mark.parametrize("max_tokens", [4, 9, 48])
@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_tokens_of_numbers_are_those_of_their_texts(world: World, kind: str, max_tokens: int) -> None:
    tokenizer = world.model.tokenizer if kind == "words" else byte_level()
    lexicon = Lexicon(tokenizer)
    texts = [*world.texts, *(" ".join(text.split()) for text in TEXTS)]
    table = Substitutes.build([text.split() for text in texts], [[[] for _ in text.split()] for text in texts])
    words, _ = numbered(table, np.arange(len(texts)), lexicon)
    rows = torch.from_numpy(words)
    assert lexicon.texts(rows) == texts
    expected = tokenizer(texts, truncation=True, max_length=max_tokens, padding=True, return_tensors="pt")
    tokens, mask = lexicon.tokens(rows, max_tokens)
    assert torch.equal(mask, expected["attention_mask"])
    assert torch.equal(tokens, expected["input_ids"])
    longer, seen = lexicon.tokens(rows, max_tokens, 99)
    assert longer.shape[1] == max_tokens
    assert torch.equal(longer[:, : tokens.shape[1]], tokens)
    assert not seen[:, tokens.shape[1] :].any()
    # A word that is left out is no word: neither of the text nor of its tokens.
    rows[:, 1] = torch.where(rows[:, 1] == NONE, NONE, GONE)
    left = [" ".join(text.split()[:1] + text.split()[2:]) for text in texts]
    assert lexicon.texts(rows) == left
    assert torch.equal(lexicon.tokens(rows, max_tokens)[1].sum(1), lexicon_lengths(tokenizer, left, max_tokens))


def lexicon_lengths(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int) -> torch.Tensor:
    return torch.tensor([len(ids) for ids in tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]])


def test_a_lexicon_grows_and_keeps_its_numbers(world: World) -> None:
    lexicon = Lexicon(world.model.tokenizer)
    first, second = np.array(["", "a", "dog"]), np.array(["", "boat", "dog"])
    before = lexicon.numbers(first)
    tokens, _ = lexicon.tokens(torch.from_numpy(before[None, 1:]), MAX_TOKENS)
    after = lexicon.numbers(second)
    assert before[0] == after[0] == GONE
    assert before[-1] == after[-1] == NONE
    assert before[2] == after[2] != after[1]
    assert lexicon.texts(torch.from_numpy(after[None, 1:])) == ["boat dog"]
    assert torch.equal(lexicon.tokens(torch.from_numpy(before[None, 1:]), MAX_TOKENS)[0], tokens)


def test_fingerprints_tell_rows_apart() -> None:
    rows = torch.cartesian_prod(*[torch.arange(1, 9)] * 4)
    lexicon = object.__new__(Lexicon)
    assert len(lexicon.fingerprints(rows).unique()) == len(rows)
    wider = F.pad(rows, (0, 3), value=NONE)
    assert torch.equal(lexicon.fingerprints(wider), lexicon.fingerprints(rows)), "how wide the table is does not matter"


def test_every_caption_is_encoded_once(world: World) -> None:
    seen = []

    class Counting:
        tokenizer = world.model.tokenizer

        def encode_text(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            seen.append(len(tokens))
            return world.model.encode_text(tokens, mask)

    captions = world.batch().captions()
    twice = Captions(captions.rows.repeat(2, 1), captions.lexicon)
    encode = CaptionEncoder(Counting(), MAX_TOKENS, torch.device("cpu"))
    first = encode(twice)
    torch.testing.assert_close(first, encode_captions(world.model, [*twice], MAX_TOKENS, torch.device("cpu")))
    assert torch.equal(encode(captions), first[: len(captions)])
    assert sum(seen) == len(captions)
    told = CaptionEncoder(Counting(), MAX_TOKENS, torch.device("cpu"))
    told.know(twice, first)
    assert torch.equal(told(captions), first[: len(captions)])
    assert sum(seen) == len(captions), "what is known is not encoded"


def test_cropping_is_exact(world: World) -> None:
    """The text tower is causal and read at the end-of-text token, so padding behind it is not seen, mask or no mask."""
    texts = [*world.texts, "a dog", ""]
    batch = world.model.tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    for mask in (batch["attention_mask"], torch.ones_like(batch["attention_mask"])):
        full = F.normalize(world.model.encode_text(batch["input_ids"], mask), dim=-1)
        cropped = encode_captions(world.model, texts, MAX_TOKENS, torch.device("cpu"))
        torch.testing.assert_close(cropped, full, rtol=0, atol=1e-6)
