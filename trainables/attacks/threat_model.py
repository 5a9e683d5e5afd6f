"""What an attacker may change, checked on everything that is scored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainables.attacks.contract import Attack, Attacked, Batch
from trainables.attacks.lexicon import Captions


class ThreatModelError(Exception):
    """An attack did more than its threat model allows: the numbers would be worthless."""


def check(attack: Attack, batch: Batch, attacked: Attacked) -> None:
    """Refuse to score what breaks the threat model.

    Raises:
        ThreatModelError: naming the bound.
    """
    check_images(batch.pixels, attacked.pixels, attack.epsilon if "image" in attack.changes else 0.0)
    words, characters = (attack.words, attack.characters) if "text" in attack.changes else (0, 0)
    if words is not None:
        check_captions(batch.captions(), attacked.captions, words, characters)


def check_images(clean: Tensor, attacked: Tensor, epsilon: float) -> None:
    """Refuse to score images that break the threat model.

    Raises:
        ThreatModelError: naming the bound.
    """
    if attacked is clean:
        return
    least, most = attacked.aminmax()
    moved, lowest, highest = torch.stack([(attacked - clean).abs().max(), least, most]).tolist()
    if not moved <= epsilon + 1e-6:
        raise ThreatModelError(f"an attacked pixel moved by {moved}, more than epsilon = {epsilon}")
    if not (lowest >= 0 and highest <= 1):
        raise ThreatModelError("an attacked pixel lies outside [0, 1]")


def check_captions(clean: Sequence[str], attacked: Sequence[str], words: int, characters: int = 0) -> None:
    """Refuse to score captions that break the threat model.

    Args:
        clean: before.
        attacked: after, in the same order.
        words: that may differ.
        characters: largest Levenshtein distance; above 0 it counts instead of the words.

    Raises:
        ThreatModelError: naming the caption.
    """
    if isinstance(clean, Captions) and isinstance(attacked, Captions) and clean.rows.shape == attacked.rows.shape:
        suspects = (clean.rows != attacked.rows).sum(1) > (0 if characters else words)
        clean, attacked = clean.take(suspects), attacked.take(suspects)
    for before, after in zip(clean, attacked, strict=True):
        if before == after:
            continue
        if characters:
            from rapidfuzz.distance import Levenshtein

            changed, bound, unit = Levenshtein.distance(before, after), characters, "characters"
        else:
            old, new = before.split(), after.split()
            changed = sum(a != b for a, b in zip(old, new, strict=False)) + abs(len(old) - len(new))
            bound, unit = words, "words"
        if changed > bound:
            raise ThreatModelError(f"{changed} {unit} changed, more than {bound}: {before!r} -> {after!r}")


def eight_bit(clean: Tensor, attacked: Tensor, epsilon: float) -> Tensor:
    """Attacked pixels on the 255 levels of image files, still within epsilon of `clean`, which is on them."""
    levels = math.floor(255 * epsilon + 1e-4)
    moved = ((attacked - clean) * 255).round().clamp_(-levels, levels)
    return ((clean * 255).round() + moved).clamp_(0, 255) / 255
