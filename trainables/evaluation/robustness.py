"""The evaluation protocol: retrieval on clean pairs and on pairs attacked in image, text and both."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from trainables.attacks.text import Substitutes, attack_captions, encode_captions
from trainables.config import Metric, Protocol
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
    """

    pixels: np.ndarray
    caption_image: np.ndarray
    caption_groups: np.ndarray
    substitutes: Substitutes

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
        )


class RetrievalClassifier(nn.Module):
    """Image-to-text retrieval as classification, so that classification attacks apply.

    A class is a gallery image, its logit the log-sum-exp over its captions. Similarities are divided by their own
    standard deviation over the gallery (held constant in the gradient): the loss has no temperature and does not see
    the scale of the similarities, so no trained temperature can hide its gradient.
    """

    SHARPNESS = 3.0

    def __init__(self, model: RetrievalModel, text_features: Tensor, caption_image: Tensor, images: int) -> None:
        super().__init__()
        self.model, self.text_features = model, text_features
        self.caption_image, self.images = caption_image, images

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> logits (batch, images)."""
        scores = F.normalize(self.model.encode_image(pixels).float(), dim=-1) @ self.text_features.T
        scores = self.SHARPNESS * scores / scores.std(1, keepdim=True).detach().clamp_min(1e-12)
        top = scores.amax(1, keepdim=True).detach()
        sums = torch.zeros(len(scores), self.images, device=scores.device)
        return sums.index_add(1, self.caption_image, (scores - top).exp()).clamp_min(1e-30).log() + top


def evaluate(
    model: RetrievalModel,
    gallery: Gallery,
    protocol: Protocol,
    *,
    image_steps: int,
    max_tokens: int,
    device: torch.device,
) -> dict[str, Ranks]:
    """Ranks for each of `config.TARGETS`, equal for any number of workers.

    Sep-Attack: images are attacked against the clean captions, captions against the clean images, independently. Both
    galleries are attacked, so an attacked caption is also everybody's distractor. The trial's temperature is not used.
    Workers of a process group each attack a share of the images with their captions.
    """
    images = len(gallery.pixels)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own_images = np.array_split(np.arange(images), world)[rank]
    own_captions = np.flatnonzero(np.isin(gallery.caption_image, own_images))
    clean_texts = gallery.texts
    caption_image = torch.as_tensor(gallery.caption_image, device=device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)

    texts = _shared(
        encode_captions(model, [clean_texts[row] for row in own_captions], max_tokens, device),
        own_captions,
        len(clean_texts),
    )
    classifier = RetrievalClassifier(model, texts, caption_image, images)
    clean_parts, attacked_parts = [], []
    for rows in np.array_split(own_images, max(1, -(-len(own_images) // protocol.batch_images))):
        pixels = torch.tensor(gallery.pixels[rows], device=device) / 255
        attacked = _attack_images(classifier, pixels, rows, protocol.epsilon, image_steps)
        check_images(pixels, attacked, protocol.epsilon)
        with torch.no_grad():
            clean_parts.append(F.normalize(model.encode_image(pixels).float(), dim=-1))
            attacked_parts.append(F.normalize(model.encode_image(attacked).float(), dim=-1))
    clean = _shared(torch.cat(clean_parts), own_images, images)
    attacked_images = _shared(torch.cat(attacked_parts), own_images, images)
    attacked_captions = attack_captions(
        model,
        own_captions,
        gallery.substitutes,
        clean[caption_image[own_captions]],
        words=protocol.words,
        count=protocol.candidates,
        max_tokens=max_tokens,
    )
    check_captions([clean_texts[row] for row in own_captions], attacked_captions, protocol.words)
    attacked_texts = _shared(
        encode_captions(model, attacked_captions, max_tokens, device), own_captions, len(clean_texts)
    )

    for parameter in trained:
        parameter.requires_grad_(True)
    model.train(training)
    pairs = {
        "clean": (clean, texts),
        "image": (attacked_images, texts),
        "text": (clean, attacked_texts),
        "both": (attacked_images, attacked_texts),
    }
    return {
        target: retrieval_ranks(image, text, gallery.caption_image, gallery.caption_groups)
        for target, (image, text) in pairs.items()
    }


def _attack_images(
    classifier: RetrievalClassifier, pixels: Tensor, labels: np.ndarray, epsilon: float, steps: int
) -> Tensor:
    """PGD by torchattacks without a random start, so that the result does not depend on how images are batched."""
    if epsilon == 0:
        return pixels
    attack = torchattacks.PGD(classifier, eps=epsilon, alpha=2.5 * epsilon / steps, steps=steps, random_start=False)
    attack.set_device(pixels.device)
    return attack(pixels, torch.tensor(labels, device=pixels.device)).detach()


def _shared(rows: Tensor, places: np.ndarray, total: int) -> Tensor:
    """Every worker's rows, each at its place, (total, dim)."""
    if not dist.is_initialized():
        return rows
    everyone = torch.zeros(total, rows.shape[1], device=rows.device)
    everyone[torch.as_tensor(places, device=rows.device)] = rows
    dist.all_reduce(everyone)
    return everyone


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


def check_captions(clean: Sequence[str], attacked: Sequence[str], words: int) -> None:
    """Refuse to score captions that break the threat model.

    Raises:
        ThreatModelError: naming the caption.
    """
    for before, after in zip(clean, attacked, strict=True):
        old, new = before.split(), after.split()
        changed = sum(a != b for a, b in zip(old, new, strict=False)) + abs(len(old) - len(new))
        if changed > words:
            raise ThreatModelError(f"{changed} words changed, more than {words}: {before!r} -> {after!r}")


def result_metrics(ranks: dict[str, Ranks], protocol: Protocol) -> dict[str, Metric]:
    """All metrics of `config.metric_names`, with intervals."""
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
