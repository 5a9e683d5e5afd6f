"""The evaluation protocol: retrieval on clean pairs and on pairs attacked in image, text and both."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.candidates import numbered
from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.encoding import CaptionEncoder, encode_captions
from trainables.attacks.lexicon import Captions, lexicon_of
from trainables.attacks.quirks import Quirks
from trainables.attacks.registry import build_attacks
from trainables.attacks.substitutes import Substitutes
from trainables.attacks.threat_model import check, eight_bit
from trainables.captions import CaptionText
from trainables.config import CLEAN, FLOAT, MATCHING, Protocol
from trainables.errors import InputError
from trainables.evaluation.batching import batches, images_at_once
from trainables.evaluation.parts import Kept, Made, Part, found_again, joined
from trainables.evaluation.reranking import compact, reranked
from trainables.evaluation.retrieval import Ranks, retrieval_ranks
from trainables.models import FusionModel, RetrievalModel
from trainables.precision import attackable


@dataclass(frozen=True)
class Gallery:
    """What is retrieved from.

    Attributes:
        pixels: uint8 (images, 3, height, width).
        caption_image: (captions,) index of each caption's image.
        caption_groups: (captions,) equal for equal words.
        substitutes: the captions' words and what may replace them, in the same order.
        quirky_substitutes: makes those under `SUBSTITUTE_QUIRKS`.
        caption_text: what the texts were made by.
    """

    pixels: np.ndarray
    caption_image: np.ndarray
    caption_groups: np.ndarray
    substitutes: Substitutes
    quirky_substitutes: Callable[[Quirks], Substitutes]
    caption_text: CaptionText

    @property
    def texts(self) -> list[str]:
        """(captions,) as the model reads them."""
        return self.substitutes.texts()

    def captions(self, model: RetrievalModel) -> Captions:
        """As the model's lexicon numbers their words, on the host."""
        lexicon = lexicon_of(model.tokenizer)
        words, _ = numbered(self.substitutes, np.arange(len(self.caption_image)), lexicon, 0)
        return Captions(torch.from_numpy(words), lexicon)

    def first(self, images: int) -> Gallery:
        """The gallery of the first `images` images and their captions."""
        rows = np.flatnonzero(self.caption_image < images)
        return Gallery(
            self.pixels[:images],
            self.caption_image[rows],
            self.caption_groups[rows],
            self.substitutes.take(rows),
            cache(lambda quirks: self.quirky_substitutes(quirks).take(rows)),
            self.caption_text,
        )

    def batch(self, victim: Victim, labels: np.ndarray, seed: int) -> Batch:
        """Some images, by their places, with all their captions."""
        device = victim.text_features.device
        rows, levels = np.flatnonzero(np.isin(self.caption_image, labels)), self.pixels[labels]
        return Batch(
            pixels=moved(levels, device) / 255,
            labels=torch.as_tensor(labels, device=device),
            caption_rows=rows,
            owner=torch.as_tensor(np.searchsorted(labels, self.caption_image[rows]), device=device),
            substitutes=self.substitutes,
            quirky_substitutes=self.quirky_substitutes,
            caption_text=self.caption_text,
            encode=CaptionEncoder(victim.model, victim.max_tokens, device),
            seed=seed,
            levels=levels,
        )


def moved(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; nothing waits for the copy."""
    found = torch.from_numpy(array)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


Observe = Callable[[str, np.ndarray, Attacked], None]
"""Called with an attack's name, the gallery places of a batch's images, and what of the batch is scored."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured, by target.

    Attributes:
        ranks: of every query.
        features: L2-normalised, of images (images, dim) and captions (captions, dim).
        images_at_once: attacked together by this worker in the end: fewer than in the beginning if memory did not hold
            those.
    """

    ranks: dict[str, Ranks]
    features: dict[str, tuple[Tensor, Tensor]]
    images_at_once: int = 0


def evaluate(
    model: RetrievalModel,
    gallery: Gallery,
    protocol: Protocol,
    *,
    max_tokens: int,
    device: torch.device,
    attacks: Mapping[str, Attack] | None = None,
    observe: Observe = lambda name, images, attacked: None,
    beat: Callable[[], object] = lambda: None,
    kept: Kept | None = None,
) -> Evaluation:
    """Measure each of the protocol's targets, equally for any number of workers.

    Both galleries are attacked, so an attacked caption is also everybody's distractor. The trial's temperature is not
    used. Workers of a process group each attack a share of the images with their captions. Of the attacked pixels only
    one batch is held at a time. Where memory does not hold a batch, halves of it are attacked, each worker for itself.

    Args:
        model: parameters and mode are as before afterwards.
        gallery: what is retrieved from.
        protocol: the attacks and their budgets.
        max_tokens: where captions are cut.
        device: of the model.
        attacks: instead of those that the protocol builds, under the same names.
        observe: sees every attacked batch.
        beat: called now and then.
        kept: of this model, gallery and protocol, by an earlier attempt; what is found there is not done again, and not
            observed.

    Raises:
        InputError: the protocol names an attack that does not exist, or asks for what the model cannot do.
        ThreatModelError: an attack went beyond its budget.
    """
    if protocol.rerank and not isinstance(model, FusionModel):
        raise InputError(f"protocol.rerank: {type(model).__name__} has no fusion transformer to match pairs with")
    if attacks is None:
        attacks = build_attacks(protocol)
    images = len(gallery.pixels)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own_images = np.array_split(np.arange(images), world)[rank]
    made: dict[str, Made] = {}
    with attackable(model, device), tempfile.TemporaryDirectory() as spool:
        own_captions = np.flatnonzero(np.isin(gallery.caption_image, own_images))
        count = len(gallery.caption_image)
        clean = gallery.captions(model)
        own_texts = encode_captions(model, clean.take(own_captions), max_tokens, device)
        clean_texts = _shared(own_texts, own_captions, count)
        size = images_at_once(model, moved(gallery.pixels[[0]], device) / 255, protocol, attacks.values(), device)
        own_features = image_features(model, gallery.pixels, own_images, size, device)
        clean_images = _shared(own_features, own_images, images)
        owners, groups = (
            torch.as_tensor(part, device=device) for part in (gallery.caption_image, gallery.caption_groups)
        )
        victim = Victim(model, max_tokens, clean_texts, clean_images, owners, groups)
        if protocol.rerank:
            made = {
                name: Made.empty(Path(spool), name, gallery.pixels, clean, attack, protocol.eight_bit)
                for name, attack in attacks.items()
            }

        def attack_all(labels: np.ndarray) -> Part:
            batch = gallery.batch(victim, labels, protocol.seed)
            batch.encode.know(batch.captions(), clean_texts[moved(batch.caption_rows, device)])
            views: dict[tuple[int, float], list[tuple[Tensor, Tensor]]] = {}  # `both` shares those of `image`
            scored = {CLEAN: (batch.clean_features(victim), batch.encode(batch.captions()))}
            for name, attack in attacks.items():
                attacked = batch.once(attack, victim)
                check(attack, batch, attacked)
                key = id(attacked.pixels), attack.epsilon
                if key not in views:
                    views[key] = _views(victim, batch, attack, attacked, protocol.eight_bit)
                seen = Attacked(views[key][0][0], attacked.captions)
                observe(name, labels, seen)
                if name in made:
                    made[name].add(labels, batch.caption_rows, seen)
                text_features = batch.encode(attacked.captions)
                for ending, (_, image_features) in zip(("", FLOAT), views[key], strict=False):
                    scored[name + ending] = image_features, text_features
                beat()
            return Part(labels, batch.caption_rows, scored)

        parts = [] if kept is None else found_again(kept, own_images, device, made)
        done = np.concatenate([np.empty(0, np.int64), *(part.images for part in parts)])
        unsaved: list[Part] = []
        alone, at_once = all(attack.alone for attack in attacks.values()), 0
        for part in batches(own_images, size, attack_all, halve=alone, done=done):
            parts.append(part)
            unsaved.append(part)
            at_once = len(part.images)
            if kept is not None and kept.due():
                kept.save(joined(unsaved).piece(made))
                unsaved.clear()
        features = {}
        own = joined(parts)
        for target, (image, text) in own.scored.items():
            features[target] = _shared(image, own.images, images), _shared(text, own.captions, count)
        ranks = {
            target: retrieval_ranks(image, text, gallery.caption_image, gallery.caption_groups)
            for target, (image, text) in features.items()
        }
        if protocol.rerank and isinstance(model, FusionModel):
            made[CLEAN] = Made(gallery.pixels, clean)
            for target, pairs in made.items():
                ranks[target + MATCHING] = reranked(
                    model,
                    ranks[target],
                    _image_tokens(model, pairs.pixels, own_images, size, device),
                    features[target][0],
                    pairs.everyones(own_captions),
                    features[target][1],
                    gallery.caption_groups,
                    candidates=protocol.rerank,
                    max_tokens=max_tokens,
                    own_images=own_images,
                    beat=beat,
                )
    return Evaluation({target: ranks[target] for target in protocol.targets}, features, at_once)


@torch.no_grad()
def image_features(
    model: RetrievalModel, pixels: np.ndarray, images: np.ndarray, count: int, device: torch.device
) -> Tensor:
    """L2-normalised, (images, dim), of clean images by their places, `count` at a time."""

    def encoded(labels: np.ndarray) -> Tensor:
        return F.normalize(model.encode_image(moved(pixels[labels], device) / 255).float(), dim=-1)

    return torch.cat(list(batches(images, count, encoded)))


def _views(
    victim: Victim, batch: Batch, attack: Attack, attacked: Attacked, rounded: bool
) -> list[tuple[Tensor, Tensor]]:
    """Pixels and features of what is scored of the images: rounded to 8 bits, if they are, and as they are."""
    if "image" not in attack.changes:
        return [(batch.pixels, batch.clean_features(victim))] * (1 + rounded)
    levels = [eight_bit(batch.pixels, attacked.pixels, attack.epsilon)] if rounded else []
    with torch.no_grad():
        return [(pixels, victim.encode_image(pixels)) for pixels in (*levels, attacked.pixels)]


@torch.no_grad()
def _image_tokens(
    model: FusionModel, pixels: np.ndarray, own: np.ndarray, count: int, device: torch.device
) -> Iterator[Tensor]:
    scale = 255 if pixels.dtype == np.uint8 else 1
    yield from batches(own, count, lambda labels: compact(model.image_tokens(moved(pixels[labels], device) / scale)))


def _shared(rows: Tensor, places: np.ndarray, total: int) -> Tensor:
    """Every worker's rows, each at its place, (total, dim)."""
    if not dist.is_initialized():
        in_order = bool((places[:-1] < places[1:]).all())
        return rows if in_order else rows[torch.from_numpy(places.argsort()).to(rows.device)]
    everyone = torch.zeros(total, rows.shape[1], device=rows.device)
    everyone[torch.as_tensor(places, device=rows.device)] = rows
    dist.all_reduce(everyone)
    return everyone
