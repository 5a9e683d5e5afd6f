"""Attacks by name, from a config to the measured numbers; what cannot be used is told in one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attack_world import MAX_TOKENS, World
from pydantic import JsonValue

from trainables.attacks.quirks import Quirk
from trainables.attacks.registry import BUILT_IN, build_attack
from trainables.attacks.sga import Sga
from trainables.attacks.threat_model import ThreatModelError
from trainables.config import AttackConfig, Protocol
from trainables.errors import InputError
from trainables.evaluation.robustness import evaluate
from trainables.evaluation.scores import recall_metrics

STRANGER = '''
from __future__ import annotations

from dataclasses import dataclass

from trainables.attacks.contract import Attack, Attacked, Batch, Victim


@dataclass(frozen=True)
class Darker(Attack):
    """Every pixel darker; the first word reversed."""

    changes = frozenset({"image", "text"})
    epsilon: float
    words: int
    share: float = 1.0

    def run(self, victim: Victim, batch: Batch) -> Attacked:
        captions = [caption.split() for caption in batch.captions()]
        flipped = [" ".join([first[::-1], *rest]) for first, *rest in captions]
        return Attacked((batch.pixels - self.share * self.epsilon).clamp(0, 1), flipped)


class NoDataclass(Attack):
    changes = frozenset({"image"})


not_a_class = 3
'''


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    path = tmp_path / "my_attack.py"
    path.write_text(STRANGER)
    return path


def measured(world: World, protocol: Protocol) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    ranks = evaluate(
        world.model,
        world.gallery,
        protocol,
        max_tokens=MAX_TOKENS,
        device=torch.device("cpu"),
        observe=lambda name, images, attacked: seen.update({name: attacked}),
    ).ranks
    return {**seen, **recall_metrics(ranks, protocol)}


def test_a_strangers_attack_is_measured_by_its_name(world: World, stranger: Path) -> None:
    protocol = Protocol.model_validate(
        {
            "attacks": [{"name": "darker", "attack": f"{stranger}:Darker", "options": {"share": 0.5}}, "image"],
            "epsilon": "8/255",
            "image_steps": 2,
        }
    )
    found = measured(world, protocol)
    assert set(protocol.metric_names) <= found.keys()
    clean = world.batch()
    torch.testing.assert_close(found["darker"].pixels, (clean.pixels - 4 / 255).clamp(0, 1))
    assert found["darker"].captions[0].startswith(world.texts[0].split()[0][::-1])


def test_a_stranger_that_does_too_much_is_not_scored(world: World, stranger: Path) -> None:
    config = AttackConfig(name="darker", attack=f"{stranger}:Darker", options={"share": 2})
    with pytest.raises(ThreatModelError, match="more than epsilon"):
        measured(world, Protocol(attacks=(config,)))


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"corruption", "caption-noise"}))  # these have no budget
def test_budget_comes_from_the_protocol_unless_options_say_otherwise(name: str) -> None:
    protocol = Protocol(epsilon=3 / 255, words=2, image_steps=7, candidates=4)
    needed: dict[str, JsonValue] = {"model": "base"} if name == "transfer" else {}
    attack = build_attack(AttackConfig(name=name, attack=name, options=needed), protocol)
    wanted = {"epsilon": 3 / 255, "words": 2, "steps": 7, "candidates": 4}
    assert {k: getattr(attack, k) for k in wanted if hasattr(type(attack), k) and k in vars(attack)} == {
        k: v for k, v in wanted.items() if k in vars(attack)
    }
    if "image" in attack.changes:
        stronger = AttackConfig(name=name, attack=name, options={**needed, "epsilon": "8/255"})
        assert build_attack(stronger, protocol).epsilon == 8 / 255


def test_what_a_strangers_class_gives_a_value_keeps_it(stranger: Path) -> None:
    text = STRANGER.replace("epsilon: float", "epsilon: float = 1.0").replace("words: int", "words: int = 3")
    own = stranger.with_name("own.py")
    own.write_text(text)
    protocol = Protocol(epsilon=3 / 255, words=2)

    def budget(file: Path, **options: Any) -> tuple[float, int | None]:
        attack = build_attack(AttackConfig(name="mine", attack=f"{file}:Darker", options=options), protocol)
        return attack.epsilon, attack.words

    assert budget(stranger) == (3 / 255, 2)
    assert budget(own) == (1.0, 3)
    assert budget(own, epsilon="8/255") == (8 / 255, 3)


def test_quirks_by_name() -> None:
    def quirks(given: Any) -> frozenset[Quirk]:
        attack = build_attack(AttackConfig(name="sga", attack="sga", options={"quirks": given}), Protocol())
        assert isinstance(attack, Sga)
        return attack.quirks

    assert quirks("compat") == Sga.known_quirks
    assert quirks(["cls_offset", "no_refill"]) == {"cls_offset", "no_refill"}
    assert quirks([]) == frozenset()
    assert build_attack(AttackConfig(name="sga", attack="sga"), Protocol()) == Sga()


@pytest.mark.parametrize(
    ("attack", "options", "message"),
    [
        ("sgaa", {}, "no attack 'sgaa'; there are image, text, both, .*itm, torchattacks:NAME, FILE.py:CLASS"),
        ("sga", {"step": 3}, "no option step; options are candidates, epsilon, quirks, steps, words"),
        ("sga", {"words": "many"}, r"words: .*valid integer.*given: 'many'"),
        ("sga", {"epsilon": "8/x"}, r"epsilon: .*valid number.*given: '8/x'"),
        ("sga", {"quirks": ["one_sided_start"]}, "quirks are `compat` for all of them, or a list of cls_offset, "),
        ("sga", {"quirks": "all"}, "quirks are `compat`"),
        ("image", {"quirks": "compat"}, "no option quirks"),
        ("torchattacks:Nope", {}, "torchattacks has no L-infinity attack 'Nope'; for example PGD"),
        ("torchattacks:CW", {}, "no L-infinity attack 'CW'"),
        ("torchattacks:PGD", {"beta": 1}, "PGD takes no beta; it takes alpha, "),
        ("missing.py:Darker", {}, "no Python file .*missing.py; write FILE.py:CLASS"),
        ("{file}:Brighter", {}, "my_attack.py has no frozen dataclass 'Brighter' derived from Attack"),
        ("{file}:NoDataclass", {}, "no frozen dataclass 'NoDataclass'"),
        ("{file}:not_a_class", {}, "no frozen dataclass 'not_a_class'"),
        ("{file}:Darker", {"shade": 1}, "no option shade; options are epsilon, share, words"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_message(
    stranger: Path, attack: str, options: dict[str, Any], message: str
) -> None:
    config = AttackConfig(name="mine", attack=attack.format(file=stranger), options=options)
    with pytest.raises(InputError, match=r"^protocol\.attacks, mine: ") as told:
        build_attack(config, Protocol())
    told.match(message)
    assert "\n" not in str(told.value)


def test_a_file_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_like_this\n")
    with pytest.raises(InputError, match=r"broken\.py cannot be imported .*nothing_like_this"):
        build_attack(AttackConfig(name="mine", attack=f"{broken}:Darker"), Protocol())
