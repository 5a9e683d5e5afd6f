"""Is a model robust, or does it only hide its gradients? An audit with a verdict and the evidence for it.

A trained temperature, or anything else that flattens a loss, makes gradient attacks fail without making a model robust
(Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 5). Every check compares two numbers that an honest
model cannot get in the wrong order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.contract import Batch, Victim
from trainables.attacks.encoding import encode_captions
from trainables.attacks.image import (
    Objective,
    RetrievalClassifier,
    TorchAttack,
    input_gradient,
    random_start,
    sign_ascent,
)
from trainables.attacks.noise import step_keys, uniform
from trainables.config import Protocol
from trainables.evaluation.batching import batches
from trainables.evaluation.robustness import Gallery, image_features
from trainables.models import RetrievalModel
from trainables.precision import attackable, inner_products
from trainables.results import Audit, Check, Loss

IMAGES = 50
"""The audit looks at so many; it is about orders of magnitude, not points of recall."""
TOLERANCE = 0.06
"""Of accuracies that are compared: three of fifty images."""
LARGE_EPSILON = 0.5
"""At this radius any image can be turned into any other's look-alike: whoever survives hides its gradients."""
TEMPERATURES = (0.01, 0.05, 0.2, 1.0)
RANDOM_DIRECTIONS = 20
QUERIES = 200
"""Of the black-box attack, per image."""
BLACK_BOX = f"Square, {QUERIES} queries"
MORE_STEPS = (1, 10, 40)


@dataclass(frozen=True)
class _Subject:
    """What is audited: a batch of images, and how it is attacked."""

    victim: Victim
    batch: Batch
    steps: int

    def objective(self, temperature: float | None) -> Objective:
        classifier = RetrievalClassifier(self.victim, temperature)
        labels = self.batch.labels
        return lambda pixels, _: F.cross_entropy(classifier(pixels), labels, reduction="none")

    def pgd(self, epsilon: float, temperature: float | None = None, steps: int | None = None) -> Tensor:
        count = self.steps if steps is None else steps
        if epsilon == 0:
            return self.batch.pixels
        return sign_ascent(
            self.batch.pixels,
            self.objective(temperature),
            random_start(self.batch.pixels, epsilon, self.batch.keys),
            epsilon=epsilon,
            step_size=2.5 * epsilon / count,
            steps=count,
        )

    @torch.no_grad()
    def right(self, pixels: Tensor) -> Tensor:
        """Bool (images,): whether the first caption is one of the image's; ties and NaN are not."""
        scores = inner_products(self.victim.encode_image(pixels), self.victim.text_features)
        own = self.batch.labels[:, None] == self.victim.caption_image
        return scores.masked_fill(~own, -torch.inf).amax(1) > scores.masked_fill(own, -torch.inf).amax(1)

    def silent(self, temperature: float | None, epsilon: float) -> tuple[Tensor, Tensor]:
        """Bool (images,): which are right, and which of those have a gradient of zero or none almost everywhere."""
        start = random_start(self.batch.pixels, epsilon, self.batch.keys)
        gradient = input_gradient(start, self.objective(temperature))
        dead = ((gradient == 0) | ~gradient.isfinite()).float().mean((1, 2, 3)) > 0.9
        right = self.right(start)
        return right, dead & right


def audit(
    model: RetrievalModel,
    gallery: Gallery,
    protocol: Protocol,
    *,
    temperature: float | None,
    max_tokens: int,
    device: torch.device,
    beat: Callable[[], object] = lambda: None,
) -> Audit:
    """Look for gradient masking on the first images of the gallery; in halves of them, if memory does not hold more.

    Args:
        model: parameters and mode are as before afterwards.
        gallery: of the evaluation.
        protocol: its radius and steps.
        temperature: the model's own, None if it has none.
        max_tokens: where captions are cut.
        device: of the model.
        beat: called now and then.
    """
    part = gallery.first(min(IMAGES, len(gallery.pixels)))
    with attackable(model, device):
        texts = encode_captions(model, part.captions(model), max_tokens, device)
        everything = np.arange(len(part.pixels))
        images = image_features(model, part.pixels, everything, IMAGES, device)
        owners, groups = (
            torch.as_tensor(places, device=device) for places in (part.caption_image, part.caption_groups)
        )
        victim = Victim(model, max_tokens, texts, images, owners, groups)

        def looked_at(labels: np.ndarray) -> dict[str, Tensor]:
            subject = _Subject(victim, part.batch(victim, labels, protocol.seed), protocol.image_steps)
            found = {}
            for name, right in _survivors(subject, protocol.epsilon, temperature):
                found[name] = right
                beat()
            return found

        parts = list(batches(everything, IMAGES, looked_at))
    found = {name: torch.cat([some[name] for some in parts]).float().cpu() for name in parts[0]}
    checks = _protocol_checks(found, protocol.epsilon, 1 / len(part.pixels))
    if temperature is not None:
        checks += _own_checks(found, temperature)
    return Audit(
        verdict="honest" if all(check.passed for check in checks) else "masked",
        reliable=all(check.passed for check in checks if check.loss == "protocol"),
        checks=checks,
    )


def _radii(epsilon: float) -> dict[str, float]:
    return {f"{factor:g} epsilon": factor * epsilon for factor in (0, 0.5, 1, 2, 4) if factor * epsilon <= 1}


def _survivors(subject: _Subject, epsilon: float, temperature: float | None) -> Iterator[tuple[str, Tensor]]:
    """By the name of an attack, bool (images,): whether an image is right after it."""
    for name, radius in _radii(epsilon).items():
        yield name, subject.right(subject.pgd(radius))
    for steps in MORE_STEPS:
        yield f"{steps} steps", subject.right(subject.pgd(epsilon, steps=steps))
    yield f"epsilon {LARGE_EPSILON:g}", subject.right(subject.pgd(LARGE_EPSILON))
    survived = torch.ones_like(subject.batch.labels, dtype=torch.bool)
    for index in range(RANDOM_DIRECTIONS):
        draw = uniform(step_keys(subject.batch.keys, 1 + index), tuple(subject.batch.pixels.shape[1:]))
        corner = (subject.batch.pixels + epsilon * torch.where(draw < 0.5, -1.0, 1.0)).clamp(0, 1)
        survived &= subject.right(corner)
    yield "random directions", survived
    if epsilon:
        square = TorchAttack(kind="Square", epsilon=epsilon, parameters=(("n_queries", QUERIES),))
        yield BLACK_BOX, subject.right(square.run(subject.victim, subject.batch).pixels)
    for loss, temperature_of_loss in (("protocol", None), *([("own", temperature)] if temperature is not None else [])):
        right, silent = subject.silent(temperature_of_loss, epsilon)
        yield f"{loss}: right", right
        yield f"{loss}: silent", silent
    if temperature is not None:
        for one in (temperature, *TEMPERATURES):
            yield f"temperature {one:g}", subject.right(subject.pgd(epsilon, one))


def _protocol_checks(found: Mapping[str, Tensor], epsilon: float, chance: float) -> list[Check]:
    share = {name: right.mean().item() for name, right in found.items()}
    large, attacked = f"epsilon {LARGE_EPSILON:g}", share["1 epsilon"]
    return [
        _falling("larger radius is not weaker", {name: share[name] for name in _radii(epsilon)}),
        Check(
            name="certain success at a large radius",
            loss="protocol",
            passed=share[large] <= chance + TOLERANCE,
            evidence={large: share[large], "chance": chance},
            rule=f"accuracy at {large} is at most chance + {TOLERANCE:g}",
        ),
        _falling("more steps are not weaker", {name: share[name] for name in (f"{n} steps" for n in MORE_STEPS)}),
        _compared("gradient beats random directions", attacked, {"random directions": share["random directions"]}),
        _compared("gradient beats a black box", attacked, {BLACK_BOX: share.get(BLACK_BOX, attacked)}),
        _loud("gradients are there", "protocol", found),
    ]


def _own_checks(found: Mapping[str, Tensor], temperature: float) -> list[Check]:
    share = {name: right.mean().item() for name, right in found.items()}
    own = share[f"temperature {temperature:g}"]
    others = {name: share[name] for name in (f"temperature {t:g}" for t in TEMPERATURES)}
    others["scale-free"] = share["1 epsilon"]
    return [
        Check(
            name="no other temperature attacks better",
            loss="own",
            passed=own <= min(others.values()) + TOLERANCE,
            evidence={f"own temperature {temperature:g}": own, **others},
            rule=f"accuracy at the own temperature is at most the lowest of the others + {TOLERANCE:g}",
        ),
        _loud("gradients are there", "own", found),
    ]


def _falling(name: str, accuracies: Mapping[str, float]) -> Check:
    values = list(accuracies.values())
    passed = all(later <= min(values[: i + 1]) + TOLERANCE for i, later in enumerate(values[1:]))
    rule = f"no accuracy is above an earlier one by more than {TOLERANCE:g}"
    return Check(name=name, loss="protocol", passed=passed, evidence=dict(accuracies), rule=rule)


def _compared(name: str, attacked: float, others: Mapping[str, float]) -> Check:
    return Check(
        name=name,
        loss="protocol",
        passed=attacked <= min(others.values()) + TOLERANCE,
        evidence={"PGD": attacked, **others},
        rule=f"accuracy under PGD is at most the other + {TOLERANCE:g}",
    )


def _loud(name: str, loss: Loss, found: Mapping[str, Tensor]) -> Check:
    silent = (found[f"{loss}: silent"].sum() / found[f"{loss}: right"].sum().clamp(min=1)).item()
    return Check(
        name=name,
        loss=loss,
        passed=silent <= 0.1,
        evidence={"right images without gradient": silent},
        rule="at most 0.1 of the images that are right have a gradient of zero almost everywhere",
    )
