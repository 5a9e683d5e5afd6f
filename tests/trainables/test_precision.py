"""What is made of a model's outputs is float32, whatever the autocast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerBase

from trainables.attacks.registry import BUILT_IN
from trainables.config import AttackConfig, Point, TrialConfig
from trainables.models import FusionModel
from trainables.precision import full_precision, inner_products
from trainables.prepare import Prepared, prepare
from trainables.training.finetune import finetune

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
    return replace(prepared, base=WithoutProducts(prepared.base.tokenizer))


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
    attacks = tuple(AttackConfig(name=name, attack=name, options=OPTIONS.get(name, {})) for name in BUILT_IN)
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
