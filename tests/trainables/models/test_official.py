"""The published files: every entry is accounted for, and what comes out is what their layout says.

Names and shapes are those of `published_layouts`; the weights are random.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published_layouts import (
    HEADS,
    PUBLISHED,
    clip_shapes,
    random_state,
    reference_bert,
    reference_clip,
    reference_clip_image,
    reference_embeddings,
    reference_vit,
    retrieval,
    said_by_open_clip,
    small,
    small_clip,
    with_clip_vocabulary,
    with_vocabulary,
)
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from trainables.errors import InputError
from trainables.models import tokenize
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.models.clip import Clip
from trainables.models.loading import load
from trainables.models.official import read_state


def close(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    assert other.std() > 0.05
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


CAPTIONS = ["red circle", "a blue square a blue square"]


@pytest.mark.parametrize("name", ["albef-14m", "albef-retrieval"])
def test_albef(name: str, tmp_path: Path) -> None:
    state, path = random_state(PUBLISHED[name]), with_vocabulary(tmp_path)
    torch.save({"model": state, "epoch": 4}, path)
    model = load(str(path)).eval()  # at the size of its retrieval, also where it was pre-trained at 256
    assert isinstance(model, Albef)
    tokens, mask = tokenize(model, CAPTIONS, 30)
    assert tokens[0].tolist() == [101, 130, 131, 0, 0, 0, 0]  # [CLS] red circle, and no [SEP]
    pixels = torch.rand(1, 3, 384, 384)
    if name == "albef-14m":
        square = state["visual_encoder.pos_embed"][0, 1:].view(1, 16, 16, 768).permute(0, 3, 1, 2)
        larger = F.interpolate(square, size=(24, 24), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
        first = state["visual_encoder.pos_embed"][:, :1]
        state["visual_encoder.pos_embed"] = torch.cat([first, larger.reshape(1, 576, 768)], 1)
    text = "text_encoder.bert" if name == "albef-14m" else "text_encoder"
    image_tokens = reference_vit(state, pixels)
    close(model.image_tokens(pixels), image_tokens)
    lower = reference_bert(state, text, reference_embeddings(state, f"{text}.embeddings", tokens), mask, range(6))
    close(model.text_tokens(tokens, mask)[mask > 0], lower[mask > 0])
    close(model.encode_text(tokens, mask), F.linear(lower[:, 0], state["text_proj.weight"], state["text_proj.bias"]))
    close(
        model.encode_image(pixels),
        F.linear(image_tokens[:, 0], state["vision_proj.weight"], state["vision_proj.bias"]),
    )
    fused = reference_bert(state, text, lower, mask, range(6, 12), image_tokens.expand(2, -1, -1))
    logits = F.linear(fused[:, 0], state["itm_head.weight"], state["itm_head.bias"])
    close(model.itm_logits(image_tokens, model.text_tokens(tokens, mask), mask), logits)
    assert (model.similarity_weight, Blip.similarity_weight) == (0, 1)


def test_blip(tmp_path: Path) -> None:
    state, path = random_state(PUBLISHED["blip-retrieval"]), with_vocabulary(tmp_path)
    model = Blip.from_official(state, path, None).eval()
    tokens, mask = tokenize(model, CAPTIONS, 35)
    assert tokens[0].tolist() == [101, 130, 131, 102, 0, 0, 0, 0]
    pixels = torch.rand(1, 3, 384, 384)
    image_tokens = reference_vit(state, pixels)
    close(model.image_tokens(pixels), image_tokens)
    embedded = reference_embeddings(state, "text_encoder.embeddings", tokens)
    text = reference_bert(state, "text_encoder", embedded, mask, range(12))
    close(model.encode_text(tokens, mask), F.linear(text[:, 0], state["text_proj.weight"], state["text_proj.bias"]))
    encoder = tokens.clone()
    encoder[:, 0] = 30523  # [ENC]
    embedded = reference_embeddings(state, "text_encoder.embeddings", encoder)
    fused = reference_bert(state, "text_encoder", embedded, mask, range(12), image_tokens.expand(2, -1, -1))
    logits = F.linear(fused[:, 0], state["itm_head.weight"], state["itm_head.bias"])
    close(model.itm_logits(image_tokens, model.text_tokens(tokens, mask), mask), logits)


@pytest.mark.parametrize("openai", [True, False])
def test_clip(openai: bool, tmp_path: Path) -> None:
    """OpenAI's activation is QuickGELU, open_clip's is GELU."""
    state = random_state(clip_shapes(openai))
    with_clip_vocabulary(tmp_path)
    if openai:
        torch.save(state, tmp_path / "ViT-B-16.pt")
        model: Any = load(str(tmp_path / "ViT-B-16.pt"))
    else:
        said_by_open_clip(tmp_path)
        save_file(state, tmp_path / "open_clip_model.safetensors")
        model = load(str(tmp_path / "open_clip_model.safetensors"))
    model.eval()
    tokens, mask = tokenize(model, CAPTIONS, 77)
    assert tokens[0, 0] == 49406
    assert (tokens == 49407).any(1).all()
    pixels = torch.rand(1, 3, 224, 224)
    close(model.encode_image(pixels), reference_clip_image(state, pixels, quick=openai))
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"][: tokens.shape[1]]
    x = reference_clip(state, "transformer", x, causal=True, quick=openai)
    x = F.layer_norm(x, (512,), state["ln_final.weight"], state["ln_final.bias"])
    ends = x[torch.arange(2), (tokens == 49407).int().argmax(1)]
    close(model.encode_text(tokens, mask), ends @ state["text_projection"])


def test_whatever_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    state = small_clip(tmp_path, openai=True)
    del state["ln_final.weight"]
    state["visual.ln_post.bias"] = torch.zeros(3)
    state["visual.pool.weight"] = torch.zeros(3)
    with pytest.raises(InputError) as caught:
        Clip.from_official(state, tmp_path / "a.pt", None)
    assert "missing: text_model.final_layer_norm.weight" in str(caught.value)
    assert "unknown: visual.pool.weight" in str(caught.value)
    assert "of another shape: vision_model.post_layernorm.bias" in str(caught.value)


class Bomb:
    def __reduce__(self) -> Any:
        return (print, ("pickles are opened",))


def test_no_pickle_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"weight": Bomb()}}, tmp_path / "bomb.pth")
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        load(str(tmp_path / "bomb.pth"))
    assert "opened" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"not a checkpoint", "cannot be read as plain tensors"),
        (b"", "cannot be read as plain tensors"),
        ({"epoch": 3}, "holds no state dict"),
        ({"model": {"layer.weight": torch.zeros(2)}}, "is no ALBEF, BLIP or CLIP"),
    ],
)
def test_other_files_are_refused(content: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=told):
        load(str(path))


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"module.logit_scale": torch.ones(())}}, tmp_path / "a.pt")
    assert list(read_state(tmp_path / "a.pt")) == ["logit_scale"]


def test_a_folder_is_of_its_own_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "flava"}))
    with pytest.raises(InputError, match="is a flava; accepted are clip, siglip, blip, albef"):
        load(str(tmp_path))
    with pytest.raises(InputError, match=r"nowhere' cannot be loaded.*"):
        load(str(tmp_path / "nowhere"))


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    model = Clip.from_official(small_clip(tmp_path, openai=True), tmp_path / "a.pt", None)
    model.save(tmp_path / "model")
    assert type(load(str(tmp_path / "model"))) is Clip
    weights = read_state(tmp_path / "model" / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing: visual_projection\.weight"):
        load(str(tmp_path / "model"))


def test_momentum_copies_can_be_taken(tmp_path: Path) -> None:
    """Encoders and projections come from the copies, the matching head is the only one there is."""
    path = with_vocabulary(tmp_path)
    copies = {**retrieval("", range(1, 2), 30522, True, 2), **retrieval("_m", range(1, 2), 30522, True, 2), **HEADS}
    state = small(copies)
    for name in [name for name in state if "_m." in name]:
        state[name] = state[name.replace("_m.", ".")] + 1
    own = Albef.from_official(state, path, None).state_dict()
    copied = Albef.from_official(state, path, None, momentum=True).state_dict()
    for name, tensor in own.items():
        assert torch.equal(copied[name], tensor if "itm_head" in name else tensor + 1)


def test_an_entry_that_tells_the_size_is_missing(tmp_path: Path) -> None:
    torch.save({"visual_encoder.blocks.0.attn.qkv.weight": torch.zeros(192, 64)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"does not fit Albef: missing is 'visual_encoder\.pos_embed'"):
        load(str(tmp_path / "a.pth"))
