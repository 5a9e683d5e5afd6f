"""Caption noise: what each kind may change, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from trainables.data.caption_noise import KEYBOARD, KINDS, MARKS, OCR, Kind, read_synonyms, spoil
from trainables.errors import InputError

WORDS = ["a", "young", "man", "rides", "his", "brown", "horse", "along", "the", "beach", "at", "night"]
SYNONYMS = [["youthful"] if word == "young" else ["steed", "pony"] if word == "horse" else [] for word in WORDS]
captions = st.lists(st.text("abcdefghijklmnopqrstuvwxyz019'", min_size=1, max_size=8), max_size=12)


def noisy(kind: Kind, share: float = 0.1, seed: int = 0, words: list[str] = WORDS) -> str:
    synonyms = SYNONYMS if words is WORDS else [["other"]] * len(words)
    return spoil(words, kind, share, synonyms, np.random.default_rng(seed))


def changes(after: str) -> list[tuple[str, str]]:
    """Pairs of characters that differ between captions of one length."""
    return [(a, b) for a, b in zip(" ".join(WORDS), after, strict=True) if a != b]


@pytest.mark.parametrize("seed", range(20))
def test_each_kind_changes_a_tenth_in_its_own_way(seed: int) -> None:
    before, letters = " ".join(WORDS), sum(map(len, WORDS))
    share = round(letters / 10)
    assert share > 3
    for kind, table in (("keyboard", KEYBOARD), ("ocr", OCR)):
        changed = changes(noisy(kind, seed=seed))
        assert len(changed) == share
        assert all(new in table[old] for old, new in changed)
    changed = changes(noisy("character_replace", seed=seed))
    assert len(changed) == share
    assert all(new.isalpha() for _, new in changed)
    inserted, deleted = noisy("character_insert", seed=seed), noisy("character_delete", seed=seed)
    assert (len(inserted) - len(before), Levenshtein.distance(before, inserted)) == (share, share)
    assert (len(before) - len(deleted), Levenshtein.distance(before, deleted)) == (share, share)
    swapped = noisy("character_swap", seed=seed).split()
    assert [sorted(word) for word in swapped] == [sorted(word) for word in WORDS]
    assert swapped != WORDS
    replaced = noisy("word_synonym", seed=seed).split()
    assert [b in ("youthful", "steed", "pony") for a, b in zip(WORDS, replaced, strict=True) if a != b] == [True]
    longer = noisy("word_insert", seed=seed).split()
    assert len(longer) == len(WORDS) + 1
    assert [word for word in longer if word not in ("youthful", "steed", "pony")] == WORDS
    moved = noisy("word_swap", seed=seed).split()
    assert sum(a != b for a, b in zip(WORDS, moved, strict=True)) == 2
    assert sorted(moved) == sorted(WORDS)
    shorter = noisy("word_delete", seed=seed).split()
    assert len(shorter) == len(WORDS) - 1
    assert all(word in WORDS for word in shorter)
    marked = noisy("punctuation", seed=seed).split()
    assert [word for word in marked if word not in MARKS] == WORDS
    assert len(marked) == len(WORDS) + 1


def test_share_is_how_much_changes() -> None:
    assert len(changes(noisy("keyboard", share=0.5))) == round(sum(map(len, WORDS)) / 2)
    assert len(noisy("word_delete", share=1).split()) == 1
    assert set(noisy("word_synonym", share=1).split()) - set(WORDS) >= {"youthful"}


def test_wording_by_hand() -> None:
    def formal(text: str) -> str:
        return noisy("formal", words=text.split())

    def casual(text: str) -> str:
        return noisy("casual", words=text.split())

    assert formal("there's a bunch of kids who aren't near the tv") == (
        "there is several children who are not near the television"
    )
    assert casual("it is going to rain on several men") == "it's gonna rain on a bunch of guys"
    assert casual("a human at a manhole") == "a human at a manhole"


@given(captions, st.sampled_from(KINDS), st.integers(0, 99), st.floats(0.01, 1))
def test_any_caption_can_be_spoiled(words: list[str], kind: Kind, seed: int, share: float) -> None:
    got = noisy(kind, share, seed, words)
    assert got == noisy(kind, share, seed, words)
    assert bool(got) == bool(words) or kind == "punctuation"
    if kind.startswith("character_") or kind in ("keyboard", "ocr"):
        assert len(got.split()) == len(words)


def test_the_keyboard_is_qwerty() -> None:
    assert {key: "".join(sorted(KEYBOARD[key])) for key in "sqpm"} == {"s": "adewxz", "q": "aw", "p": "lo", "m": "jkn"}
    for table in (KEYBOARD, OCR):
        assert all(one in table[other] for one, others in table.items() for other in others)


def test_synonyms_are_read_from_a_file(tmp_path: Path, real_data: Path) -> None:
    file = tmp_path / "synonyms.txt"
    file.write_text("horse steed\nhorse pony\nman male\n")
    assert read_synonyms(file) == {"horse": ["steed", "pony"], "man": ["male"]}
    file.write_text("horse steed\nhorse\n")
    with pytest.raises(InputError, match="line 2"):
        read_synonyms(file)
    assert len(read_synonyms(real_data / "text_resources" / "ppdb_synonyms.txt")) > 10_000
