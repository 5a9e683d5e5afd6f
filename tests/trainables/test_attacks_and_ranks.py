"""Budgets, determinism and hand-worked cases of attacks, losses and ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from trainables.attacks.image import pgd, sample_keys, uniform_noise
from trainables.attacks.text import Substitutes, attack_captions, encode_captions, split_words
from trainables.config import TrialConfig
from trainables.evaluation.retrieval import retrieval_ranks
from trainables.evaluation.robustness import ThreatModelError, check_captions, check_images, evaluate
from trainables.losses import anchor_loss, contrastive_loss, positive_pairs
from trainables.prepare import prepare


@given(epsilon=st.floats(0.001, 0.2), steps=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_pgd_stays_in_its_ball_and_raises_the_objective(epsilon: float, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(3, 3, 8, 8, generator=generator)
    direction = torch.randn(3, 8, 8, generator=generator)
    objective = lambda x: (x * direction).sum((1, 2, 3))  # noqa: E731
    attacked = pgd(pixels, objective, epsilon=epsilon, steps=steps, keys=sample_keys(seed, 0, torch.arange(3)))
    assert (attacked - pixels).abs().max() <= epsilon + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (objective(attacked) > objective(pixels)).all()


def test_noise_belongs_to_the_sample() -> None:
    ids = torch.tensor([7, 8, 9])
    like = torch.zeros(3, 3, 32, 32)
    noise = uniform_noise(sample_keys(1, 2, ids), like)
    alone = uniform_noise(sample_keys(1, 2, ids[1:2]), like[1:2])
    assert torch.equal(noise[1:2], alone)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, uniform_noise(sample_keys(1, 3, ids), like))
    assert abs(noise.mean()) < 0.05
    assert noise.var().item() == pytest.approx(1 / 3, abs=0.03)


def plain_attack(model: object, words: list[str], options: list[list[str]], feature: torch.Tensor, budget: int) -> str:
    """The description in `attack_captions`, one caption and one word at a time."""
    encode = lambda text: encode_captions(model, [text], 32, feature.device)[0]  # type: ignore[arg-type]  # noqa: E731
    clean = encode(" ".join(words))
    moved = {
        place: (encode(" ".join(words[:place] + words[place + 1 :])) - clean).square().sum().item()
        for place in range(len(words))
        if options[place]
    }
    current, best = list(words), (clean @ feature).item()
    for place in sorted(moved, key=lambda place: -moved[place]):
        if budget == 0:
            break
        tries = [(([*current[:place], o, *current[place + 1 :]]), o) for o in options[place]]
        fits = [((encode(" ".join(text)) @ feature).item(), text) for text, _ in tries]
        lowest, text = min(fits, key=lambda fit: fit[0])
        if lowest < best - 1e-7:
            current, best, budget = text, lowest, budget - 1
    return " ".join(current)


@pytest.mark.parametrize("words", [0, 1, 2])
def test_batched_text_attack_equals_the_plain_one(tiny_trial: TrialConfig, words: int) -> None:
    prepared = prepare(tiny_trial)
    model = prepared.base.eval()
    captions = list(range(0, 40, 3))
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(len(captions), 32, generator=generator), dim=-1)
    attack = lambda rows, f: attack_captions(  # noqa: E731
        model, rows, prepared.train, f, words=words, count=10, max_tokens=32
    )
    together = attack(captions, features)
    for row, (caption, text) in enumerate(zip(captions, together, strict=True)):
        before = prepared.train.words_of(caption)
        assert sum(a != b for a, b in zip(before, text.split(), strict=True)) <= words
        assert text == attack([caption], features[row : row + 1])[0]
        assert text == plain_attack(model, before, prepared.train.options_of(caption), features[row], words)
    assert (together != [" ".join(prepared.train.words_of(c)) for c in captions]) == (words > 0)


def test_words_and_substitutes(tmp_path: object) -> None:
    assert split_words("A man, half-asleep/sad: it's 2!") == ["a", "man", "half", "asleep", "sad", "it's", "2"]
    words, options = [["a", "red", "cat"], [], ["dog"]], [[[], ["blue", "green"], ["cow"]], [], [["bird"]]]
    table = Substitutes.build(words, options, 3)
    assert [table.words_of(i) for i in range(3)] == words
    assert [table.options_of(i) for i in range(3)] == options
    picked = table.take(np.array([2, 0]))
    assert [picked.words_of(0), picked.words_of(1)] == [words[2], words[0]]
    assert table.texts() == ["a red cat", "", "dog"]
    table.save(tmp_path / "s.npz")  # type: ignore[operator]
    assert Substitutes.load(tmp_path / "s.npz").options_of(0) == options[0]  # type: ignore[operator]


def test_contrastive_loss_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    positives = positive_pairs(torch.tensor([1, 2, 2, 3, 4]), torch.tensor([0, 1, 2, 3, 0]))
    assert positives[1, 2]
    assert positives[0, 4]
    assert not positives[0, 1]
    scores = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T / 0.3
    expected = 0.0
    for matrix in (scores, scores.T):
        for i in range(5):
            right = [j for j in range(5) if positives[i, j]]
            total = sum(math.exp(matrix[i, j]) for j in range(5))
            expected -= sum(math.log(math.exp(matrix[i, j]) / total) for j in right) / len(right) / 10
    assert contrastive_loss(images, texts, positives, torch.tensor(0.3)).item() == pytest.approx(expected, abs=1e-5)
    same = torch.ones(5, 4)
    assert contrastive_loss(same, same, torch.eye(5, dtype=torch.bool), torch.tensor(0.1)).item() == pytest.approx(
        math.log(5), abs=1e-5
    )
    assert anchor_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])).item() == pytest.approx(25 / 16)


def test_ranks_are_pessimistic() -> None:
    images = torch.eye(3)
    texts = torch.stack([images[0], images[1], images[1], images[2]])
    owner, groups = np.array([0, 1, 2, 2]), np.array([0, 1, 2, 3])
    ranks = retrieval_ranks(images, texts, owner, groups)
    assert ranks.tr.tolist() == [1, 2, 1]  # caption 2 looks like image 1 and ties with its own caption
    assert ranks.ir.tolist() == [1, 1, 3, 1]  # its image scores 0, one ties and one is better
    shared = retrieval_ranks(images, texts, owner, np.array([0, 1, 1, 3]))
    assert shared.tr.tolist() == [1, 1, 1]  # equal captions are right for both images
    assert shared.ir.tolist() == [1, 1, 1, 1]
    collapsed = retrieval_ranks(torch.ones(3, 3), torch.ones(4, 3), owner, groups)
    assert collapsed.tr.min() >= 3
    assert collapsed.ir.min() == 3
    broken = images.clone()
    broken[0] = float("nan")
    assert retrieval_ranks(broken, texts, owner, groups).tr[0] > len(texts)
    order = torch.tensor([2, 0, 1])
    moved = retrieval_ranks(images[order], texts, order.argsort().numpy()[owner], groups)
    assert moved.tr.tolist() == ranks.tr[order].tolist()


def test_threat_model_is_checked() -> None:
    pixels = torch.full((1, 3, 4, 4), 0.5)
    check_images(pixels, pixels + 0.01, 0.0101)
    with pytest.raises(ThreatModelError, match="more than epsilon"):
        check_images(pixels, pixels + 0.02, 0.01)
    with pytest.raises(ThreatModelError, match="outside"):
        check_images(pixels, pixels + 0.6, 0.7)
    with pytest.raises(ThreatModelError):
        check_images(pixels, pixels * float("nan"), 0.01)
    with pytest.raises(ThreatModelError, match="2 words"):
        check_captions(["a red cat"], ["a blue dog"], 1)


def test_evaluation_ignores_batching_and_the_scale_of_embeddings(tiny_trial: TrialConfig) -> None:
    prepared = prepare(tiny_trial)
    run = lambda batch: evaluate(  # noqa: E731
        prepared.base,
        prepared.gallery,
        tiny_trial.protocol.model_copy(update={"batch_images": batch}),
        image_steps=2,
        max_tokens=32,
        device=torch.device("cpu"),
    )
    prepared.base.train()
    frozen = next(prepared.base.parameters()).requires_grad_(False)
    whole = run(50)
    assert prepared.base.training
    assert not frozen.requires_grad
    few = run(5)
    with torch.no_grad():
        prepared.base.clip.visual_projection.weight *= 1000  # type: ignore[operator]
    scaled = run(50)
    for target in whole:
        np.testing.assert_array_equal(whole[target].tr, few[target].tr)
        np.testing.assert_array_equal(whole[target].ir, scaled[target].ir)
