"""Several studies beside each other: their fronts, the front of all, and what seeds attain."""

from __future__ import annotations

from dataclasses import dataclass

from study.config import Objective
from study.front.dominance import Floats
from study.front.estimates import FrontEntry
from study.records import Manifest


@dataclass(frozen=True)
class Side:
    """A study in the comparison.

    Attributes:
        name: of the study.
        manifests: its ended trials, in the order they ended.
        entries: its front.
        history: of its hypervolume, `study.front.hypervolume.hypervolume_history`.
    """

    name: str
    manifests: list[Manifest]
    entries: list[FrontEntry]
    history: list[tuple[float, int, float, float]]


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        objectives: that all studies have measured.
        sides: the studies.
        joint: the front of all their trials together.
        surfaces: of studies that differ in the seed only, by their names joined: costs of each level, (n, 2); none
            unless there are two objectives.
        confidence: of the intervals.
    """

    objectives: tuple[Objective, ...]
    sides: list[Side]
    joint: list[FrontEntry]
    surfaces: dict[str, dict[str, Floats]]
    confidence: float

    def on_joint(self, side: Side) -> int:
        """Trials of a study on the joint front."""
        return len({entry.key for entry in self.joint} & {entry.key for entry in side.entries})
