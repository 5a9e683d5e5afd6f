"""The attack on the matching score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.attacks.contract import Batch, Victim
from trainables.attacks.encoding import CaptionEncoder, encode_captions
from trainables.attacks.image import Pgd
from trainables.attacks.itm import ItmAttack, _by_image
from trainables.attacks.registry import build_attack
from trainables.attacks.rivals import Rivals
from trainables.attacks.substitutes import Substitutes
from trainables.attacks.threat_model import check
from trainables.captions import bare_text
from trainables.config import AttackConfig, Protocol, TinyConfig
from trainables.errors import InputError
from trainables.models import parameters_of, tokenize
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.models.clip import Clip
from trainables.training.pretraining import train_tokenizer

WORDS = [
    ["a", "red", "circle"],
    ["the", "small", "blue", "square"],
    ["two", "green", "stars"],
    ["green", "triangle"],
    ["a", "small", "triangle"],
    ["a", "big", "red", "star"],
]
OWNER = torch.tensor([0, 0, 0, 1, 1, 2])
CPU = torch.device("cpu")


def stage(family: Any) -> tuple[Victim, Batch]:
    torch.manual_seed(0)
    size = TinyConfig(width=32, layers=2, heads=2, patch_pixels=8, embedding=16)
    captions = [" ".join(words) for words in WORDS]
    model = family.tiny(size, 32, 16, train_tokenizer(captions)).eval()
    for parameter in parameters_of(model, "all"):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
        parameter.requires_grad_(False)
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        images = F.normalize(model.encode_image(pixels), dim=-1)
    victim = Victim(model, 16, encode_captions(model, captions, 16, CPU), images, OWNER, torch.arange(6))
    return victim, some(victim, pixels, slice(0, 3))


def some(victim: Victim, pixels: Tensor, images: slice) -> Batch:
    """The batch of some images, each with its captions."""
    substitutes = Substitutes.build(WORDS, [[["green", "tiny"] for _ in caption] for caption in WORDS])
    rows = np.flatnonzero((images.start <= OWNER) & (images.stop > OWNER))
    owner, encode = OWNER[rows] - images.start, CaptionEncoder(victim.model, 16, CPU)
    labels = torch.arange(3)[images]
    return Batch(pixels[images], labels, rows, owner, substitutes, lambda quirks: substitutes, bare_text, encode, 7)


def logits(victim: Victim, pixels: Tensor, captions: list[str], owner: Tensor) -> Tensor:
    model: Any = victim.model
    tokens, mask = tokenize(model, captions, victim.max_tokens)
    with torch.no_grad():
        images = model.image_tokens(pixels)[owner]
        return model.itm_logits(images, model.text_tokens(tokens, mask), mask)[:, 1]


@pytest.mark.parametrize("family", [Albef, Blip])
def test_lowers_the_matching_more_than_an_attack_on_similarity(family: Any) -> None:
    victim, batch = stage(family)
    attack = ItmAttack(epsilon=8 / 255, steps=5)
    attacked = attack.run(victim, batch)
    check(attack, batch, attacked)
    assert attacked.captions != batch.captions()
    clean = logits(victim, batch.pixels, attacked.captions, batch.owner)
    ours = logits(victim, attacked.pixels, attacked.captions, batch.owner)
    other = logits(victim, Pgd(8 / 255, 5).run(victim, batch).pixels, attacked.captions, batch.owner)

    def by_image(values: Tensor) -> Tensor:
        return torch.zeros(3).index_add(0, batch.owner, values)

    assert (by_image(ours) < by_image(clean)).all()
    assert (by_image(ours) < by_image(other)).all()
    objective = Rivals(victim, batch, "margin").of_images(victim.text_features, "both")
    assert (objective(attacked.pixels, 0) > objective(batch.pixels, 0)).all(), "similarity suffers, too"


@pytest.mark.parametrize("family", [Albef, Blip])
def test_no_scale_of_the_matching_hides_it(family: Any) -> None:
    victim, batch = stage(family)
    model: Any = victim.model
    attack = ItmAttack(steps=3)
    before = attack.run(victim, batch)
    for parameter in model.network.itm_head.parameters():
        parameter.mul_(1e-4)
    after = attack.run(victim, batch)
    assert after.captions == before.captions
    assert ((after.pixels - before.pixels).abs() > 1e-6).float().mean() < 0.01


@pytest.mark.parametrize("words", [1, 2])
def test_the_words_are_the_worst_of_the_shortlist(words: int) -> None:
    """With everything on it, no single word in place of another matches less."""
    victim, batch = stage(Albef)
    attacked = ItmAttack(steps=1, words=words, shortlist=100).run(victim, batch)
    check(ItmAttack(steps=1, words=words), batch, attacked)
    found = logits(victim, attacked.pixels, list(attacked.captions), batch.owner)
    if words == 1:
        for row, caption in enumerate(WORDS):
            for place in range(len(caption)):
                for word in ("green", "tiny"):
                    other = [*list(batch.captions())[:row], " ".join([*caption[:place], word, *caption[place + 1 :]])]
                    whole = [*other, *list(batch.captions())[row + 1 :]]
                    assert found[row] <= logits(victim, attacked.pixels, whole, batch.owner)[row] + 1e-5


def test_an_image_is_attacked_the_same_alone() -> None:
    """Images differ in their numbers of captions; what fills up must not count."""
    victim, batch = stage(Albef)
    whole = ItmAttack(steps=5).run(victim, batch)
    alone = ItmAttack(steps=5).run(victim, some(victim, batch.pixels, slice(1, 2)))
    assert alone.captions == whole.captions[3:5]
    # Where rounding turns a gradient's sign, a pixel moves elsewhere; that is rare.
    assert ((alone.pixels - whole.pixels[1:2]).abs() > 1e-6).float().mean() < 0.002


def test_every_image_gets_as_many_captions() -> None:
    rows, own = _by_image(torch.tensor([0, 0, 0, 1, 2, 2]), 3)
    assert rows.tolist() == [0, 1, 2, 3, 3, 3, 4, 5, 5]
    assert own.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]


def test_a_model_without_fusion_is_refused() -> None:
    with pytest.raises(InputError, match="Clip has no such head"):
        build_attack(AttackConfig(name="itm", attack="itm"), Protocol()).run(*stage(Clip))
