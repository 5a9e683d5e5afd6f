"""Captions are tokenised word by word and cropped without changing what the model sees."""

from __future__ import annotations

import pytest
import torch
from attack_world import MAX_TOKENS, World
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainables.attacks.text import WordTokens, encode_captions

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


def test_cropping_is_exact(world: World) -> None:
    """The text tower is causal and read at the end-of-text token, so padding behind it is not seen, mask or no mask."""
    texts = [*world.texts, "a dog", ""]
    batch = world.model.tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    for mask in (batch["attention_mask"], torch.ones_like(batch["attention_mask"])):
        full = F.normalize(world.model.encode_text(batch["input_ids"], mask), dim=-1)
        cropped = encode_captions(world.model, texts, MAX_TOKENS, torch.device("cpu"))
        torch.testing.assert_close(cropped, full, rtol=0, atol=1e-6)
