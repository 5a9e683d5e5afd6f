"""Ours beside the published algorithm at equal results; the ratio is what counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One comparison. `equal` tells whether both gave the same result."""

    name: str
    reference_seconds: float
    seconds: float
    equal: bool
    note: str = ""
