"""Training, every attack, evaluation, re-ranking and audit on a device of its own: no tensor is on the wrong one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_device import DEVICE, TRANSFERS, OnDevice, WrongDeviceError, simulated_device
from tiny_families import FAMILIES, LENGTH, PIXELS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, BertConfig, MPNetConfig

from trainables.attacks.proposals import BATCH, Proposer
from trainables.attacks.quirks import Quirk
from trainables.attacks.registry import BUILT_IN
from trainables.captions import bare_text
from trainables.config import AttackConfig, Point, TrialConfig
from trainables.models import FusionModel, tokenize
from trainables.models.clip import Clip
from trainables.models.dual import TextTransformer
from trainables.prepare import Prepared, Workshop, prepare
from trainables.results import TrialResult
from trainables.training import finetune
from trainables.training.clock import Clock
from trainables.training.feed import Feed
from trainables.training.run import begin, state_before

FUSION = ("blip", "albef")
OPTIONS: dict[str, dict[str, Any]] = {"corruption": {"kind": "fog"}, "caption-noise": {"kind": "keyboard"}}


@pytest.fixture(scope="module")
def trial(tiny_trial: TrialConfig) -> TrialConfig:
    data = tiny_trial.data.model_copy(update={"max_train_images": 8})
    training = tiny_trial.training.model_copy(update={"epochs": 1, "batch_size": 4})
    changes = {"gallery_images": 4, "batch_images": 2}
    return tiny_trial.model_copy(
        update={"data": data, "training": training, "protocol": tiny_trial.protocol.model_copy(update=changes)}
    )


@pytest.fixture(scope="module")
def prepared(trial: TrialConfig) -> Prepared:
    return prepare(trial)


def with_base(prepared: Prepared, family: str) -> Prepared:
    torch.manual_seed(0)
    return replace(prepared, base=FAMILIES[family](prepared.base.tokenizer).eval(), cache_dir=None)


def run(config: TrialConfig, prepared: Prepared, device: torch.device, folder: Path) -> tuple[float, set[str]]:
    """The temperature that was learned, and what was measured."""
    prepared.base.save = lambda _: None  # its weights are no plain tensors
    finetune.finetune(config, prepared, device, None, folder, lambda metrics, written: None)
    (path,) = folder.rglob("result.json")
    result = TrialResult.model_validate_json(path.read_text())
    assert (result.audit is not None) == config.protocol.audit
    return result.temperature, set(result.metrics)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trial_is_on_one_device_and_measures_the_same_there(
    trial: TrialConfig, prepared: Prepared, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, least in (("MORE_STEPS", (1, 2)), ("QUERIES", 3), ("RANDOM_DIRECTIONS", 2), ("TEMPERATURES", (0.1,))):
        monkeypatch.setattr(f"trainables.evaluation.audit.{name}", least)
    monkeypatch.setattr("trainables.attacks.sga.SCALES", (0.5,))
    names = [name for name in BUILT_IN if name != "transfer" and (name != "itm" or family in FUSION)]
    attacks = tuple(AttackConfig(name=name, attack=name, options=OPTIONS.get(name, {})) for name in names)
    torchattack = AttackConfig(name="apgd", attack="torchattacks:APGD")
    protocol = trial.protocol.model_copy(
        update={"attacks": (*attacks, torchattack), "rerank": 3 if family in FUSION else None, "audit": True}
    )
    point = Point(epsilon=2 / 255, attack_steps=2, words=1, contrastive_weight=0.5, temperature_learned=True)
    config = trial.model_copy(update={"point": point, "protocol": protocol})
    temperature, measured = run(config, with_base(prepared, family), torch.device("cpu"), tmp_path / "host")
    with simulated_device():
        found = run(config, with_base(prepared, family), DEVICE, tmp_path / "device")
    assert found == (pytest.approx(temperature, rel=1e-4), measured)


@pytest.mark.parametrize(
    ("family", "point"),
    [
        ("clip", {"companion": "consistency", "distillation": 0.4, "image_augmentation": "crop"}),
        ("dual", {"pairs": "crossed", "attack_objective": "deviation", "text_augmentation": "eda"}),
        ("albef", {"pairs": "crossed", "distillation": 0.4, "captions_per_image": 2}),
    ],
)
def test_every_loss_is_on_one_device(
    trial: TrialConfig, prepared: Prepared, family: str, point: dict[str, Any], tmp_path: Path
) -> None:
    shared = {"epsilon": 2 / 255, "attack_steps": 1, "words": 1, "contrastive_weight": 0.5, "temperature_learned": True}
    trained = Point(**shared, **point)
    protocol = trial.protocol.model_copy(update={"attacks": ()})
    config = trial.model_copy(update={"point": trained, "protocol": protocol})
    temperature, _ = run(config, with_base(prepared, family), torch.device("cpu"), tmp_path / "host")
    with simulated_device():
        found, _ = run(config, with_base(prepared, family), DEVICE, tmp_path / "device")
    assert found == pytest.approx(temperature, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_keeps_the_host_from_waiting(prepared: Prepared, family: str) -> None:
    model = with_base(prepared, family).base
    ids, mask = tokenize(model, ["a circle", "a red square above a green triangle"], LENGTH)
    with simulated_device() as reads:
        pixels, ids, mask = torch.rand(2, 3, PIXELS, PIXELS).to(DEVICE), ids.to(DEVICE), mask.to(DEVICE)
        model.to(DEVICE)
        made = [model.encode_image(pixels), model.encode_text(ids, mask)]
        if isinstance(model, FusionModel):
            made.append(model.itm_logits(model.image_tokens(pixels), model.text_tokens(ids, mask), mask))
        assert all(isinstance(part, OnDevice) for part in made)
    assert not reads


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}


@pytest.mark.parametrize(("config", "reads_once"), [(BertConfig(**SMALL), 0), (MPNetConfig(**SMALL), 1)])
def test_a_text_tower_of_any_kind_sees_no_padding(config: Any, reads_once: int) -> None:
    """And keeps the host from waiting, where it takes a mask as attention reads it."""
    torch.manual_seed(0)
    text = TextTransformer(AutoModel.from_config(config)).eval()
    ids, mask = torch.randint(5, 50, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 4:] = 0
    expected = torch.cat([text(ids[:1], mask[:1]), text(ids[1:, :4], mask[1:, :4])])
    torch.testing.assert_close(text(ids, mask), expected, atol=1e-5, rtol=1e-4)
    with simulated_device() as reads:
        assert isinstance(text.to(DEVICE)(ids.to(DEVICE), mask.to(DEVICE)), OnDevice)
    assert len(reads) == reads_once


@pytest.mark.parametrize("quirks", [[], ["subword_product", "logit_cut"]])
def test_words_are_proposed_on_the_device_and_read_at_the_end(trial: TrialConfig, quirks: list[Quirk]) -> None:
    workshop = Workshop(trial, print)
    masked_lm, tokenizer = workshop.masked_lm()
    texts = [*map(bare_text, workshop.dataset.train.captions * 4), "circles left of squares"]
    expected = Proposer(masked_lm, tokenizer, frozenset(quirks)).propose(texts)
    assert not expected.empty
    with simulated_device() as reads:
        found = Proposer(masked_lm.to(DEVICE), tokenizer, frozenset(quirks)).propose(texts)
    assert found.texts() == texts
    assert (found.options == expected.options).all()
    batches = math.ceil(len(texts) / BATCH["cpu"])
    assert batches > 2
    if not quirks:  # transformers looks once a batch whether a mask is empty
        assert reads == [*["aten._local_scalar_dense.default"] * batches, "aten._to_copy.default"]


class Uploads(TorchDispatchMode):
    """Keeps what is copied from the host's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in args if isinstance(leaf, Tensor)]
        if function.overloadpacket in TRANSFERS and not isinstance(tensors[-1], OnDevice):
            self.found.append(tuple(tensors[-1].shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_waits_for_nothing_in_a_step(trial: TrialConfig, prepared: Prepared, family: str) -> None:
    """From the batch, whose copying is the only transfer, to the end of the optimiser's step."""
    attacked = {"epsilon": 2 / 255, "attack_steps": 2, "words": 2, "text_augmentation": "eda", "captions_per_image": 2}
    point = Point(**attacked, contrastive_weight=0.5, temperature_learned=True)
    config, own = trial.model_copy(update={"point": point}), with_base(prepared, family)
    with simulated_device() as reads:
        begun = begin(config, own, DEVICE, state_before(config, own, None, (), -1), Clock(DEVICE), lambda: None)
        for step, batch in enumerate(Feed(config, own, DEVICE).batches(0, 2)):
            reads.clear()
            with Uploads() as uploads:
                finetune._train(begun, batch, step)
            assert reads == []
            assert step == 0 or uploads.found == [], "at first, tables of words"


def test_what_is_left_on_the_host_is_found(
    trial: TrialConfig, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Clip.encode_text
    monkeypatch.setattr(Clip, "encode_text", lambda model, tokens, mask: encode(model, tokens.cpu(), mask))
    with simulated_device(), pytest.raises(WrongDeviceError):
        run(trial, with_base(prepared, "clip"), DEVICE, tmp_path)


def test_what_the_host_reads_is_counted() -> None:
    with simulated_device() as reads:
        values = torch.tensor([1.0, 2.0], device=DEVICE)
        assert (values + 1).square().sum().sqrt().shape == ()
        assert values[torch.tensor([1], device=DEVICE)].device == DEVICE
        assert not reads
        waiting = [
            lambda: values.tolist(),
            lambda: values[0].item(),
            lambda: bool((values > 1).any()),
            lambda: values[values > 1],
            lambda: values[torch.tensor([1])],
            lambda: values.nonzero(),
            lambda: values.cpu(),
            lambda: torch.zeros(2).copy_(values),
        ]
        for count, read in enumerate(waiting, 1):
            read()
            assert len(reads) == count
        assert isinstance(values, OnDevice)
        with pytest.raises((RuntimeError, TypeError)):
            values.numpy()
