"""The image attacks of SGA, CMI-Attack, DRA and Co-Attack as published: one loss and one step after the other.

Images are `(batch, 3, height, width)` in [0, 1]; a victim gives embeddings of length 1. `owners[c]` is the image of
caption `c`. What is random is asked of `Draws`, so that the same draws can be given to something else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.published.words import divergence

SCALES = (0.5, 0.75, 1.25, 1.5)
NOISE = 0.05

ImageFeatures = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Draws:
    """What is random in an image attack.

    Attributes:
        start: `(batch, 3, height, width)` uniform in [-1, 1] of the i-th start.
        noise: The same shape, standard normal, of a step (from 1) and a copy (from 0).
        triple: `(n1, n2)` of a step and a try: `n1` uniform in 1..100, `n2` uniform in 1..max(100 - n1, 1).
    """

    start: Callable[[int], torch.Tensor]
    noise: Callable[[int, int], torch.Tensor]
    triple: Callable[[int, int], tuple[int, int]] = lambda step, trial: (98, 1)


def numpy_draws(images: torch.Tensor, seed: int = 0) -> Draws:
    """As published: float64, on the host, for the whole batch."""
    generator, shape = np.random.default_rng(seed), tuple(images.shape)

    def triple(step: int, trial: int) -> tuple[int, int]:
        first = int(generator.integers(1, 101))
        return first, int(generator.integers(1, max(100 - first, 1) + 1))

    return Draws(
        lambda start: torch.from_numpy(generator.uniform(-1, 1, shape)).to(images),
        lambda step, copy: torch.from_numpy(generator.normal(0, 1, shape)).to(images),
        triple,
    )


def scale_set(images: torch.Tensor, noise: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
    """The images, and four copies: noise added, resized bicubically, clamped once, resized back."""
    side = images.shape[-2:]
    copies = [images]
    for i, scale in enumerate(SCALES):
        small = (int(side[0] * scale), int(side[1] * scale))
        noisy = images + NOISE * noise(i)
        resized = F.interpolate(noisy, size=small, mode="bicubic", align_corners=False).clamp(0, 1)
        copies.append(F.interpolate(resized, size=side, mode="bicubic", align_corners=False))
    return copies


def set_loss(
    features: ImageFeatures, copies: list[torch.Tensor], texts: torch.Tensor, owners: torch.Tensor
) -> torch.Tensor:
    """`-sum` over copies and all captions of each image of the cosine, over the number of images."""
    images = len(copies[0])
    found, loss = features(torch.cat(copies)), torch.zeros((), device=texts.device)
    for copy in found.split(images):
        own = torch.zeros(images, len(texts), device=texts.device)
        for caption, image in enumerate(owners.tolist()):
            own[image, caption] = 1
        loss = loss - (copy @ texts.T * own).sum() / images
    return loss


def gradient(images: torch.Tensor, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Of the loss at the images, divided by its own mean magnitude per image."""
    leaf = images.detach().clone().requires_grad_(True)
    loss_of(leaf).backward()  # as published: what the model's own parameters need of it is thrown away
    assert leaf.grad is not None
    return leaf.grad / leaf.grad.abs().mean(dim=(1, 2, 3), keepdim=True)


def within(images: torch.Tensor, clean: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Projected to the ball around the clean images, then to [0, 1]."""
    return torch.min(torch.max(images, clean - epsilon), clean + epsilon).clamp(0, 1)


def random_start(clean: torch.Tensor, epsilon: float, uniform: torch.Tensor) -> torch.Tensor:
    """`clean + U(-epsilon, epsilon)` in [0, 1]."""
    return (clean + epsilon * uniform).clamp(0, 1)


def sga_images(
    features: ImageFeatures,
    clean: torch.Tensor,
    texts: torch.Tensor,
    owners: torch.Tensor,
    draws: Draws,
    epsilon: float = 2 / 255,
    step_size: float = 0.5 / 255,
    steps: int = 10,
    momentum: float = 0.0,
    inertia: torch.Tensor | float = 0.0,
    start: int = 0,
) -> torch.Tensor:
    """Steps on the scale set's loss; with momentum and the inertia it begins with, those of CMI-Attack."""
    adversarial = random_start(clean, epsilon, draws.start(start))
    for step in range(1, steps + 1):
        inertia = momentum * inertia + set_gradient(features, adversarial, texts, owners, draws, step)
        adversarial = within(adversarial + step_size * inertia.sign(), clean, epsilon)
    return adversarial


def set_gradient(
    features: ImageFeatures,
    images: torch.Tensor,
    texts: torch.Tensor,
    owners: torch.Tensor,
    draws: Draws,
    step: int,
) -> torch.Tensor:
    """Of the scale set's loss."""
    return gradient(images, lambda x: set_loss(features, scale_set(x, lambda i: draws.noise(step, i)), texts, owners))


def mixture_weights(n1: int, n2: int) -> tuple[float, float, float] | None:
    """Weights of current, clean and previous images; None where they have to be drawn again."""
    if n1 >= 99:
        n1, n2 = 98, 1
    n3 = 100 - n1 - n2
    return (n1 / 100, n2 / 100, n3 / 100) if n3 >= 1 else None


def dra_images(
    features: ImageFeatures,
    clean: torch.Tensor,
    texts: torch.Tensor,
    owners: torch.Tensor,
    draws: Draws,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
    samples: int = 5,
    free: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The adversarial images, and those of one step before.

    From step 2 on: five random mixtures of the current, clean and previous images; from each, the sign of the loss's
    gradient at one scale is taken as a step from the *current* images, neither projected nor clamped; the mixture
    whose look-ahead has the highest loss, of the whole batch at once, gives the scale set's gradient for the step.

    Args:
        features: Of the victim.
        clean: Images.
        texts: Embeddings of captions.
        owners: Of the captions.
        draws: What is random.
        epsilon: Radius.
        step_size: Of a step, and of a look-ahead.
        steps: In all.
        samples: Mixtures a step.
        free: What is looked at ahead may leave [0, 1], as published.
    """

    def plain(x: torch.Tensor) -> torch.Tensor:
        return set_loss(features, [x], texts, owners)

    previous = current = random_start(clean, epsilon, draws.start(0))
    for step in range(1, steps + 1):
        at = current
        if step > 1:
            highest, tries = -float("inf"), itertools.count()
            for _ in range(samples):
                weights = None
                while weights is None:
                    weights = mixture_weights(*draws.triple(step, next(tries)))
                mixture = weights[0] * current + weights[1] * clean + weights[2] * previous
                ahead = current + step_size * gradient(mixture, plain).sign()
                with torch.no_grad():
                    loss = float(plain(ahead if free else ahead.clamp(0, 1)))
                if loss > highest:
                    highest, at = loss, mixture
        moved = current + step_size * set_gradient(features, at, texts, owners, draws, step).sign()
        previous, current = current, within(moved, clean, epsilon)
    return current, previous


def co_attack_images(
    features: ImageFeatures,
    clean: torch.Tensor,
    texts: torch.Tensor,
    draws: Draws,
    epsilon: float = 2 / 255,
    steps: int = 10,
    weight: float = 3.0,
    one_sided: bool = True,
) -> torch.Tensor:
    """One image, and the texts that it is led away from: one caption as published, or the mean over several.

    Steps of `1.25 * epsilon / steps` up the divergence of the image's embedding from the clean image's plus three times
    that from the adversarial caption's, from a start in `U(0, epsilon)`.
    """
    with torch.no_grad():
        clean_features = features(clean)
    uniform = draws.start(0)
    adversarial = random_start(clean, epsilon, (uniform + 1) / 2 if one_sided else uniform)
    for _ in range(steps):
        grad = gradient(
            adversarial,
            lambda x: divergence(clean_features, features(x)).sum() + weight * divergence(texts, features(x)).mean(),
        )
        adversarial = within(adversarial + 1.25 * epsilon / steps * grad.sign(), clean, epsilon)
    return adversarial


def separate_images(
    features: ImageFeatures,
    clean: torch.Tensor,
    draws: Draws,
    epsilon: float = 2 / 255,
    step_size: float = 0.5 / 255,
    steps: int = 10,
) -> torch.Tensor:
    """PGD up the divergence from the clean image's embedding, with no text; the start is in `U(-epsilon, epsilon)`."""
    with torch.no_grad():
        clean_features = features(clean)
    adversarial = random_start(clean, epsilon, draws.start(0))
    for _ in range(steps):
        grad = gradient(adversarial, lambda x: divergence(clean_features, features(x)).sum())
        adversarial = within(adversarial + step_size * grad.sign(), clean, epsilon)
    return adversarial
