"""The contract of `Attack`, on every attack of a dual encoder that a name stands for."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from attack_world import MAX_TOKENS, World, make_world
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from trainables.attacks.contract import Attack, Attacked
from trainables.attacks.registry import BUILT_IN, build_attack
from trainables.attacks.text import BertAttack
from trainables.config import AttackConfig, Protocol
from trainables.evaluation.robustness import evaluate

OPTIONS: dict[str, dict[str, Any]] = {
    "image": {"restarts": 2},
    "apgd": {"steps": 3, "restarts": 2},
    "joint": {"steps": 2, "first_steps": 3, "restarts": 2},
    "characters": {"positions": 5, "replacements": 5},
}
NAMES = (
    "image",
    "text",
    "both",
    "apgd",
    "joint",
    "bert",
    "sep",
    "characters",
    "co",
    "sga",
    "dra",
    "cmi",
)  # others need options or models of their own
COMPAT = [name for name in NAMES if BUILT_IN[name].known_quirks]
CONFIGS = [
    *(AttackConfig(name=name, attack=name, options=OPTIONS.get(name, {})) for name in NAMES),
    *(AttackConfig(name=f"{name}-compat", attack=name, options={"quirks": "compat"}) for name in COMPAT),
    AttackConfig(name="pgd", attack="torchattacks:PGD", options={"random_start": False}),
]
EVALUATED = tuple(config for config in CONFIGS if "compat" not in config.name)
every_attack = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)


def protocol(**budget: Any) -> Protocol:
    return Protocol(**{"epsilon": 8 / 255, "image_steps": 2, "eight_bit": False, **budget})


def same(first: Attacked, second: Attacked) -> bool:
    """Up to signs of the gradient that rounding decides."""
    moved = (first.pixels - second.pixels).abs() > 1e-6
    return first.captions == second.captions and moved.float().mean().item() < 5e-3


@every_attack
@given(
    epsilon=st.floats(0.5 / 255, 32 / 255), steps=st.integers(1, 4), words=st.integers(0, 3), seed=st.integers(0, 999)
)
@settings(max_examples=4, deadline=None)
def test_no_budget_is_exceeded(
    world: World, config: AttackConfig, epsilon: float, steps: int, words: int, seed: int
) -> None:
    attack = build_attack(config, protocol(epsilon=epsilon, image_steps=steps, words=words))
    batch = world.batch(seed=seed)
    attacked = attack.run(world.victim, batch)
    moved = (attacked.pixels - batch.pixels).abs().max().item()
    assert moved <= (epsilon + 1e-6 if "image" in attack.changes else 0)
    assert attacked.pixels.min() >= 0
    assert attacked.pixels.max() <= 1
    for before, after in zip(batch.captions(), attacked.captions, strict=True):
        if attack.characters:
            assert Levenshtein.distance(before, after) <= attack.characters
            continue
        changed = sum(a != b for a, b in zip(before.split(), after.split(), strict=True))
        assert changed <= (words if "text" in attack.changes else 0)


@every_attack
def test_a_result_does_not_depend_on_the_batch(world: World, config: AttackConfig) -> None:
    attack, victim = build_attack(config, protocol()), world.victim
    together = attack.run(victim, world.batch())
    for labels in ([0], [1, 2], [4, 3]):
        rows = [row for label in labels for row in np.flatnonzero(world.owner == label)]
        part = Attacked(together.pixels[labels], [together.captions[row] for row in rows])
        assert same(attack.run(victim, world.batch(labels)), part)


@every_attack
def test_a_result_does_not_depend_on_the_order_of_the_gallery(world: World, config: AttackConfig) -> None:
    attack, order = build_attack(config, protocol()), [3, 0, 4, 2, 1]
    other = world.permuted(order)
    rows = [world.texts.index(text) for text in other.texts]
    here = attack.run(world.victim, world.batch())
    assert same(attack.run(other.victim, other.batch()), Attacked(here.pixels[order], [here.captions[r] for r in rows]))


@pytest.mark.parametrize("name", ["image", "apgd", "joint", "characters", "co", "sga", "dra", "cmi"])
def test_the_seed_matters_where_there_is_chance(world: World, name: str) -> None:
    config = next(config for config in CONFIGS if config.name == name)
    attack = build_attack(config, protocol(image_steps=1))
    assert not same(*(attack.run(world.victim, world.batch(seed=seed)) for seed in (0, 1)))


def worker(rank: int, count: int, folder: str) -> None:
    """Evaluate as one of `count` workers; save what every attack made of this worker's images, and the ranks."""
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    world, saved = make_world(), {}

    def observe(name: str, images: np.ndarray, attacked: Attacked) -> None:
        texts, owner = iter(attacked.captions), world.owner[np.isin(world.owner, images)]
        captions = {image: [next(texts) for own in owner if own == image] for image in images.tolist()}
        for image, pixels in zip(images.tolist(), attacked.pixels, strict=True):
            saved[f"{name} {image}"] = (pixels, captions[image])

    everything = protocol(attacks=EVALUATED, batch_images=2)
    ranks = evaluate(
        world.model, world.gallery, everything, max_tokens=MAX_TOKENS, device=torch.device("cpu"), observe=observe
    ).ranks
    ranked = {target: (torch.from_numpy(found.tr), torch.from_numpy(found.ir)) for target, found in ranks.items()}
    torch.save({"attacked": saved, "ranks": ranked}, Path(folder) / f"{count}-{rank}.pt")
    if count > 1:
        dist.destroy_process_group()


def test_two_workers_attack_as_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    worker(0, 1, str(tmp_path))
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    alone, *both = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    shared = both[0]["attacked"] | both[1]["attacked"]
    assert shared.keys() == alone["attacked"].keys()
    assert len(shared) == 5 * len(EVALUATED)
    for key, (pixels, captions) in alone["attacked"].items():
        assert same(Attacked(pixels, captions), Attacked(*shared[key])), key
    for target, found in alone["ranks"].items():
        for part in both:
            for mine, theirs in zip(found, part["ranks"][target], strict=True):
                torch.testing.assert_close(mine, theirs, msg=target)


def test_attacks_in_a_batch_are_computed_once(world: World) -> None:
    runs = []

    class Counting(BertAttack):
        def run(self, victim: Any, batch: Any) -> Attacked:
            runs.append(self)
            return super().run(victim, batch)

    batch, victim = world.batch(), world.victim
    first: Attack = Counting()
    assert batch.once(first, victim) is batch.once(Counting(), victim)
    assert batch.once(Counting(words=2), victim) is not batch.once(first, victim)
    assert len(runs) == 2
