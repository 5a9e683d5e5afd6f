"""APGD (Croce and Hein 2020) on the retrieval loss: PGD whose step size follows its own progress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainables.attacks.contract import Attack, Attacked, Batch, Victim
from trainables.attacks.image import Objective, random_start, value_and_gradient
from trainables.attacks.noise import step_keys
from trainables.attacks.rivals import Direction, Loss, Rivals

INERTIA = 0.75
"""Share of a step that is new; the rest goes on as the last one went."""
PROGRESS = 0.75
"""The step is halved where the objective rose in no more than this share of the steps since the last look."""
FIRST_LOOK, EARLIER, CLOSEST = 0.22, 0.03, 0.06
"""After which share of all steps the step size is looked at; by how much sooner the next time; and how soon at most."""


def looks(steps: int) -> Iterator[int]:
    """After which steps the step size is looked at.

    Example:
        >>> list(looks(100))
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    window, done = max(int(FIRST_LOOK * steps), 1), 0
    while (done := done + window) <= steps:
        yield done
        window = max(window - max(int(EARLIER * steps), 1), max(int(CLOSEST * steps), 1))


def apgd(pixels: Tensor, objective: Objective, start: Tensor, *, epsilon: float, steps: int) -> tuple[Tensor, Tensor]:
    """Raise `objective` within an L-infinity ball, and keep each image's best iterate.

    The schedule is that of the paper (algorithm 1, rho 0.75), and its first window is compared with the start, which
    the published code leaves out. Every image is attacked, whatever was wrong before.

    Args:
        pixels: float (batch, 3, height, width) in [0, 1], the centre of the ball.
        objective: what is raised.
        start: where to begin, in the ball; the result is never worse.
        epsilon: radius in [0, 1] pixels.
        steps: gradient steps.

    Returns:
        Adversarial pixels, and their objective (batch,).
    """
    low, high = (pixels - epsilon).clamp_(min=0), (pixels + epsilon).clamp_(max=1)
    current = before = best = start.detach()
    value, gradient = value_and_gradient(current, objective)
    highest, best_gradient, at_look = value, gradient, value
    size = torch.full_like(value, 2 * epsilon)
    halved = torch.ones_like(value, dtype=torch.bool)  # so that the first look asks for rises only
    rises, since, due = torch.zeros_like(value), 0, set(looks(steps))
    for step in range(1, steps + 1):
        ahead = torch.clamp(current + _wide(size) * gradient.sign(), low, high)
        share = 1.0 if step == 1 else INERTIA
        moved = torch.clamp(current + share * (ahead - current) + (1 - share) * (current - before), low, high)
        before, current, last = current, moved, value
        value, gradient = value_and_gradient(current, objective, step)
        better = value > highest
        best, best_gradient = (
            torch.where(_wide(better), new, old) for new, old in ((current, best), (gradient, best_gradient))
        )
        highest = torch.where(better, value, highest)
        rises, since = rises + (value > last), since + 1
        if step in due:
            stuck = (rises <= PROGRESS * since) | (~halved & (highest <= at_look))
            size = torch.where(stuck, size / 2, size)
            current, gradient = (
                torch.where(_wide(stuck), new, old) for new, old in ((best, current), (best_gradient, gradient))
            )
            halved, at_look, rises, since = stuck, highest, torch.zeros_like(rises), 0
    return best, highest


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Apgd(Attack):
    """APGD on the retrieval loss of clean captions, in the direction that is to lose.

    Attributes:
        epsilon: radius.
        steps: of each run.
        restarts: the first begins at the clean image, the others at random. The highest loss counts, image by image.
        loss: see `rivals.Loss`.
        direction: see `rivals.Direction`.
        targets: under `margin`, further runs that each lead to one wrong caption only, the most similar ones.
    """

    changes = frozenset({"image"})
    epsilon: float = 2 / 255
    steps: int = 50
    restarts: int = 1
    loss: Loss = "cross"
    direction: Direction = "both"
    targets: int = 0

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        """See `Attack`."""
        rivals, clean = Rivals(victim, batch, self.loss), batch.encode(batch.captions())
        objective = rivals.of_images(clean, self.direction)
        best, highest = batch.pixels, torch.full(batch.labels.shape, -torch.inf, device=batch.pixels.device)
        for number in range(self.restarts + self.targets):
            target = number - self.restarts
            pursued = objective if target < 0 else rivals.of_images(clean, self.direction, target)
            drawn = 0 < number < self.restarts
            start = random_start(batch.pixels, self.epsilon, step_keys(batch.keys, number)) if drawn else batch.pixels
            found, value = apgd(batch.pixels, pursued, start, epsilon=self.epsilon, steps=self.steps)
            if target >= 0:
                with torch.no_grad():
                    value = objective(found, 0)
            better = value > highest
            best, highest = torch.where(_wide(better), found, best), torch.where(better, value, highest)
        return Attacked(best, batch.captions())
