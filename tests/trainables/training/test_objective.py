"""The loss is what it says: weights interpolate, companions are what they are called, parts are trained by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trainables.attacks.noise import sample_keys
from trainables.config import Point, TinyConfig
from trainables.errors import InputError
from trainables.models import RetrievalModel, tokenize
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.models.clip import Clip
from trainables.training.losses import (
    Sides,
    consistency_loss,
    contrastive_loss,
    matching_loss,
    shared,
    similarities,
)
from trainables.training.objective import Pairs, Trainee
from trainables.training.pretraining import train_tokenizer

CAPTIONS = ["a red circle", "a blue square", "two green triangles", "a red square above a circle"]
FAMILIES: dict[str, Any] = {"clip": Clip, "albef": Albef, "blip": Blip}
TINY = TinyConfig(width=32, layers=2, heads=2, patch_pixels=8, embedding=16)


def make(family: str) -> RetrievalModel:
    torch.manual_seed(0)
    return FAMILIES[family].tiny(TINY, 32, 16, train_tokenizer(CAPTIONS)).eval()


def inputs(model: RetrievalModel, seed: int = 0) -> Pairs:
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return Pairs(pixels, *tokenize(model, CAPTIONS, 16))


def loss_of(model: RetrievalModel, attacked: Pairs, clean: Pairs, **fields: Any) -> tuple[Tensor, list[Tensor]]:
    trainee = Trainee(model, Point(temperature=0.2, **fields))
    with torch.no_grad():
        original = model.encode_image(clean.pixels)
    positives = torch.eye(4, dtype=torch.bool)
    loss = trainee(attacked, clean, original, (positives, positives.T), sample_keys(0, 0, torch.arange(4)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return loss, list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def similarity(images: Tensor, texts: Tensor) -> Sides:
    return similarities(shared(images), shared(texts))


def parts(model: RetrievalModel, attacked: Pairs, clean: Pairs) -> dict[str, Tensor]:
    """The terms, from the published formulas on plain features."""
    eye, keys, tau = torch.eye(4, dtype=torch.bool), sample_keys(0, 0, torch.arange(4)), torch.tensor(0.2)
    positives = eye, eye
    image, text = model.encode_image(attacked.pixels), model.encode_text(attacked.tokens, attacked.mask)
    first_image, first_text = model.encode_image(clean.pixels), model.encode_text(clean.tokens, clean.mask)
    found = {
        "adversarial": contrastive_loss(similarity(image, text), positives, tau),
        "crossed": (
            contrastive_loss(similarity(image, first_text), positives, tau)
            + contrastive_loss(similarity(first_image, text), positives, tau)
        )
        / 2,
        "clean": contrastive_loss(similarity(first_image, first_text), positives, tau),
        # FARE: squared L2 to the frozen clean embedding, here over that embedding's squared norm
        "anchor": ((image - first_image).square().sum(1) / first_image.square().sum(1)).mean(),
        "consistency": consistency_loss(similarity(first_image, first_text), similarity(image, text), tau),
    }
    if isinstance(model, Albef | Blip):
        found["matching"] = matching_loss(
            model,
            model.image_tokens(attacked.pixels),
            model.text_tokens(attacked.tokens, attacked.mask),
            attacked.mask,
            similarity(image, text),
            positives,
            tau,
            keys,
        )
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize(
    ("family", "companion", "pairs"),
    [
        *((family, companion, "adversarial") for family in FAMILIES for companion in ("auto", "anchor", "consistency")),
        ("clip", "anchor", "crossed"),
        ("albef", "matching", "crossed"),
    ],
)
def test_weights_interpolate_between_contrastive_and_companion(family: str, companion: str, pairs: str) -> None:
    model = make(family)
    clean, attacked = inputs(model), inputs(model, seed=1)
    expected = parts(model, attacked, clean)
    kind = {"clip": "anchor"}.get(family, "matching") if companion == "auto" else companion
    contrastive = "clean" if kind == "consistency" else pairs
    fields = {"companion": companion, "pairs": pairs}
    only_contrastive, one = loss_of(model, attacked, clean, contrastive_weight=1.0, **fields)
    only_companion, zero = loss_of(model, attacked, clean, contrastive_weight=0.0, **fields)
    mixed, between = loss_of(model, attacked, clean, contrastive_weight=0.3, **fields)
    torch.testing.assert_close(only_contrastive.detach(), expected[contrastive])
    torch.testing.assert_close(only_companion.detach(), expected[kind])
    torch.testing.assert_close(mixed, 0.3 * only_contrastive + 0.7 * only_companion)
    for full, none, some in zip(one, zero, between, strict=True):
        torch.testing.assert_close(some, 0.3 * full + 0.7 * none, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["train", "attack"])
def test_gradient_checkpointing_keeps_less_and_changes_nothing(family: str, mode: str) -> None:
    model = make(family).train(mode == "train")
    clean, attacked = inputs(model), inputs(model, seed=1)
    attacked.pixels.requires_grad_(mode == "attack")

    def measured() -> tuple[int, list[Tensor]]:
        torch.manual_seed(0)  # of dropout
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel() * (not isinstance(tensor, torch.nn.Parameter))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if mode == "train":
                gradients = loss_of(model, attacked, clean, contrastive_weight=0.5)[1]
                return kept, gradients
            features = model.encode_image(attacked.pixels)
            if isinstance(model, Albef | Blip):
                tokens = model.text_tokens(attacked.tokens, attacked.mask)
                features = model.itm_logits(model.image_tokens(attacked.pixels), tokens, attacked.mask)
            gradients = torch.autograd.grad(features.square().sum(), attacked.pixels)
        return kept, list(gradients)

    kept, plain = measured()
    model.checkpoint_layers()
    kept_less, again = measured()
    assert kept_less < kept / 3
    assert sum(gradient.abs().sum() for gradient in plain) > 0
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["image", "text", "fusion"])
def test_only_the_named_part_is_trained(family: str, part: str) -> None:
    model = make(family)
    if family == "clip" and part == "fusion":
        with pytest.raises(InputError, match="nothing would be trained"):
            Trainee(model, Point(trainable="fusion", contrastive_weight=0.5))
        return
    Trainee(model, Point(trainable=part, contrastive_weight=0.5))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    named = {id(p) for p in getattr(model, f"{part}_parameters")()}
    assert trained == named


@pytest.mark.parametrize("family", ["clip", "albef", "blip"])
def test_the_teacher_is_a_moving_average(family: str) -> None:
    model = make(family)
    trainee = Trainee(model, Point(distillation=0.4)).train()
    assert trainee.teacher is not None
    assert model.training
    assert not any(module.training for module in trainee.teacher.modules())
    assert not any(parameter.requires_grad for parameter in trainee.teacher.parameters())
    before = {name: value.clone() for name, value in model.named_parameters()}
    expected = before
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.rand_like(parameter))
        trainee.update_teacher()
        expected = {name: 0.995 * expected[name] + 0.005 * value for name, value in model.named_parameters()}
    found = dict(trainee.teacher.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), msg=name)
    assert Trainee(model, Point()).teacher is None
    assert Trainee(model, Point(distillation=0.4, contrastive_weight=0)).teacher is None


@pytest.mark.parametrize("pairs", ["adversarial", "crossed"])
def test_the_teacher_sets_its_share_of_the_targets(pairs: str) -> None:
    """ALBEF's formula written out: minus the sum of target times log-probability, both ways."""
    model = make("albef")
    clean, attacked = inputs(model), inputs(model, seed=1)
    trainee = Trainee(model, Point(temperature=0.2, pairs=pairs, distillation=0.5))
    assert isinstance(trainee.teacher, Albef)
    with torch.no_grad():
        for parameter in trainee.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    positives = torch.eye(4, dtype=torch.bool)
    positives[0, 1] = positives[1, 0] = True

    def scores(of: RetrievalModel, images: Pairs, texts: Pairs) -> Tensor:
        return similarity(of.encode_image(images.pixels), of.encode_text(texts.tokens, texts.mask))[0] / 0.2

    each = []
    for images, texts in [(attacked, attacked)] if pairs == "adversarial" else [(attacked, clean), (clean, attacked)]:
        student, teacher = scores(model, images, texts), scores(trainee.teacher, images, texts)
        for own, other in ((student, teacher), (student.T, teacher.T)):
            uniform = positives.float() / positives.sum(1, keepdim=True)
            targets = 0.7 * uniform + 0.3 * other.softmax(1)
            each.append(-(targets * own.log_softmax(1)).sum(1).mean())
    given = (attacked, clean, None, (positives, positives.T), sample_keys(0, 0, torch.arange(4)))
    loss = trainee(*given, 0.3)
    torch.testing.assert_close(loss, torch.stack(each).mean())
    assert abs(loss - trainee(*given, 0.0)) > 1e-4
    loss.backward()
    assert all(parameter.grad is None for parameter in trainee.teacher.parameters())


def test_a_dual_encoder_cannot_match_pairs() -> None:
    with pytest.raises(InputError, match="no fusion transformer"):
        Trainee(make("clip"), Point(companion="matching"))


def test_a_learned_temperature_stays_where_the_family_keeps_it() -> None:
    for family, low, high in (("clip", 0.01, 1.0), ("blip", 0.001, 0.5)):
        trainee = Trainee(make(family), Point(temperature=0.1, temperature_learned=True))
        for given, kept in ((-20.0, low), (20.0, high), (-2.0, None)):
            trainee.log_temperature.data.fill_(given)
            trainee.clamp_temperature()
            expected = torch.tensor(given).exp() if kept is None else torch.tensor(kept)
            torch.testing.assert_close(trainee.log_temperature.exp().detach()[0], expected)


@pytest.mark.parametrize(("family", "start", "low", "high"), [("clip", 0.005, 0.005, 1.0), ("blip", 0.9, 0.001, 0.9)])
def test_no_start_of_a_temperature_is_moved(family: str, start: float, low: float, high: float) -> None:
    trainee = Trainee(make(family), Point(temperature=start, temperature_learned=True))
    for given, kept in ((math.log(start), start), (-20.0, low), (20.0, high)):
        trainee.log_temperature.data.fill_(given)
        trainee.clamp_temperature()
        torch.testing.assert_close(trainee.log_temperature.exp().detach()[0], torch.tensor(kept))
