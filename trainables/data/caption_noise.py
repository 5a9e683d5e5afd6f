"""Captions as people and machines spoil them: typing, optical reading, edits, wording (MM-Robustness, Qiu et al. 2022).

By rule only. Left out, because they need a model: active and passive voice, and translation there and back. `formal`
and `casual` know contractions and some thirty pairs of words: of COCO's test captions they change 8 % and 26 %.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from trainables.errors import InputError

Kind = Literal[
    "keyboard", "ocr", "character_insert", "character_replace", "character_swap", "character_delete",
    "word_synonym", "word_insert", "word_swap", "word_delete", "punctuation",
    "formal", "casual",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARKS = ".;?:!,"

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
KEYBOARD = {
    key: "".join(
        other
        for near, row in enumerate(_ROWS)
        for at, other in enumerate(row)
        # Each row of a QWERTY keyboard stands half a key to the right of the one above.
        if other != key and abs(near - level) <= 1 and abs(at + near / 2 - column - level / 2) <= 1
    )
    for level, keys in enumerate(_ROWS)
    for column, key in enumerate(keys)
}
"""Keys that touch each key."""

_LOOKALIKES = "0o 1l 1i 2z 5s 6b 8b 9g 9q ce co ao fe ft hb hn il ij lt nr nu rt sz uv vy"
OCR = {
    character: "".join(pair.replace(character, "") for pair in _LOOKALIKES.split() if character in pair)
    for character in _LOOKALIKES.replace(" ", "")
}
"""Characters that are easily read as each other."""

_CASUAL_FORMAL = """
    it's=it is, there's=there is, that's=that is, what's=what is, who's=who is, he's=he is, she's=she is,
    they're=they are, we're=we are, you're=you are, i'm=i am, isn't=is not, aren't=are not, wasn't=was not,
    weren't=were not, doesn't=does not, don't=do not, didn't=did not, can't=cannot, couldn't=could not, won't=will not,
    wouldn't=would not, hasn't=has not, haven't=have not, let's=let us, gonna=going to, wanna=want to, lots of=many,
    a bunch of=several, kid=child, kids=children, guy=man, guys=men, mom=mother, dad=father, grandma=grandmother,
    grandpa=grandfather, pic=picture, pics=pictures, photo=photograph, photos=photographs, bike=bicycle, bikes=bicycles,
    motorbike=motorcycle, motorbikes=motorcycles, plane=airplane, planes=airplanes, tv=television, tvs=televisions,
    fridge=refrigerator, fridges=refrigerators, phone=telephone, phones=telephones, veggies=vegetables"""
"""Casual wording and the formal one of the same meaning."""
_PAIRS = [(casual.strip(), formal) for casual, formal in (pair.split("=") for pair in _CASUAL_FORMAL.split(","))]
_REWORDINGS = {
    "formal": dict(_PAIRS),
    "casual": {formal: casual for casual, formal in _PAIRS},
}


def spoil(
    words: Sequence[str], kind: Kind, share: float, synonyms: Sequence[Sequence[str]], rng: np.random.Generator
) -> str:
    """Spoil one caption.

    Args:
        words: of the caption, in lower case.
        kind: of noise. Of `formal` and `casual` nothing is random, and `share` does not matter.
        share: of the characters or words that change, above 0 to 1; one at least. Easy Data Augmentation (EDA, Wei and
            Zou 2019) calls it alpha.
        synonyms: for each word what may stand for it; only `word_synonym` and `word_insert` read them.
        rng: all randomness.

    Returns:
        The caption; unchanged if it offers nothing to change.
    """
    if kind in _REWORDINGS:
        return _reword(" ".join(words), _REWORDINGS[kind])
    if kind in _CHARACTER_EDITS:
        return " ".join(_edit_characters(words, *_CHARACTER_EDITS[kind], share, rng))
    return " ".join(_edit_words(list(words), kind, share, synonyms, rng))


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """Synonyms by word from a file with two words a line: the second may stand for the first.

    Raises:
        InputError: a line does not have two words.
    """
    found: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        pair = line.split()
        if len(pair) != 2:
            raise InputError(f"{path}, line {number}: two words are needed, here is {line!r}")
        found.setdefault(pair[0], []).append(pair[1])
    return found


def _reword(caption: str, rewordings: dict[str, str]) -> str:
    longest_first = sorted(rewordings, key=len, reverse=True)
    pattern = rf"(?<![\w'-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w'-])"
    return re.sub(pattern, lambda found: rewordings[found[0]], caption)


def _pick(options: str | Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _replace(options: Callable[[str], str]) -> Callable[[str, int, np.random.Generator], str]:
    return lambda word, at, rng: word[:at] + _pick(options(word[at]), rng) + word[at + 1 :]


def _has(characters: str | dict[str, str]) -> Callable[[str, int], bool]:
    return lambda word, at: word[at] in characters


_CHARACTER_EDITS: dict[str, tuple[Callable[[str, int], bool], Callable[[str, int, np.random.Generator], str]]] = {
    "keyboard": (_has(KEYBOARD), _replace(KEYBOARD.__getitem__)),
    "ocr": (_has(OCR), _replace(OCR.__getitem__)),
    "character_insert": (lambda word, at: True, lambda word, at, rng: word[:at] + _pick(LETTERS, rng) + word[at:]),
    "character_replace": (lambda word, at: True, _replace(lambda old: LETTERS.replace(old, ""))),
    "character_swap": (
        lambda word, at: at + 1 < len(word),
        lambda word, at, rng: word[:at] + word[at + 1] + word[at] + word[at + 2 :],
    ),
    "character_delete": (
        lambda word, at: at > 0,  # the first letter stays, so no word is lost
        lambda word, at, rng: word[:at] + word[at + 1 :],
    ),
}
"""Which characters of a word may be edited, and how."""


def _edit_characters(
    words: Sequence[str],
    editable: Callable[[str, int], bool],
    edit: Callable[[str, int, np.random.Generator], str],
    share: float,
    rng: np.random.Generator,
) -> list[str]:
    places = [(row, at) for row, word in enumerate(words) for at in range(len(word)) if editable(word, at)]
    wanted = max(1, round(share * sum(map(len, words))))
    chosen = rng.permutation(len(places))[:wanted]
    edited = list(words)
    for place in sorted(chosen, reverse=True):  # from the back, so that places before stay where they are
        row, at = places[place]
        edited[row] = edit(edited[row], at, rng)
    return edited


def _edit_words(
    words: list[str], kind: str, share: float, synonyms: Sequence[Sequence[str]], rng: np.random.Generator
) -> list[str]:
    wanted = max(1, round(share * len(words)))
    order = rng.permutation(len(words))
    known = [place for place in order if synonyms[place]] if kind in ("word_synonym", "word_insert") else []
    if kind == "word_synonym":
        for place in known[:wanted]:
            words[place] = _pick(synonyms[place], rng)
    elif kind == "word_insert":
        for word in [_pick(synonyms[place], rng) for place in known[:wanted]]:
            words.insert(int(rng.integers(len(words) + 1)), word)
    elif kind == "word_delete":
        gone = set(order[: min(wanted, len(words) - 1)])
        words = [word for place, word in enumerate(words) if place not in gone]
    elif kind == "word_swap":
        for _ in range(wanted if len(words) > 1 else 0):
            one, other = rng.choice(len(words), 2, replace=False)
            words[one], words[other] = words[other], words[one]
    else:  # punctuation, as in AEDA (Karimi et al. 2021)
        for _ in range(wanted):
            words.insert(int(rng.integers(len(words) + 1)), _pick(MARKS, rng))
    return words
