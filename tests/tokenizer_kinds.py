"""Tokenizers of every kind, small: how each marks where a word begins or ends."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CAPTIONS = ["a man is holding a surfboard", "two women are holding umbrellas", "Holding on, a cat sleeps"] * 20
WORDS = sorted({word for caption in CAPTIONS for word in caption.replace(",", "").split()})
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
LETTERS = [chr(letter) for letter in range(97, 123)]


def byte_level() -> Tokenizer:
    """GPT-2's and RoBERTa's: a space before a word belongs to it, as `Ġ`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CAPTIONS, trainer)
    return made


def sentence_piece() -> Tokenizer:
    """XLM-R's, ALBERT's and SigLIP's: the same, as `▁`."""
    scored = [(f"▁{word}", -5.0) for word in WORDS] + [(piece, -9.0) for piece in ["▁", "surfbo", *LETTERS]]
    made = Tokenizer(models.Unigram([(entry, 0.0) for entry in SPECIAL] + scored, SPECIAL.index("<unk>")))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def end_of_word() -> Tokenizer:
    """CLIP's and XLM's: the end of a word is marked, as `</w>`."""
    made = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=200, end_of_word_suffix="</w>", special_tokens=SPECIAL, show_progress=False
    )
    made.train_from_iterator(CAPTIONS, trainer)
    return made


def cased_word_piece() -> Tokenizer:
    """BERT's: what goes on a word is marked, as `##`."""
    entries = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS), "surfbo", "##ard"]
    made = Tokenizer(
        models.WordPiece({entry: place for place, entry in enumerate(dict.fromkeys(entries))}, unk_token="<unk>")
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return made


def characters() -> Tokenizer:
    """Every letter by itself, words apart."""
    entries = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    made = Tokenizer(
        models.WordPiece({entry: place for place, entry in enumerate(dict.fromkeys(entries))}, unk_token="<unk>")
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return made


KINDS = {
    "byte-level": byte_level,
    "sentencepiece": sentence_piece,
    "end of word": end_of_word,
    "wordpiece": cased_word_piece,
}


def wrapped(made: Tokenizer) -> Any:
    """As `transformers` has them."""
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", bos_token="<s>"
    )
