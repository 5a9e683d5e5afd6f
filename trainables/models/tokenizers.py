"""Tokenizers: found, and fit for the embeddings that they feed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainables.errors import InputError, reason

PROBED = 200
"""Words of the vocabulary that are tokenized again, the longest ones."""


def load_tokenizer(name: str | Path, rows: int, *, kind: Any = AutoTokenizer, first: bool = True) -> Any:
    """The tokenizer in a folder or of a hub id, checked against the embeddings it feeds.

    What it is checked for is what goes wrong in silence: where no vocabulary is found, `transformers` makes a tokenizer
    of nothing but special tokens, under which all captions are equal.

    Args:
        name: a folder or a hub id.
        rows: of the token embeddings.
        kind: its class, if that is known.
        first: whether a caption has to begin with a special token.

    Raises:
        InputError: it cannot be loaded or does not fit, with what was looked for.
    """
    try:
        tokenizer = kind.from_pretrained(name)
    except Exception as error:  # of `transformers` and `tokenizers`: bare exceptions, and whatever a broken file causes
        raise InputError(f"the tokenizer of {name} cannot be loaded: {reason(error)}\n{_wanted(name, kind)}") from error
    if mistakes := misfits(tokenizer, rows, first):
        told = "".join(f"\n  {mistake}" for mistake in mistakes)
        raise InputError(f"the tokenizer of {name} does not fit its model:{told}\n{_wanted(name, tokenizer)}")
    return tokenizer


def misfits(tokenizer: PreTrainedTokenizerBase, rows: int, first: bool = True) -> list[str]:
    """What is wrong with a tokenizer for so many rows of embeddings, in words; nothing if it fits.

    Sizes are rounded up to multiples of 128 in many models, and some keep a few rows free (BLIP two, DeBERTa's below a
    hundredth); a tokenizer that is shorter than that is another model's.
    """
    if not tokenizer.is_fast:
        return [f"{type(tokenizer).__name__} does not say where in the text its tokens are; a tokenizer.json would"]
    vocabulary = tokenizer.get_vocab()
    entries, highest = len(vocabulary), max(vocabulary.values(), default=-1)
    mistakes = []
    if highest >= rows or rows - entries > max(2, rows // 100, -entries % 128):
        mistakes.append(f"it has {entries:,} entries (ids to {highest:,}), the model's embeddings have {rows:,} rows")
    if tokenizer.pad_token_id is None:
        mistakes.append("it has no padding token")
    words = sorted(filter(str.isalpha, texts_of(tokenizer)), key=len)[-PROBED:]
    known = sum(entry is not None for entry in whole_words(tokenizer, words))
    if not words:
        mistakes.append("it has no words: its vocabulary was not found")
    elif 10 * known < len(words):
        mistakes.append(f"it cannot read its own words: of its {len(words)} longest, it knows {known} in a sentence")
    begun = tokenizer(["a", "the"])["input_ids"] if first and not mistakes else []
    if any(not ids or ids[0] not in tokenizer.all_special_ids for ids in begun):
        mistakes.append("captions do not begin with a special token")
    return mistakes


def texts_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each entry stands for as text by itself, in the order of their ids; special ones stand for nothing."""
    backend = tokenizer.backend_tokenizer
    special = set(tokenizer.all_special_ids)
    special |= {place for place, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return [
        "" if place in special else backend.decode([place], skip_special_tokens=False).strip()
        for place in range(max(tokenizer.get_vocab().values(), default=-1) + 1)
    ]


def whole_words(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> list[int | None]:
    """The entry that a word is, where it stands in a sentence and is a single token.

    However word starts are marked (`Ġ`, a low line, `</w>`, or pieces by `##`): what counts is what comes out.
    """
    backend = tokenizer.backend_tokenizer
    found: list[int | None] = []
    twice = [f"{word} {word}" for word in words]
    for word, coded in zip(words, backend.encode_batch(twice, add_special_tokens=False), strict=True):
        again = [
            place
            for place, (_, end), seen in zip(coded.ids, coded.offsets, coded.attention_mask, strict=True)
            if seen and end > len(word)  # with the space between, which some mark by a token of its own
        ]
        single = len(again) == 1 and backend.decode(again, skip_special_tokens=False).strip() == word
        found.append(again[0] if single else None)
    return found


def without_end(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The tokenizer with a start but no end token, as ALBEF was trained: `[CLS]` and the words, no `[SEP]`.

    Args:
        tokenizer: with a `cls_token` or a `bos_token`.
    """
    first = tokenizer.cls_token or tokenizer.bos_token
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, tokenizer.convert_tokens_to_ids(first))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map)


def word_entries(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The word that each entry is by itself, in the order of their ids; nothing for pieces of words."""
    texts = texts_of(tokenizer)
    words = sorted({text for text in texts if len(text.split()) == 1})
    entry = dict(zip(words, whole_words(tokenizer, words), strict=True))
    return [text if entry.get(text) == place else "" for place, text in enumerate(texts)]


def _wanted(name: str | Path, kind: Any) -> str:
    """Where was looked for what."""
    files = getattr(kind, "vocab_files_names", {})
    own = sorted({file for key, file in files.items() if key != "tokenizer_file"})
    wanted = f"tokenizer.json, or {' with '.join(own) or 'vocab.txt, or vocab.json with merges.txt'}"
    if not Path(name).is_dir():
        return f"  looked for on the hub and in its cache: {wanted}"
    there = sorted(path.name for path in Path(name).iterdir() if path.is_file())
    return f"  looked for in {name}: {wanted}\n  there: {', '.join(there) or 'no file'}"
