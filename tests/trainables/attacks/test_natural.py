"""Natural perturbations as attacks of a protocol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trainables.attacks.contract import Attacked
from trainables.attacks.natural import NATURAL_ATTACKS, CaptionNoise, natural_attacks
from trainables.attacks.registry import build_attack
from trainables.config import AttackConfig, Protocol, TrialConfig
from trainables.errors import InputError
from trainables.evaluation.intervals import robustness_metrics
from trainables.evaluation.robustness import evaluate
from trainables.prepare import prepare

CHOSEN = (
    AttackConfig(name="fog-3", attack="corruption", options={"kind": "fog", "severity": 3}),
    AttackConfig(name="noise", attack="corruption", options={"kind": "gaussian_noise", "severity": 5}),
    AttackConfig(name="keys", attack="caption-noise", options={"kind": "keyboard", "share": 0.3}),
    AttackConfig(name="synonyms", attack="caption-noise", options={"kind": "word_synonym", "share": 0.5}),
)


def seen(trial: TrialConfig, batch_images: int, seed: int = 0) -> dict[str, Attacked]:
    """What every attack made of the whole gallery."""
    prepared = prepare(trial)
    parts: dict[str, list[Attacked]] = {}
    changes = {"attacks": CHOSEN, "batch_images": batch_images, "seed": seed, "eight_bit": False}
    protocol = trial.protocol.model_copy(update=changes)
    ranks = evaluate(
        prepared.base,
        prepared.gallery,
        protocol,
        max_tokens=32,
        device=torch.device("cpu"),
        observe=lambda name, images, attacked: parts.setdefault(name, []).append(attacked),
    ).ranks
    assert list(ranks) == ["clean", "fog-3", "noise", "keys", "synonyms"]
    return {
        name: Attacked(torch.cat([part.pixels for part in own]), [text for part in own for text in part.captions])
        for name, own in parts.items()
    }


def test_results_belong_to_the_sample_and_the_seed(tiny_trial: TrialConfig) -> None:
    whole, few, other = seen(tiny_trial, 50), seen(tiny_trial, 5), seen(tiny_trial, 50, seed=1)
    gallery = prepare(tiny_trial).gallery
    clean = torch.tensor(gallery.pixels) / 255
    for name, attacked in whole.items():
        torch.testing.assert_close(few[name].pixels, attacked.pixels, rtol=0, atol=0)
        assert few[name].captions == attacked.captions
        images, captions = not torch.equal(attacked.pixels, clean), attacked.captions != gallery.texts
        assert (images, captions) == ((False, True) if name in ("keys", "synonyms") else (True, False))
        assert attacked.captions != other[name].captions or not torch.equal(attacked.pixels, other[name].pixels)
    noise = whole["noise"].pixels - clean
    assert (noise[0] != noise[1]).float().mean() > 0.5


def test_words_without_bound_pass_the_check(tiny_trial: TrialConfig) -> None:
    gallery = prepare(tiny_trial).gallery
    changed = [
        sum(a != b for a, b in zip(before.split(), after.split(), strict=True))
        for before, after in zip(gallery.texts, seen(tiny_trial, 50)["keys"].captions, strict=True)
    ]
    assert np.mean(changed) > tiny_trial.protocol.words


def test_the_whole_natural_protocol_obeys_the_contract(tiny_trial: TrialConfig) -> None:
    prepared = prepare(tiny_trial)
    protocol = tiny_trial.protocol.model_copy(update={"attacks": NATURAL_ATTACKS, "eight_bit": True})
    gallery = prepared.gallery.first(4)
    ranks = evaluate(prepared.base, gallery, protocol, max_tokens=32, device=torch.device("cpu")).ranks
    assert list(ranks) == protocol.targets
    found = robustness_metrics(ranks, (1, 5, 10), samples=100, confidence=0.95, seed=0)
    assert all(f"{attack.name}/mmi" in found for attack in NATURAL_ATTACKS)


def test_the_natural_protocol_can_be_built(tmp_path: Path) -> None:
    protocol = Protocol(attacks=NATURAL_ATTACKS)
    assert len(protocol.attacks) == 17 * 3 + 13
    for config in protocol.attacks:
        build_attack(config, protocol)
    file = tmp_path / "synonyms.txt"
    file.write_text("man guy\n")
    synonym = next(config for config in natural_attacks(file) if config.name == "word_synonym")
    assert build_attack(synonym, protocol) == CaptionNoise("word_synonym", synonyms=file)


@pytest.mark.parametrize(
    ("attack", "options", "told"),
    [
        ("corruption", {"kind": "frost"}, "fog"),
        ("corruption", {"kind": "fog", "severity": 6}, "less than or equal to 5"),
        ("corruption", {}, "kind: Field required"),
        ("corruption", {"kind": "fog", "epsilon": 0.1}, "no option epsilon"),
        ("caption-noise", {"kind": "keyboard", "share": 0}, "greater than 0"),
        ("caption-noise", {"kind": "word_synonym", "synonyms": "no/file"}, "does not point to a file"),
    ],
)
def test_options_that_cannot_be_used_are_told(attack: str, options: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        build_attack(AttackConfig(name="x", attack=attack, options=options), Protocol())


def test_synonyms_come_from_the_file_and_spare_stop_words(tiny_trial: TrialConfig, tmp_path: Path) -> None:
    gallery = prepare(tiny_trial).gallery
    words = {word for text in gallery.texts for word in text.split()}
    file = tmp_path / "synonyms.txt"
    file.write_text("".join(f"{word} {word}ish\n" for word in words))
    options = {"kind": "word_synonym", "synonyms": str(file)}
    attack = AttackConfig(name="synonyms", attack="caption-noise", options=options)
    protocol = tiny_trial.protocol.model_copy(update={"attacks": (attack,)})
    found: list[str] = []
    evaluate(
        prepare(tiny_trial).base,
        gallery,
        protocol,
        max_tokens=32,
        device=torch.device("cpu"),
        observe=lambda name, images, attacked: found.extend(attacked.captions),
    )
    for before, after in zip(gallery.texts, found, strict=True):
        changed = [(a, b) for a, b in zip(before.split(), after.split(), strict=True) if a != b]
        assert len(changed) >= 1
        assert all(b == f"{a}ish" and a not in ("a", "on", "and", "the") for a, b in changed)
