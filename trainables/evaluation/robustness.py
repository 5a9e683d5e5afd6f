"""The evaluation protocol: retrieval on clean pairs and on pairs attacked in image, text and both."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.registry import build_attack
from trainables.attacks.substitutes import Substitutes
from trainables.attacks.text import CaptionEncoder, encode_captions
from trainables.config import CLEAN, FLOAT, Metric, Protocol
from trainables.evaluation.intervals import recall_metrics
from trainables.evaluation.retrieval import Ranks, retrieval_ranks
from trainables.models import RetrievalModel


class ThreatModelError(Exception):
    """An attack did more than its threat model allows: the numbers would be worthless."""


@dataclass(frozen=True)
class Gallery:
    """What is retrieved from.

    Attributes:
        pixels: uint8 (images, 3, height, width).
        caption_image: (captions,) index of each caption's image.
        caption_groups: (captions,) equal for equal texts.
        substitutes: the captions' words and what may replace them, in the same order.
        compat_substitutes: makes those the published code would read.
    """

    pixels: np.ndarray
    caption_image: np.ndarray
    caption_groups: np.ndarray
    substitutes: Substitutes
    compat_substitutes: Callable[[], Substitutes]

    @property
    def texts(self) -> list[str]:
        """(captions,) lower-case, without punctuation."""
        return self.substitutes.texts()

    def first(self, images: int) -> Gallery:
        """The gallery of the first `images` images and their captions."""
        rows = np.flatnonzero(self.caption_image < images)
        return Gallery(
            self.pixels[:images],
            self.caption_image[rows],
            self.caption_groups[rows],
            self.substitutes.take(rows),
            lambda: self.compat_substitutes().take(rows),
        )


Observe = Callable[[str, np.ndarray, Attacked], None]
"""Called with an attack's name, the gallery places of a batch's images, and what the attack made of the batch."""


def evaluate(
    model: RetrievalModel,
    gallery: Gallery,
    protocol: Protocol,
    *,
    max_tokens: int,
    device: torch.device,
    observe: Observe = lambda name, images, attacked: None,
) -> dict[str, Ranks]:
    """Ranks for each of the protocol's targets, equal for any number of workers.

    Both galleries are attacked, so an attacked caption is also everybody's distractor. The trial's temperature is not
    used. Workers of a process group each attack a share of the images with their captions. Of the attacked pixels only
    one batch is held at a time.

    Raises:
        InputError: the protocol names an attack that does not exist.
        ThreatModelError: an attack went beyond its budget.
    """
    attacks = {config.name: build_attack(config, protocol) for config in protocol.attacks}
    images = len(gallery.pixels)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own_images = np.array_split(np.arange(images), world)[rank]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    found = _Features()
    with _autocast(device):
        own_captions = np.flatnonzero(np.isin(gallery.caption_image, own_images))
        texts = gallery.texts
        own_texts = encode_captions(model, [texts[row] for row in own_captions], max_tokens, device)
        clean_texts = _shared(own_texts, own_captions, len(texts))
        owners = torch.as_tensor(gallery.caption_image, device=device)
        victim = Victim(model, max_tokens, clean_texts, owners, images)
        for labels in np.array_split(own_images, max(1, -(-len(own_images) // protocol.batch_images))):
            batch = _batch(victim, gallery, labels, protocol.seed, device)
            found.add(CLEAN, batch.clean_features(victim), batch.encode(batch.captions()))
            for name, attack in attacks.items():
                attacked = batch.once(attack, victim)
                check(attack, batch, attacked)
                observe(name, labels, attacked)
                text_features = batch.encode(attacked.captions)
                for target, pixels in scored_pixels(name, attacked.pixels, protocol.eight_bit):
                    with torch.no_grad():
                        found.add(target, victim.encode_image(pixels), text_features)
    for parameter in trained:
        parameter.requires_grad_(True)
    model.train(training)
    ranks = {}
    for target in protocol.targets:
        image, text = found.of(target)
        ranks[target] = retrieval_ranks(
            _shared(image, own_images, images),
            _shared(text, own_captions, len(texts)),
            gallery.caption_image,
            gallery.caption_groups,
        )
    return ranks


def _autocast(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


class _Features:
    """Image and text features by target, batch after batch."""

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, target: str, image: Tensor, text: Tensor) -> None:
        self._parts.setdefault(target, []).append((image, text))

    def of(self, target: str) -> tuple[Tensor, Tensor]:
        images, texts = zip(*self._parts[target], strict=True)
        return torch.cat(images), torch.cat(texts)


def scored_pixels(name: str, pixels: Tensor, eight_bit: bool) -> list[tuple[str, Tensor]]:
    """Targets and the pixels they are scored on: as they are, or rounded to 8 bits and beside it as they are."""
    if not eight_bit:
        return [(name, pixels)]
    return [(name, (pixels * 255).round() / 255), (name + FLOAT, pixels)]


def _batch(victim: Victim, gallery: Gallery, labels: np.ndarray, seed: int, device: torch.device) -> Batch:
    rows = np.flatnonzero(np.isin(gallery.caption_image, labels))
    return Batch(
        pixels=torch.tensor(gallery.pixels[labels], device=device) / 255,
        labels=torch.as_tensor(labels, device=device),
        caption_rows=rows,
        owner=torch.as_tensor(np.searchsorted(labels, gallery.caption_image[rows]), device=device),
        substitutes=gallery.substitutes,
        compat_substitutes=gallery.compat_substitutes,
        encode=CaptionEncoder(victim.model, victim.max_tokens, device),
        seed=seed,
    )


def _shared(rows: Tensor, places: np.ndarray, total: int) -> Tensor:
    """Every worker's rows, each at its place, (total, dim)."""
    if not dist.is_initialized():
        return rows
    everyone = torch.zeros(total, rows.shape[1], device=rows.device)
    everyone[torch.as_tensor(places, device=rows.device)] = rows
    dist.all_reduce(everyone)
    return everyone


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
    moved = (attacked - clean).abs().max().item()
    if not moved <= epsilon + 1e-6:
        raise ThreatModelError(f"an attacked pixel moved by {moved}, more than epsilon = {epsilon}")
    if not (attacked.min().item() >= 0 and attacked.max().item() <= 1):
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
    for before, after in zip(clean, attacked, strict=True):
        if before == after:
            continue
        if characters:
            changed, bound, unit = Levenshtein.distance(before, after), characters, "characters"
        else:
            old, new = before.split(), after.split()
            changed = sum(a != b for a, b in zip(old, new, strict=False)) + abs(len(old) - len(new))
            bound, unit = words, "words"
        if changed > bound:
            raise ThreatModelError(f"{changed} {unit} changed, more than {bound}: {before!r} -> {after!r}")


def result_metrics(ranks: dict[str, Ranks], protocol: Protocol) -> dict[str, Metric]:
    """All metrics of the protocol, with intervals."""
    return {
        f"{target}/{name}": metric
        for target, target_ranks in ranks.items()
        for name, metric in recall_metrics(
            target_ranks,
            protocol.recall_at,
            samples=protocol.bootstrap_samples,
            confidence=protocol.confidence,
            seed=protocol.seed,
        ).items()
    }


def correct_bits(ranks: dict[str, Ranks], protocol: Protocol) -> dict[str, str]:
    """Which queries were answered, by `target/direction_rk`: bits packed by `np.packbits`, in base64."""
    return {
        f"{target}/{direction}_r{k}": base64.b64encode(np.packbits(values <= k).tobytes()).decode()
        for target, target_ranks in ranks.items()
        for direction, values in (("tr", target_ranks.tr), ("ir", target_ranks.ir))
        for k in protocol.recall_at
    }
