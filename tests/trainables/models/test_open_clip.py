"""Weights under OpenAI's names compute as what is said about them, and are refused where nothing is."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_layouts import reference_clip_image, said_by_open_clip, small_clip
from safetensors.torch import save_file
from torch import Tensor, nn

from trainables.errors import InputError
from trainables.models.clip import Clip
from trainables.models.loading import load
from trainables.models.official import resampled
from trainables.models.open_clip import computation


class Empty(nn.Module):
    """Entries by their names, one module a dot."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels


def archive(state: dict[str, Tensor], path: Path) -> None:
    """A TorchScript archive as OpenAI publishes: half precision but norms, and three numbers among the entries."""
    root = Empty()
    for name, tensor in state.items():
        *parents, last = name.split(".")
        module: nn.Module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, Empty())
            module = getattr(module, parent)
        module.register_buffer(last, tensor.half() if tensor.ndim > 1 else tensor)
    torch.jit.save(torch.jit.script(root), path)


def test_the_advice_for_openai_s_archives_leads_to_their_activation(tmp_path: Path) -> None:
    state = small_clip(tmp_path, openai=True)
    state = {name: tensor.half().float() * (8 if ".mlp." in name else 1) for name, tensor in state.items()}
    state |= {name: torch.tensor(224) for name in ("input_resolution", "context_length", "vocab_size")}
    archive(state, tmp_path / "ViT-B-16.pt")
    with pytest.raises(InputError, match="is a TorchScript archive") as caught:
        load(str(tmp_path / "ViT-B-16.pt"))
    assert "weights_only" not in str(caught.value)
    advice = textwrap.dedent("\n".join(line for line in str(caught.value).splitlines() if line.startswith("    ")))
    subprocess.run([sys.executable, "-W", "ignore", "-c", advice], check=True)
    model = load(str(tmp_path / "ViT-B-16.safetensors")).eval()
    assert isinstance(model, Clip)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    pixels = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        found = model.encode_image(pixels)
        quick, plain = (reference_clip_image(state, pixels, quick) for quick in (True, False))
    assert (quick - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, quick, atol=1e-5, rtol=1e-4)
    assert not any("gelu" in guess for guess in model.guesses)


def test_a_state_dict_that_says_nothing_is_refused(tmp_path: Path) -> None:
    """As `clip.load(...).state_dict()` is, without the three numbers."""
    save_file(small_clip(tmp_path), tmp_path / "ViT-B-32.safetensors")
    with pytest.raises(InputError, match="nothing says whether it was trained with QuickGELU or GELU"):
        load(str(tmp_path / "ViT-B-32.safetensors"))
    said_by_open_clip(tmp_path, quick_gelu=True)
    model: Any = load(str(tmp_path / "ViT-B-32.safetensors"))
    assert model.clip.config.text_config.hidden_act == model.clip.config.vision_config.hidden_act == "quick_gelu"


NAMED = {
    "vit_b_32-quickgelu-laion400m_e32-46683a32.pt": "quick_gelu",
    "vit_b_16-laion400m_e32-55e67d44.pt": "gelu",
    "ViT-B-16-openai.safetensors": "quick_gelu",
    "metaclip_fullcc.safetensors": "quick_gelu",
    "metaclip_h14_altogether.pt": "gelu",
    "DFN5B-CLIP-ViT-H-14.bin": "quick_gelu",
    "DFN2B-CLIP-ViT-L-14-39B.bin": "gelu",
    "CLIP-ViT-B-32-laion2B-s34B-b79K.safetensors": "gelu",
    "datacomp_xl_s13b_b90k.bin": "gelu",
    "laion400m_e32.pt": "gelu",
    "metaclip2_h14_378px_worldwide.pt": None,  # quick at 224 pixels alone
    "b32_400m.pt": None,  # MetaCLIP's own names say nothing
    "openai-then-laion2b.pt": None,
}


@pytest.mark.parametrize(("name", "activation"), NAMED.items())
def test_a_name_is_a_guess_that_is_told(name: str, activation: str | None, tmp_path: Path) -> None:
    state = small_clip(tmp_path)
    if activation is None:
        with pytest.raises(InputError, match="nothing says"):
            Clip.from_official(state, tmp_path / name, None)
    else:
        model = Clip.from_official(state, tmp_path / name, None)
        assert model.clip.config.vision_config.hidden_act == activation
        assert model.guesses == (f"only the file's name says that it was trained with {activation}",)


@pytest.mark.parametrize("name", ["ViT-B-32-laion400m_e32.pt", "laion400m_e31.safetensors"])
def test_of_laion400m_only_patches_of_32_are_quick(name: str, tmp_path: Path) -> None:
    state = small_clip(tmp_path)
    patches = state["visual.conv1.weight"]
    for side, activation in ((14, "gelu"), (16, "gelu"), (32, "quick_gelu")):
        state["visual.conv1.weight"] = patches.new_zeros(*patches.shape[:2], side, side)
        assert computation(state, tmp_path / name).activation == activation


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"text_cfg": {"no_causal_mask": True}}, r"text_cfg\.no_causal_mask"),
        ({"vision_cfg": {"pool_type": "avg"}}, r"vision_cfg\.pool_type"),
        ({"vision_cfg": {"timm_model_name": "vit_base"}, "custom_text": True}, r"custom_text, vision_cfg\.timm"),
        ({"vision_cfg": 3}, "is no configuration of open_clip"),
    ],
)
def test_what_no_weight_shows_is_not_passed_over(config: dict[str, Any], told: str, tmp_path: Path) -> None:
    said_by_open_clip(tmp_path, **config)
    with pytest.raises(InputError, match=told):
        Clip.from_official(small_clip(tmp_path), tmp_path / "a.pt", None)


def test_an_open_clip_folder_is_read_with_its_configuration(tmp_path: Path) -> None:
    said_by_open_clip(
        tmp_path, quick_gelu=True, vision_cfg={"width": 64, "head_width": 32, "pool_type": "tok"}, text_cfg={"heads": 4}
    )
    torch.save(small_clip(tmp_path), tmp_path / "open_clip_pytorch_model.bin")
    model: Any = load(str(tmp_path))
    vision, text = model.clip.config.vision_config, model.clip.config.text_config
    assert (vision.hidden_act, vision.num_attention_heads, text.num_attention_heads) == ("quick_gelu", 2, 4)


@pytest.fixture(scope="module")
def positions() -> dict[str, Tensor]:
    """Made with open_clip 3.3.0, ALBEF and BLIP, and again in float64 from the definition."""
    with np.load(Path(__file__).with_name("data") / "positions.npz") as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize(("own", "grid"), [(14, 24), (24, 14), (7, 12), (16, 14)])
@pytest.mark.parametrize(("way", "antialias"), [("open_clip", True), ("plain", False)])
def test_positions_are_resampled_as_published(
    own: int, grid: int, way: str, antialias: bool, positions: dict[str, Tensor]
) -> None:
    first = torch.tensor([[10.0, 20.0, 30.0]])
    given = torch.cat([first, positions[f"in_{own}"].reshape(own * own, 3)])
    found = resampled(given, grid, antialias=antialias)
    torch.testing.assert_close(found, positions[f"{way}_{own}_{grid}"], atol=1e-5, rtol=1e-5)
    assert (found - resampled(given, grid, antialias=not antialias)).abs().max() > 0.1
    assert resampled(given, own, antialias=antialias) is given


def test_clip_s_positions_are_resampled_as_open_clip_does(tmp_path: Path) -> None:
    state = small_clip(tmp_path, openai=True)
    model = Clip.from_official(state, tmp_path / "a.pt", 320)
    weight = model.clip.vision_model.embeddings.position_embedding.weight
    assert torch.equal(weight, resampled(state["visual.positional_embedding"], 20, antialias=True))
