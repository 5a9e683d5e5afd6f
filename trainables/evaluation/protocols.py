"""Evaluation protocols by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainables.command import InputError, all_mistakes, read_yaml
from trainables.config import Protocol

EVERYTHING = 1_000_000
"""As many evaluation images as there are."""

PROTOCOLS: dict[str, dict[str, Any]] = {
    # What a study measures in every trial.
    "search": {},
    # The multimodal attacks of the literature, the strongest torchattacks has, and the audit.
    "strong": {
        "attacks": ("image", "text", "both", "co", "sga", "cmi", "torchattacks:APGD"),
        "audit": True,
        "gallery_images": EVERYTHING,
    },
}


def named_protocol(name: str, changes: Mapping[str, Any]) -> Protocol:
    """A protocol by name, or from a YAML file with the fields of `Protocol`.

    Args:
        name: of `PROTOCOLS`, or a path.
        changes: fields that differ.

    Raises:
        InputError: no such protocol, or fields that cannot be.
    """
    if name in PROTOCOLS:
        fields = PROTOCOLS[name]
    elif Path(name).is_file():
        fields = read_yaml(Path(name))
    else:
        raise InputError(f"protocol {name!r}: no such protocol or file; protocols are {', '.join(PROTOCOLS)}")
    try:
        return Protocol.model_validate({**fields, **changes})
    except ValidationError as error:
        raise all_mistakes(error, f"protocol {name}") from None
