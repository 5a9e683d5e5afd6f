"""What a model reads of a caption: the text that its publication makes of it before the tokenizer, and its words.

A caption becomes text once, when what may replace its words is collected (`attacks.proposals`), and is text from then
on: the gallery, the training pairs, what attacks change and what is tokenised. A word is what stands between spaces. An
attack puts letters in place of a word's `core` and keeps the punctuation around it, so what it returns is text, too.
"""

from __future__ import annotations

import html
import re
import string
from collections.abc import Callable, Sequence
from unicodedata import category

from trainables.config import CaptionForm
from trainables.data.errors import DataError

CaptionText = Callable[[str], str]
"""A caption -> its text, words with single spaces between."""

MAX_WORDS = 30
"""Of a caption, in the retrieval evaluation of ALBEF and BLIP."""


def clip_text(caption: str) -> str:
    """CLIP's (clip/simple_tokenizer.py): lower-case and repaired, with all its punctuation.

    Example:
        >>> clip_text("A man &amp; his dog,  half-asleep!")
        'a man & his dog, half-asleep!'
    """
    return _spaced(_repaired(caption).lower())


def siglip_text(caption: str) -> str:
    """SigLIP's (open_clip's `canonicalize`): repaired, lower-case, without punctuation; what it joined stays joined."""
    return _spaced(_repaired(caption).translate(_SIGLIP).lower())


def albef_text(caption: str) -> str:
    """ALBEF's (dataset/utils.py): lower-case, most punctuation gone, hyphens and slashes split, at most 30 words.

    Co-Attack, SGA and those that follow them give this text to every model (SGA, dataset.py), CLIP included.

    Example:
        >>> albef_text("A man's dog, half-asleep!")
        'a mans dog half asleep'
    """
    return _first_words(caption.lower().translate(_ALBEF).replace("<person>", "person"))


def blip_text(caption: str) -> str:
    """BLIP's (data/utils.py): lower-case, some punctuation made spaces, at most 30 words.

    Example:
        >>> blip_text("A man's dog, half-asleep!")
        "a man's dog, half-asleep"
    """
    return _first_words(caption.lower().translate(_BLIP))


def bare_text(caption: str) -> str:
    """Lower-case words: letters with their marks, digits and apostrophes; hyphens and slashes split.

    Example:
        >>> bare_text("A man's dog, half-asleep!")
        "a man's dog half asleep"
    """
    if caption.isascii():  # nearly all; the same in one go
        return _spaced(caption.lower().encode().translate(_SPACES, _DROPPED).decode())
    kept, letters = True, []
    for letter in re.sub(r"[-/]", " ", caption.lower()):
        if not (kept and category(letter).startswith("M")):  # a mark goes with what it stands on
            kept = letter.isalnum() or letter in "_'"
        if kept or letter.isspace():
            letters.append(letter)
    return _spaced("".join(letters))


TEXTS: dict[str, CaptionText] = {
    "clip": clip_text,
    "siglip": siglip_text,
    "albef": albef_text,
    "blip": blip_text,
    "dual": bare_text,  # of no publication; its bag of words has no use for punctuation
}
"""By family."""


def caption_text(family: str, form: CaptionForm) -> CaptionText:
    """What a model of the family reads: its own text, or ALBEF's as in the attack literature.

    What CLIP and SigLIP do to a caption is part of their tokenizers, so they do it to ALBEF's text as well.
    """
    own = TEXTS[family]
    if form == "family":
        return own
    return (lambda caption: own(albef_text(caption))) if family in ("clip", "siglip") else albef_text


_SPACES = bytes.maketrans(b"-/", b"  ")
_DROPPED = bytes(byte for byte in range(128) if not (chr(byte).isalnum() or chr(byte).isspace() or chr(byte) in "_'-/"))
_SIGLIP = str.maketrans("_", " ", string.punctuation.replace("_", ""))
_ALBEF = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")
_BLIP = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))


def _repaired(caption: str) -> str:
    """Wrong encodings, look-alike characters and HTML entities, twice as CLIP does it."""
    if caption.isascii() and caption.isprintable() and "&" not in caption:  # nearly all, and nothing to repair
        return caption
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(caption)))


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _first_words(text: str) -> str:
    """The first 30; only where spaces are alone or double does the publication see a space, so a tab joins words."""
    words = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ").split(" ")
    return _spaced(" ".join(words[:MAX_WORDS]))


def core(word: str) -> slice:
    """Where the word stands in what is written: from its first letter or digit to its last, marks on it included.

    Example:
        >>> '"half-asleep",'[core('"half-asleep",')]
        'half-asleep'
    """
    places = [place for place, letter in enumerate(word) if letter.isalnum()]
    if not places:
        return slice(0, 0)
    end = places[-1] + 1
    while end < len(word) and category(word[end]).startswith("M"):
        end += 1
    return slice(places[0], end)


def put(other: str, word: str) -> str:
    """The word with something else in place of its core.

    Example:
        >>> put("awake", '"half-asleep",')
        '"awake",'
    """
    place = core(word)
    return word[: place.start] + other + word[place.stop :]


UNSPACED = {
    "Chinese or Japanese": (
        10,
        re.compile("[々〇\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"),
    ),
    "Thai, Lao, Burmese or Khmer": (
        24,
        re.compile("[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\ua9e0-\ua9ff\uaa60-\uaa7f]"),
    ),
}
"""Scripts without spaces: how many of their letters may still be one word, and the letters."""


def refuse_unspaced(captions: Sequence[str]) -> None:
    """Attacks count words by spaces: where there are none, one word would be the whole caption.

    Captions with spaces between such words pass, and so does a name within a caption of another script.

    Raises:
        DataError: with the captions whose words cannot be told apart.
    """
    found = [
        f"{script}: {caption!r:.80}"
        for caption in captions
        if not caption.isascii()
        for script, (longest, letters) in UNSPACED.items()
        if any(len(letters.findall(word)) > longest for word in caption.split())
    ]
    if found:
        raise DataError(
            f"{len(found)} of {len(captions)} captions have no spaces between their words, so an attack on one word "
            "could change all of it; put spaces between the words (a segmenter such as ICU's finds them), or change "
            "none: protocol.attacks on images only, no knob `words`, no recipe with words",
            found,
        )
