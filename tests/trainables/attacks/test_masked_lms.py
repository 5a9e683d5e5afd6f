"""Masked language models of every kind propose words as captions have them, or nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizer_kinds import KINDS, cased_word_piece, characters, wrapped
from transformers import RobertaConfig, RobertaForMaskedLM

from trainables.attacks.proposals import Proposer, _logits_at, masked_lm_substitutes
from trainables.attacks.quirks import Quirks
from trainables.attacks.substitutes import STOP_WORDS, Substitutes
from trainables.errors import InputError

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEXTS = ["a man is holding a surfboard", "two women are holding umbrellas", "a cat sleeps", "qqq zzz"]


def roberta(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=40, **SIZES
    )
    return RobertaForMaskedLM(config).eval()


def plain(tokenizer: Any, masked_lm: Any, text: str, word: str) -> list[str]:
    """By decoding: what a sentence's single token says, from the best prediction down."""
    batch = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    begin = text.index(word)
    ends = batch.pop("offset_mapping")[0, :, 1].tolist()
    position = next(place for place, end in enumerate(ends) if end > begin)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found: list[str] = []
    first = tokenizer("cat", add_special_tokens=False)["input_ids"]
    for place in masked_lm(**batch).logits[0, position].argsort(descending=True).tolist():
        text = tokenizer.decode([place]).strip()
        again = tokenizer(f"cat {text}", add_special_tokens=False)["input_ids"]
        if again == [*first, place] and text.isalpha() and text.islower() and text not in {*STOP_WORDS, word}:
            found.append(text)
    return found[:10]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_proposals_are_words_of_sentences(kind: str) -> None:
    tokenizer = wrapped(KINDS[kind]())
    masked_lm = roberta(tokenizer)
    table = masked_lm_substitutes(TEXTS, masked_lm, tokenizer)
    for row, text in enumerate(TEXTS[:3]):
        for word, found in zip(table.words_of(row), table.options_of(row), strict=True):
            expected = [] if word in STOP_WORDS else plain(tokenizer, masked_lm, text, word)
            assert found == expected
            assert word in STOP_WORDS or len(found) >= 3
    assert not any("Ġ" in word or "▁" in word or "</w>" in word or "##" in word for word in table.vocabulary)


def test_a_cased_model_proposes_lower_case() -> None:
    tokenizer = wrapped(cased_word_piece())
    assert {"Holding", "holding"} <= set(tokenizer.get_vocab())
    table = masked_lm_substitutes(TEXTS, roberta(tokenizer), tokenizer)
    assert set(table.vocabulary) >= {"holding", "women"}
    assert all(word == word.lower() for word in table.vocabulary)


def test_a_tokenizer_of_characters_proposes_nothing() -> None:
    tokenizer = wrapped(characters())
    table = masked_lm_substitutes(TEXTS, roberta(tokenizer), tokenizer)
    assert [table.words_of(row) for row in range(len(TEXTS))] == [text.split() for text in TEXTS]
    assert (table.options < 0).all()


def test_a_long_caption_ends_before_roberta_s_last_position() -> None:
    tokenizer = wrapped(KINDS["byte-level"]())
    long = " ".join(["surfboard"] * 60)
    table = masked_lm_substitutes([long, *TEXTS], roberta(tokenizer), tokenizer)
    options = table.options_of(0)
    assert all(options[:30])
    assert not any(options[40:])


def test_combinations_of_pieces_are_bert_s_alone() -> None:
    tokenizer = wrapped(KINDS["byte-level"]())
    quirks: Quirks = frozenset({"subword_product"})
    with pytest.raises(InputError, match="subword_product joins BERT's word pieces"):
        masked_lm_substitutes(TEXTS, roberta(tokenizer), tokenizer, quirks)


MODELS = {
    "Albert": {"embedding_size": 16},
    "Bert": {},
    "DistilBert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "Electra": {"embedding_size": 16},
    "MobileBert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "ModernBert": {"pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2},
    "MPNet": {},
    "Roberta": {},
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_at_places_are_those_of_all_places(name: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=60, **SIZES, **MODELS[name])
    masked_lm = getattr(transformers, f"{name}ForMaskedLM")(config).eval()
    tokens, mask = torch.randint(5, 60, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    places = torch.tensor([(0, 1), (1, 6), (0, 3)])
    found = _logits_at(places, masked_lm, tokens, mask, 50)
    every = masked_lm(tokens, attention_mask=mask).logits
    assert every.std() > 0
    torch.testing.assert_close(found, torch.stack([every[row, at, :50] for row, at in places.tolist()]))
    assert math.prod(found.shape) == 150


@torch.no_grad()
def test_predictions_are_told_apart_whatever_the_autocast() -> None:
    torch.manual_seed(0)
    masked_lm = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=60, **SIZES)).eval()
    tokens, places = torch.randint(5, 60, (2, 7)), torch.tensor([(0, 1), (1, 6)])
    with torch.autocast("cpu", torch.bfloat16):
        found = _logits_at(places, masked_lm, tokens, torch.ones_like(tokens), 60)
        assert masked_lm(tokens).logits.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert (found.bfloat16() != found).float().mean() > 0.9


def test_a_corpus_in_parts_is_the_corpus() -> None:
    tokenizer = wrapped(KINDS["wordpiece"]())
    proposer = Proposer(roberta(tokenizer), tokenizer)
    texts = [*TEXTS, "", "a cat, sleeps!"]
    whole = proposer.propose(texts)
    joined = Substitutes.join([proposer.propose(texts[:2]), proposer.propose(texts[2:5]), proposer.propose(texts[5:])])
    for name in ("vocabulary", "words", "options", "starts"):
        assert np.array_equal(getattr(whole, name), getattr(joined, name))
    assert joined.texts() == texts
    assert any(option.endswith(",") for option in joined.options_of(5)[1])
    assert not joined.empty
    assert proposer.propose(texts, silent=True).empty
