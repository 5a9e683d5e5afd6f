"""The attack on characters: LEAF's (Rocamora et al. 2025), on strings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.encoding import Encode
from trainables.attacks.noise import step_keys, uniform
from trainables.attacks.text import Misfit, away_from

ROUNDING = 1e-6
"""Cosines that differ by less are the same: of captions that only differ in spaces, which tokenizers do not see."""

ALPHABET = "abcdefghijklmnopqrstuvwxyz "
"""Characters that may be put in; the empty string takes one out."""


@dataclass(frozen=True)
class CharacterAttack(Attack):
    """Characters inserted, replaced or deleted: the attack of LEAF (Rocamora et al. 2025), guided by the image.

    Of `positions` random places the one where a blank hurts most is chosen, then the best of `replacements` random
    characters there. The places between characters count too, so that one choice covers insertions.

    Attributes:
        characters: largest Levenshtein distance.
        positions: random places tried.
        replacements: random characters tried at the chosen place.
    """

    changes = frozenset({"text"})
    characters: int = 1
    positions: int = 20
    replacements: int = 20

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """Against the clean images; every step's randomness belongs to the caption."""
        current = list(batch.captions())
        misfit = away_from(batch.clean_features(victim)[batch.owner])
        everything = torch.arange(len(current), device=batch.pixels.device)
        reached = misfit(batch.encode(current), everything).tolist()
        for step in range(self.characters):
            draws = uniform(step_keys(batch.caption_keys, step), (2, max(self.positions, self.replacements))).tolist()
            spots = [
                sorted({int(draw * (2 * len(text) + 1)) for draw in draws[row][0][: self.positions]})
                for row, text in enumerate(current)
            ]
            tries = [(row, _edited(current[row], spot, " "), spot) for row, found in enumerate(spots) for spot in found]
            chosen = {row: spot for row, (_, _, spot) in _highest(batch.encode, misfit, tries, {}).items()}
            tries = [
                (row, _edited(current[row], spot, character), spot)
                for row, spot in chosen.items()
                for character in dict.fromkeys(
                    ["", *(ALPHABET[int(draw * len(ALPHABET))] for draw in draws[row][1][: self.replacements])]
                )
            ]
            bounds = dict(enumerate(reached))
            for row, (value, text, _) in _highest(batch.encode, misfit, tries, bounds).items():
                current[row], reached[row] = text, value
        return Attacked(batch.pixels, current)


def _edited(text: str, spot: int, character: str) -> str:
    """Odd spots are characters, even ones the gaps before them."""
    place, replace = divmod(spot, 2)
    return text[:place] + character + text[place + replace :]


def _highest(
    encode: Encode, misfit: Misfit, tries: list[tuple[int, str, int]], above: dict[int, float]
) -> dict[int, tuple[float, str, int]]:
    features = encode([text for _, text, _ in tries])
    values = misfit(features, torch.tensor([row for row, _, _ in tries], device=features.device)).tolist()
    best: dict[int, tuple[float, str, int]] = {}
    for (row, text, spot), value in zip(tries, values, strict=True):
        if value > (best[row][0] if row in best else above.get(row, -np.inf)) + ROUNDING:
            best[row] = (value, text, spot)
    return best
