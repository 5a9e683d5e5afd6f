"""What is made of a model's outputs is float32, whatever the autocast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_families import FAMILIES, LENGTH, PIXELS
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerBase

from trainables.attacks.registry import BUILT_IN
from trainables.config import AttackConfig, Point, TrialConfig
from trainables.evaluation.retrieval import retrieval_ranks
from trainables.models import FusionModel, RetrievalModel, tokenize
from trainables.precision import attackable, full_precision, inner_products
from trainables.prepare import Prepared, prepare
from trainables.training.finetune import finetune
from trainables.training.losses import consistency_loss, contrastive_loss, shared, similarities
from trainables.training.pretraining import train_tokenizer

CAPTIONS = ["a red circle", "a small blue square above something green"]
OPTIONS: dict[str, dict[str, Any]] = {"corruption": {"kind": "fog"}, "caption-noise": {"kind": "keyboard"}}


class WithoutProducts(FusionModel):
    """Float32 throughout, for it multiplies no matrices: so whatever becomes bfloat16 is not the model's."""

    family = "albef"
    similarity_weight = 1.0

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.words = nn.Embedding(len(tokenizer), 16)
        self.seen, self.fused = nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(16))

    def image_tokens(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1)[:, :64].unflatten(1, (4, 16)) * self.seen

    def image_features(self, image_tokens: Tensor) -> Tensor:
        return image_tokens.sum(1)

    def text_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.words(tokens)

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return (self.words(tokens) * mask[:, :, None]).sum(1)

    def itm_logits(self, image_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        texts = (text_tokens * mask[:, :, None] * self.fused).sum(1)
        images = image_tokens.sum(1).repeat_interleave(len(texts) // len(image_tokens), 0)
        return torch.stack([(images - texts).square().sum(1), (images * texts).sum(1)], 1)

    def image_parameters(self) -> Iterator[nn.Parameter]:
        yield self.seen

    def text_parameters(self) -> Iterator[nn.Parameter]:
        return self.words.parameters()

    def fusion_parameters(self) -> Iterator[nn.Parameter]:
        yield self.fused

    def save(self, folder: Path) -> None:
        pass


class Halved(TorchDispatchMode):
    """Names the operations that made something bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 for leaf in tree_leaves(made)):
            self.operations.add(str(function))
        return made


@pytest.fixture(scope="module")
def prepared(tiny_trial: TrialConfig) -> Prepared:
    prepared = prepare(tiny_trial)
    torch.manual_seed(0)
    return replace(prepared, base=WithoutProducts(prepared.base.tokenizer), cache_dir=None)


@pytest.mark.parametrize("point", [{"companion": "matching"}, {"companion": "consistency"}, {"companion": "anchor"}])
def test_nothing_but_the_model_computes_in_bfloat16(
    tiny_trial: TrialConfig,
    prepared: Prepared,
    point: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("robustness", "reranking"):  # what the fusion goes on from is the model's
        monkeypatch.setattr(f"trainables.evaluation.{module}.compact", lambda tokens: tokens)
    monkeypatch.setattr("trainables.precision.nullcontext", lambda: torch.autocast("cpu", torch.bfloat16))
    attacks = tuple(
        AttackConfig(name=name, attack=name, options=OPTIONS.get(name, {}))
        for name in BUILT_IN
        if name != "transfer"  # brings images from a saved model
    )
    changes = {"attacks": attacks, "audit": True, "rerank": 3}
    if point["companion"] != "matching":
        changes = {"attacks": (), "audit": False}
    objective = "deviation" if point["companion"] == "anchor" else "cross"
    updates = {
        "point": Point(
            epsilon=2 / 255, attack_steps=1, words=1, contrastive_weight=0.5, attack_objective=objective, **point
        ),
        "protocol": tiny_trial.protocol.model_copy(update={**changes, "gallery_images": 6}),
        "training": tiny_trial.training.model_copy(update={"epochs": 1, "epoch_images": 8}),
    }
    with Halved() as halved:
        finetune(tiny_trial.model_copy(update=updates), prepared, torch.device("cpu"), None, tmp_path, lambda *_: None)
    assert not halved.operations


def test_products_are_full_within_and_as_before_afterwards() -> None:
    one, other = torch.randn(3, 64), torch.randn(5, 64)
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert (one @ other.T).dtype == torch.bfloat16
            with full_precision():
                assert torch.get_float32_matmul_precision() == "highest"
                exact = one @ other.T
            assert torch.equal(inner_products(one, other), exact)
            assert exact.dtype == torch.float32
            assert (one @ other.T).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(products)


@pytest.mark.parametrize("width", [1.0, 0.3, 0.1, 0.03])
def test_a_narrow_cone_has_the_same_ranks_and_losses_under_autocast(width: float) -> None:
    """Adversarial training moves the temperature, and that how narrow the cone of all features is: cosines then differ
    in the third digit, which bfloat16 has not."""
    draw = torch.Generator().manual_seed(int(100 * width))
    count, dim = 5000, 32

    def features(noise: float) -> Tensor:
        return axis + width * (own + noise * torch.randn(count, dim, generator=draw))

    axis, own = torch.randn(1, dim, generator=draw), torch.randn(count, dim, generator=draw)
    images, texts, adversarial = features(1.0), features(1.0), features(1.5)

    def found() -> tuple[list[Tensor], list[float]]:
        ranked = retrieval_ranks(F.normalize(images), F.normalize(texts), np.arange(count), np.arange(count))
        pairs = [(shared(some[:500]), shared(texts[:500])) for some in (images, adversarial)]
        clean, attacked = (similarities(*pair) for pair in pairs)
        right, temperature = torch.eye(500, dtype=torch.bool), torch.tensor(0.01)
        losses = contrastive_loss(attacked, (right, right), temperature), consistency_loss(clean, attacked, temperature)
        return [torch.from_numpy(ranked.tr), torch.from_numpy(ranked.ir)], [float(loss) for loss in losses]

    ranks, losses = found()
    with torch.autocast("cpu", torch.bfloat16):
        under, losses_under = found()
    assert 0.05 < (ranks[0] == 1).float().mean() < 0.95, "neither all nor none are found"
    assert all(map(torch.equal, under, ranks))
    assert losses_under == losses


def outputs(model: RetrievalModel, pixels: Tensor, tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """All that an attack reads, and the gradient that it follows."""
    pixels = pixels.clone().requires_grad_(True)
    made = [model.encode_image(pixels), model.encode_text(tokens, mask)]
    if isinstance(model, FusionModel):
        made.append(model.itm_logits(model.image_tokens(pixels), model.text_tokens(tokens, mask), mask))
    (gradient,) = torch.autograd.grad(sum(part.float().square().sum() for part in made), pixels)
    return [*(part.detach() for part in made), gradient]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_cast_once_give_what_autocast_gives(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family](train_tokenizer(CAPTIONS)).train()
    given = torch.rand(2, 3, PIXELS, PIXELS), *tokenize(model, CAPTIONS, LENGTH)
    before, modes = dict(model.named_parameters()), [module.training for module in model.modules()]
    learned = {name for name, parameter in before.items() if parameter.requires_grad}
    exact = outputs(model.eval().requires_grad_(False), *given)
    with torch.autocast("cpu", torch.bfloat16):
        expected = outputs(model, *given)
    for name, parameter in before.items():
        parameter.requires_grad_(name in learned)
    model.train()
    with attackable(model, torch.device("cpu")):  # no autocast, no copies
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
    monkeypatch.setattr("trainables.precision.nullcontext", lambda: torch.autocast("cpu", torch.bfloat16))

    def attack() -> None:
        with attackable(model, torch.device("cpu")), attackable(model, torch.device("cpu")):
            found = outputs(model, *given)
            for one, other, full in zip(found, expected, exact, strict=True):
                assert torch.equal(one, other)
                assert not torch.equal(one, full)
            assert not any(parameter.requires_grad for parameter in model.parameters())
            layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
            whole = [module for module in layers if module.weight.dtype != torch.bfloat16]
            assert len(layers) > 8
            assert whole == [module for module in layers if getattr(module, "stride", None) == (8, 8)]  # of patches
            raise KeyError

    with pytest.raises(KeyError):
        attack()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert learned == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [module.training for module in model.modules()] == modes


def test_weights_are_cast_where_they_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainables.precision.nullcontext", lambda: torch.autocast("cpu", torch.bfloat16))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        gradients = []
        for attacked in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
            trainee: Any = nn.Sequential(model)
            fully_shard(trainee, reshard_after_forward=False)
            if attacked:
                trainee.unshard()
                with attackable(model, torch.device("cpu")):
                    assert model[0].weight.dtype == torch.bfloat16
                    assert model(torch.ones(2, 8)).dtype == torch.bfloat16
            trainee(torch.arange(16.0).view(2, 8)).square().sum().backward()
            gradients.append([parameter.grad.full_tensor() for parameter in trainee.parameters()])
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)
            assert one.dtype == torch.float32
    finally:
        dist.destroy_process_group()
