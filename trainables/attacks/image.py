"""Attacks on pixels: projected sign ascent, and torchattacks on retrieval as classification."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.noise import step_keys, uniform
from trainables.attacks.text import embedding_divergence
from trainables.precision import full_precision, inner_products

Objective = Callable[[Tensor, int], Tensor]
"""(pixels, step) -> one value a sample, (batch,), which the attack raises; rows must not depend on each other."""


def random_start(pixels: Tensor, epsilon: float, keys: Tensor, *, one_sided: bool = False) -> Tensor:
    """Uniform within the ball, or, as Co-Attack's code has it, only upwards: U(0, epsilon)."""
    draw = uniform(keys, tuple(pixels.shape[1:]))
    return (pixels + epsilon * (draw if one_sided else 2 * draw - 1)).clamp_(0, 1)


def sign_ascent(
    pixels: Tensor,
    objective: Objective,
    start: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    momentum: float = 0.0,
    velocity: Tensor | None = None,
) -> Tensor:
    """Raise `objective` within an L-infinity ball (Madry et al. 2018; with momentum, Dong et al. 2018).

    Only the gradient with respect to the pixels is computed; the caller puts the model in eval mode. Nothing waits for
    the device.

    Args:
        pixels: float (batch, 3, height, width) in [0, 1], the centre of the ball.
        objective: what is raised.
        start: where to begin, in the ball.
        epsilon: radius in [0, 1] pixels.
        step_size: in [0, 1] pixels.
        steps: gradient steps.
        momentum: share of the velocity that is kept; 0 is plain PGD.
        velocity: to begin with, like a gradient divided by its mean magnitude.

    Returns:
        Adversarial pixels, within epsilon of `pixels` and in [0, 1].
    """
    low, high = (pixels - epsilon).clamp_(min=0), (pixels + epsilon).clamp_(max=1)
    adversarial = start.detach()
    for step in range(steps):
        direction = input_gradient(adversarial, objective, step)
        if momentum:
            velocity = unit_gradient(direction) + (0 if velocity is None else momentum * velocity)
            direction = velocity
        adversarial = torch.clamp(adversarial + step_size * direction.sign(), low, high)
    return adversarial


def input_gradient(pixels: Tensor, objective: Objective, step: int = 0) -> Tensor:
    """Gradient of each row's objective with respect to that row, like `pixels`."""
    return value_and_gradient(pixels, objective, step)[1]


def value_and_gradient(pixels: Tensor, objective: Objective, step: int = 0) -> tuple[Tensor, Tensor]:
    """Each row's objective, (batch,), and its gradient with respect to that row, like `pixels`."""
    pixels = pixels.detach().requires_grad_(True)
    raised = objective(pixels, step)
    with full_precision():  # going back is as precise as going forth was: under autocast it would all be bfloat16
        (gradient,) = torch.autograd.grad(raised.sum(), pixels)
    return raised.detach(), gradient


def unit_gradient(gradient: Tensor) -> Tensor:
    """Divided by the mean magnitude of its row."""
    return gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-30)


def pgd(pixels: Tensor, objective: Callable[[Tensor], Tensor], *, epsilon: float, steps: int, keys: Tensor) -> Tensor:
    """The training attack: PGD from a uniform random start, with steps of 1.25 epsilon / steps.

    One step is FGSM-RS (Wong et al. 2020), ten have Co-Attack's step size (Zhang et al. 2022).

    Args:
        pixels: float (batch, 3, height, width) in [0, 1].
        objective: maps such pixels to one value a sample, (batch,); rows must not depend on each other.
        epsilon: radius in [0, 1] pixels.
        steps: gradient steps, at least 1.
        keys: int64 (batch,), see `noise.sample_keys`.

    Returns:
        Adversarial pixels, within epsilon of `pixels` and in [0, 1].
    """
    return sign_ascent(
        pixels,
        lambda adversarial, _: objective(adversarial),
        random_start(pixels, epsilon, keys),
        epsilon=epsilon,
        step_size=1.25 * epsilon / steps,
        steps=steps,
    )


class RetrievalClassifier(nn.Module):
    """Image-to-text retrieval as classification, so that classification attacks apply.

    A class is a gallery image, its logit the log-sum-exp over its captions. Similarities are divided by their own
    standard deviation over the gallery (held constant in the gradient): the loss has no temperature and does not see
    the scale of the similarities, so no trained temperature can hide its gradient.

    Args:
        victim: the model and its gallery.
        temperature: divides the similarities instead. Only for finding out what a temperature hides.
    """

    SHARPNESS = 3.0

    def __init__(self, victim: Victim, temperature: float | None = None) -> None:
        super().__init__()
        self.victim, self.temperature = victim, temperature
        self.model = victim.model  # torchattacks finds its device by the parameters
        self.eval()  # what torchattacks goes back to afterwards

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> logits (batch, images)."""
        features = self.victim.encode_image(pixels)
        scores = inner_products(features, self.victim.text_features)
        if self.temperature is None:
            scores = self.SHARPNESS * scores / scores.std(1, keepdim=True).detach().clamp_min(1e-12)
        else:
            scores = scores / self.temperature
        top = scores.amax(1, keepdim=True).detach()
        sums = torch.zeros(len(scores), self.victim.images, device=scores.device)
        return sums.index_add(1, self.victim.caption_image, (scores - top).exp()).clamp_min(1e-30).log() + top


@dataclass(frozen=True)
class Pgd(Attack):
    """PGD on what retrieval finds, or on the embedding alone.

    Attributes:
        epsilon: radius.
        steps: each moves by `step_size`, which is 2.5 epsilon / steps if not given (Madry et al. 2018).
        restarts: the first begins at the clean image, so that one more never weakens the attack; the others at random,
            as all do under `deviation`, which has no gradient there. The highest loss counts, image by image.
        momentum: of the gradients, 0 for none.
        objective: `cross` raises the cross-entropy of retrieval as classification, `deviation` the divergence from the
            clean image's embedding (Co-Attack's image-only attack), which knows no captions.
    """

    changes = frozenset({"image"})
    epsilon: float = 2 / 255
    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    momentum: float = 0.0
    objective: Literal["cross", "deviation"] = "cross"

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """See `Attack`."""
        objective = self._objective(victim, batch)
        best, reached = batch.pixels, torch.full(batch.labels.shape, -torch.inf, device=batch.pixels.device)
        for restart in range(self.restarts):
            drawn = restart or self.objective == "deviation"
            attacked = sign_ascent(
                batch.pixels,
                objective,
                random_start(batch.pixels, self.epsilon, step_keys(batch.keys, restart)) if drawn else batch.pixels,
                epsilon=self.epsilon,
                step_size=2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size,
                steps=self.steps,
                momentum=self.momentum,
            )
            if self.restarts == 1:
                return Attacked(attacked, batch.captions())
            with torch.no_grad():
                loss = objective(attacked, 0)
            higher = loss > reached
            best = torch.where(higher.view(-1, 1, 1, 1), attacked, best)
            reached = torch.where(higher, loss, reached)
        return Attacked(best, batch.captions())

    def _objective(self, victim: Victim, batch: Batch) -> Objective:
        if self.objective == "deviation":
            clean = batch.clean_features(victim)
            return lambda pixels, _: embedding_divergence(clean, victim.encode_image(pixels)).float()
        classifier = RetrievalClassifier(victim)
        return lambda pixels, _: F.cross_entropy(classifier(pixels), batch.labels, reduction="none")


@dataclass(frozen=True)
class TorchAttack(Attack):
    """Any L-infinity attack of torchattacks (Kim 2020), by its class name, on retrieval as classification.

    They draw from PyTorch's global generator, which is seeded by the batch's first image and put back afterwards. So a
    result is repeatable for the same batch size, but, unlike those of our own attacks, it changes with it.

    Attributes:
        kind: class name, such as `APGD` or `Square`.
        epsilon: radius.
        steps: handed on where the attack has steps.
        parameters: further arguments of the class.
    """

    changes = frozenset({"image"})
    alone = False
    kind: str = "PGD"
    epsilon: float = 2 / 255
    steps: int = 10
    parameters: tuple[tuple[str, Any], ...] = field(default=())

    @staticmethod
    def accepted(kind: str) -> set[str]:
        """Arguments of that class; empty if torchattacks has no such L-infinity attack."""
        import torchattacks

        found = getattr(torchattacks, kind, None)
        names = set(inspect.signature(found).parameters) if inspect.isclass(found) else set()
        return names - {"model"} if "eps" in names else set()

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """See `Attack`."""
        import torchattacks

        own = {"eps": self.epsilon, "steps": self.steps, "n_classes": victim.images, **dict(self.parameters)}
        accepted = self.accepted(self.kind)
        devices = [batch.pixels.device] if batch.pixels.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(batch.keys[0]))
            attack = getattr(torchattacks, self.kind)(
                RetrievalClassifier(victim), **{name: value for name, value in own.items() if name in accepted}
            )
            attacked = attack(batch.pixels, batch.labels).detach()
        low, high = batch.pixels - self.epsilon, batch.pixels + self.epsilon
        return Attacked(attacked.clamp(low, high).clamp(0, 1), batch.captions())
