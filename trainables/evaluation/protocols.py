"""Evaluation protocols by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainables.attacks.natural import NATURAL_ATTACKS
from trainables.cli.command import all_mistakes, read_yaml
from trainables.config import CLEAN, AttackConfig, Protocol
from trainables.errors import InputError
from trainables.evaluation.expected import Budget

EVERYTHING = 1_000_000
"""As many evaluation images as there are."""

STRONG: tuple[str | dict[str, Any], ...] = (
    *("image", "text", "both", "co", "sga", "cmi"),
    {"name": "text-cosine", "attack": "text", "options": {"loss": "cosine"}},
    {"name": "apgd", "options": {"steps": 50}},
    {"name": "apgd-margin", "attack": "apgd", "options": {"steps": 50, "loss": "margin", "targets": 2}},
    {"name": "joint", "options": {"steps": 20}},
    {"name": "joint-tr", "attack": "joint", "options": {"steps": 20, "loss": "margin", "direction": "tr"}},
    {"name": "joint-ir", "attack": "joint", "options": {"steps": 20, "loss": "margin", "direction": "ir"}},
)

PROTOCOLS: dict[str, dict[str, Any]] = {
    # What a study measures in every trial.
    "search": {},
    # Everything that breaks queries which nothing else breaks (`benchmarks.strength`), and the audit.
    "strong": {
        "attacks": STRONG,
        "audit": True,
        "gallery_images": EVERYTHING,
    },
    # Corruptions and caption noise: nobody attacks. They are made from 8-bit images and are no larger for being floats.
    "natural": {"attacks": NATURAL_ATTACKS, "eight_bit": False, "gallery_images": EVERYTHING},
    # Images and captions over a grid of strengths, for the expected robustness.
    "grid": {"gallery_images": EVERYTHING},
}

FUSION = {"attacks": (*PROTOCOLS["strong"]["attacks"], "itm"), "rerank": 256}
"""What `strong` has beside for fusion transformers: their ranks after matching, and the attack on matching itself."""

GRID_RADII = (0.0, 0.5, 1.0, 2.0)
"""Times the protocol's epsilon."""
GRID_WORDS = (0, 1, 2)


def named_protocol(name: str, changes: Mapping[str, Any], *, fusion: bool = False) -> Protocol:
    """A protocol by name, or from a YAML file with the fields of `Protocol`.

    Args:
        name: of `PROTOCOLS`, or a path.
        changes: fields that differ.
        fusion: whether the model can match pairs.

    Raises:
        InputError: no such protocol, or fields that cannot be.
    """
    if name in PROTOCOLS:
        fields = {**PROTOCOLS[name], **(FUSION if fusion and name == "strong" else {})}
    elif Path(name).is_file():
        fields = read_yaml(Path(name))
    else:
        raise InputError(f"protocol {name!r}: no such protocol or file; protocols are {', '.join(PROTOCOLS)}")
    try:
        protocol = Protocol.model_validate({**fields, **changes})
    except ValidationError as error:
        raise all_mistakes(error, Protocol, f"protocol {name}") from None
    return protocol if name != "grid" else protocol.model_copy(update={"attacks": _grid(protocol.epsilon)})


def _grid(epsilon: float) -> tuple[AttackConfig, ...]:
    return tuple(
        AttackConfig(
            name=f"both-{radius:g}x-{words}w", attack="both", options={"epsilon": radius * epsilon, "words": words}
        )
        for radius in GRID_RADII
        for words in GRID_WORDS
        if radius or words
    )


def budgets(protocol: Protocol) -> dict[str, Budget]:
    """Radius and words of every target of the protocol `grid`."""
    found = {a.name: (float(str(a.options["epsilon"])), int(str(a.options["words"]))) for a in protocol.attacks}
    return {CLEAN: (0.0, 0), **found}
