"""How knobs are written where there is little room: the symbols of the papers, and values with their units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from trainables.config import Point


class Symbol(NamedTuple):
    """Of one knob.

    Attributes:
        plain: in ASCII, for terminals and logs.
        letter: as papers print it.
        meaning: for a legend.
    """

    plain: str
    letter: str
    meaning: str


SYMBOLS: dict[str, Symbol] = {
    "contrastive_weight": Symbol("w", "w", "weight of the contrastive loss"),
    "temperature": Symbol("tau", "τ", "temperature"),
    "temperature_learned": Symbol("learn", "learn τ", "whether the temperature is learned from there"),
    "epsilon": Symbol("eps", "ε", "radius of the training attack, in 1/255"),
    "attack_steps": Symbol("steps", "steps", "PGD steps of the training attack"),
    "words": Symbol("words", "words", "words the training attack changes in a caption"),
    "text_search": Symbol("search", "search", "how the training attack finds the words it changes"),
    "companion": Symbol("companion", "companion", "the other loss, of weight 1 - w"),
    "pairs": Symbol("pairs", "pairs", "which pairs the contrastive loss takes"),
    "distillation": Symbol("alpha", "α", "share of the targets that the momentum copy sets"),
    "epsilon_start": Symbol("eps0", "ε₀", "radius before the ramp, in 1/255"),
    "ramp_begin": Symbol("begin", "ramp from", "share of the training after which the radius rises"),
    "ramp_end": Symbol("end", "ramp to", "share of the training at which it is the whole radius"),
    "captions_per_image": Symbol("captions", "captions", "captions an image is paired with"),
    "text_augmentation": Symbol("text", "text", "augmentation of captions"),
    "image_augmentation": Symbol("image", "image", "augmentation of images"),
    "trainable": Symbol("trains", "trains", "which part is trained"),
    "attack_objective": Symbol("attack", "attack", "what the image attack leads away from"),
}
"""In the order in which they are shown."""

RADII = ("epsilon", "epsilon_start")
"""Shown in parts of 255."""

_DEFAULTS = Point.model_construct().model_dump(mode="json")


def written(name: str, value: Any) -> str:
    """A knob's value in its own unit, three digits of it: radii in 1/255, switches as yes and no.

    Example:
        >>> written("epsilon", 2 / 255), written("temperature", 0.0333333), written("temperature_learned", True)
        ('2', '0.0333', 'yes')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in RADII:
        return f"{255 * float(value):.3g}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """A measurement: three decimals where there is no more than 1, four digits of what is larger.

    Example:
        >>> number(0.83), number(1.0), number(1234.5)
        ('0.830', '1.000', '1234')
    """
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """In the largest unit that leaves two digits.

    Example:
        >>> duration(18720), duration(2580), duration(12)
        ('5.2 h', '43 min', '12 s')
    """
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def ordered(names: Iterable[str]) -> list[str]:
    """Knobs as they are shown, each once."""
    place = {name: index for index, name in enumerate(SYMBOLS)}
    return sorted(dict.fromkeys(names), key=lambda name: place.get(name, len(place)))


def telling(params: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a trial from others: the knobs that were searched, and what of its point is not the default.

    Args:
        params: as the sampler proposed them; empty for a recipe outside the space.
        point: what was trained with, whole.
    """
    names = {*params, *(name for name, value in point.items() if name in _DEFAULTS and value != _DEFAULTS[name])}
    return {name: point.get(name, params.get(name)) for name in ordered(names)}


def in_words(settings: Mapping[str, Any]) -> str:
    """Settings on one line.

    Example:
        >>> in_words({"contrastive_weight": 1.0, "epsilon": 2 / 255, "words": 1})
        'w=1 eps=2/255 words=1'
    """
    return " ".join(
        f"{SYMBOLS[name].plain if name in SYMBOLS else name}={written(name, value)}{'/255' * (name in RADII)}"
        for name, value in settings.items()
    )
