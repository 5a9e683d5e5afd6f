"""Attacks on pixels: equal to plain loops and to torchattacks, and within their budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attack_world import World
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.image import Pgd, RetrievalClassifier, TorchAttack, input_gradient, pgd, random_start
from trainables.attacks.noise import normal, sample_keys, step_keys, uniform

EPSILON = 8 / 255


@given(epsilon=st.floats(0.001, 0.2), steps=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_pgd_stays_in_its_ball_and_raises_the_objective(epsilon: float, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(3, 3, 8, 8, generator=generator)
    direction = torch.randn(3, 8, 8, generator=generator)

    def objective(x: Tensor) -> Tensor:
        return (x * direction).sum((1, 2, 3))

    attacked = pgd(pixels, objective, epsilon=epsilon, steps=steps, keys=sample_keys(seed, 0, torch.arange(3)))
    assert (attacked - pixels).abs().max() <= epsilon + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (objective(attacked) > objective(pixels)).all()


def plain_loss(world: World, pixels: Tensor, label: int) -> Tensor:
    """Cross-entropy of one image (3, height, width) among the gallery, from the definition in `RetrievalClassifier`."""
    victim = world.victim
    scores = [F.normalize(world.model.encode_image(pixels[None]), dim=-1)[0] @ text for text in victim.text_features]
    spread = torch.stack(scores).detach().std()
    weights = [(3 * score / spread).exp() for score in scores]
    classes = [
        sum(weight for weight, image in zip(weights, world.owner, strict=True) if image == own)
        for own in range(victim.images)
    ]
    return -(classes[label] / sum(classes)).log()


def plain_divergence(world: World, pixels: Tensor, label: int) -> Tensor:
    """KL from the softmax of the image's own embedding to that of these pixels' (Zhang et al. 2022)."""
    images = torch.stack([pixels, torch.tensor(world.pixels[label]) / 255])
    logs = F.normalize(world.model.encode_image(images), dim=-1).double().log_softmax(1)
    own = logs[1].detach()
    return (own.exp() * (own - logs[0])).sum()


def plain_pgd(world: World, attack: Pgd, label: int, key: Tensor) -> tuple[Tensor, float]:
    """Adversarial pixels and their loss, for one image."""
    clean = torch.tensor(world.pixels[label]) / 255
    loss_of, drawn = (plain_divergence, True) if attack.objective == "deviation" else (plain_loss, False)
    best, reached = clean, -float("inf")
    for restart in range(attack.restarts):
        start = restart or drawn
        current = random_start(clean[None], attack.epsilon, step_keys(key, restart))[0] if start else clean
        velocity = torch.zeros_like(clean)
        for _ in range(attack.steps):
            current = current.detach().requires_grad_(True)
            loss_of(world, current, label).backward()
            assert current.grad is not None
            velocity = attack.momentum * velocity + current.grad / current.grad.abs().mean()
            moved = current + 2.5 * attack.epsilon / attack.steps * velocity.sign()
            current = torch.max(torch.min(moved, clean + attack.epsilon), clean - attack.epsilon).clamp(0, 1)
        loss = loss_of(world, current, label).item()
        if loss > reached:
            best, reached = current.detach(), loss
    return best, reached


@pytest.mark.parametrize(
    "attack",
    [
        Pgd(epsilon=EPSILON, steps=4),
        Pgd(epsilon=EPSILON, steps=4, momentum=0.9),
        Pgd(epsilon=EPSILON, steps=3, restarts=3),
        Pgd(epsilon=EPSILON, steps=3, objective="deviation"),
        Pgd(epsilon=EPSILON, steps=3, restarts=2, objective="deviation"),
    ],
)
def test_pgd_equals_the_plain_one(world: World, attack: Pgd) -> None:
    batch = world.batch()
    attacked = attack.run(world.victim, batch).pixels
    for label in range(len(world.pixels)):
        expected, reached = plain_pgd(world, attack, label, batch.keys[label : label + 1])
        assert ((attacked[label] - expected).abs() > 1e-6).float().mean() < 1e-3
        loss_of = plain_divergence if attack.objective == "deviation" else plain_loss
        assert loss_of(world, attacked[label], label).item() == pytest.approx(reached, abs=1e-5, rel=1e-2)


def test_pgd_equals_torchattacks(world: World) -> None:
    steps = 5
    ours = Pgd(epsilon=EPSILON, steps=steps, step_size=2 / 255).run(world.victim, world.batch())
    parameters = (("alpha", 2 / 255), ("random_start", False))
    theirs = TorchAttack("PGD", EPSILON, steps, parameters).run(world.victim, world.batch())
    assert ((ours.pixels - theirs.pixels).abs() > 1e-6).float().mean() < 1e-3

    def loss(pixels: Tensor) -> Tensor:
        return F.cross_entropy(RetrievalClassifier(world.victim)(pixels), world.batch().labels)

    assert loss(ours.pixels).item() == pytest.approx(loss(theirs.pixels).item(), abs=1e-5)
    assert loss(ours.pixels) > loss(world.batch().pixels) + 0.1


@pytest.mark.parametrize("kind", ["PGD", "APGD", "AutoAttack"])
def test_torchattacks_is_quiet_and_leaves_the_model_in_eval_mode(
    world: World, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    TorchAttack(kind, EPSILON, 1).run(world.victim, world.batch())
    assert capsys.readouterr().out == ""
    assert not any(module.training for module in world.victim.model.modules())


def test_one_more_restart_never_weakens_the_attack(world: World) -> None:
    classifier, batch = RetrievalClassifier(world.victim), world.batch()
    losses = [
        F.cross_entropy(
            classifier(Pgd(epsilon=EPSILON, steps=2, restarts=restarts).run(world.victim, batch).pixels),
            batch.labels,
            reduction="none",
        )
        for restarts in (1, 2, 4)
    ]
    assert (losses[1] >= losses[0] - 1e-6).all()
    assert (losses[2] >= losses[1] - 1e-6).all()
    assert losses[2].sum() > losses[0].sum()


def test_the_classifier_does_not_see_the_scale_of_similarities(world: World) -> None:
    """Raised similarities leave logits alone, so no temperature can hide the gradient of its loss."""
    victim = world.victim
    logits = RetrievalClassifier(victim)(world.batch().pixels)
    victim.text_features.mul_(100)
    torch.testing.assert_close(RetrievalClassifier(victim)(world.batch().pixels), logits, rtol=1e-4, atol=1e-4)


def test_similarities_are_in_full_precision_under_autocast(world: World) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert RetrievalClassifier(world.victim)(world.batch().pixels).dtype == torch.float32


def test_gradients_keep_their_signs_in_bfloat16(world: World) -> None:
    """Captions are as alike as 0.9999: what the loss tells them apart by is lost where going back rounds to 8 bits."""
    batch, victim = world.batch(), world.victim
    common = F.normalize(torch.ones(1, victim.text_features.shape[1]), dim=1)
    victim = replace(victim, text_features=F.normalize(common + 0.01 * victim.text_features, dim=1))
    start = random_start(batch.pixels, 2 / 255, batch.keys)
    classifier = RetrievalClassifier(victim)

    def objective(pixels: Tensor, _: int) -> Tensor:
        return F.cross_entropy(classifier(pixels), batch.labels, reduction="none")

    expected = input_gradient(start, objective)
    with torch.autocast("cpu", torch.bfloat16):
        found = input_gradient(start, objective)
    assert (found == 0).float().mean() < 1e-3
    assert (found.sign() == expected.sign()).float().mean() > 0.97


def test_noise_belongs_to_the_sample() -> None:
    ids = torch.tensor([7, 8, 9])
    noise = uniform(sample_keys(1, 2, ids), (3, 32, 32))
    alone = uniform(sample_keys(1, 2, ids[1:2]), (3, 32, 32))
    assert torch.equal(noise[1:2], alone)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, uniform(sample_keys(1, 3, ids), (3, 32, 32)))
    assert noise.mean().item() == pytest.approx(0.5, abs=0.02)
    assert noise.var().item() == pytest.approx(1 / 12, abs=0.01)


def test_normal_noise_is_normal() -> None:
    noise = normal(sample_keys(0, 0, torch.arange(4)), (20_000,)).flatten()
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    for bound, share in ((0, 0.5), (1, 0.8413), (2, 0.9772)):
        assert (noise < bound).float().mean().item() == pytest.approx(share, abs=0.01)
