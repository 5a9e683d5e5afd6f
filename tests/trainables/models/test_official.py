"""The published files: every entry is accounted for, and what comes out is what their layout says.

The tables below are the published names and shapes, at the published sizes; the weights are random.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from trainables.command import InputError
from trainables.models import tokenize
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.models.clip import Clip
from trainables.models.loading import load
from trainables.models.official import read_state, resampled

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vit(prefix: str, tokens: int, depth: int = 12) -> Shapes:
    """ViT-B/16 as timm names it, in ALBEF and BLIP."""
    shapes: Shapes = {
        f"{prefix}.cls_token": (1, 1, 768),
        f"{prefix}.pos_embed": (1, tokens, 768),
        f"{prefix}.patch_embed.proj.weight": (768, 3, 16, 16),
        f"{prefix}.patch_embed.proj.bias": (768,),
    }
    for block in (f"{prefix}.blocks.{index}" for index in range(depth)):
        shapes |= norm(f"{block}.norm1", 768) | linear(f"{block}.attn.qkv", 2304, 768)
        shapes |= linear(f"{block}.attn.proj", 768, 768) | norm(f"{block}.norm2", 768)
        shapes |= linear(f"{block}.mlp.fc1", 3072, 768) | linear(f"{block}.mlp.fc2", 768, 3072)
    return shapes | norm(f"{prefix}.norm", 768)


def bert(prefix: str, crossing: range, vocabulary: int, token_types: bool, depth: int = 12) -> Shapes:
    """BERT-base with cross-attention in some layers."""
    shapes: Shapes = {
        f"{prefix}.embeddings.position_ids": (1, 512),
        f"{prefix}.embeddings.word_embeddings.weight": (vocabulary, 768),
        f"{prefix}.embeddings.position_embeddings.weight": (512, 768),
    }
    if token_types:
        shapes[f"{prefix}.embeddings.token_type_embeddings.weight"] = (2, 768)
    shapes |= norm(f"{prefix}.embeddings.LayerNorm", 768)
    for index in range(depth):
        layer = f"{prefix}.encoder.layer.{index}"
        for attention in ("attention", "crossattention") if index in crossing else ("attention",):
            for part in ("query", "key", "value"):
                shapes |= linear(f"{layer}.{attention}.self.{part}", 768, 768)
            shapes |= linear(f"{layer}.{attention}.output.dense", 768, 768)
            shapes |= norm(f"{layer}.{attention}.output.LayerNorm", 768)
        shapes |= linear(f"{layer}.intermediate.dense", 3072, 768)
        shapes |= linear(f"{layer}.output.dense", 768, 3072) | norm(f"{layer}.output.LayerNorm", 768)
    return shapes


def masked_lm_head(prefix: str) -> Shapes:
    return {
        f"{prefix}.cls.predictions.bias": (30522,),
        **linear(f"{prefix}.cls.predictions.transform.dense", 768, 768),
        **norm(f"{prefix}.cls.predictions.transform.LayerNorm", 768),
        **linear(f"{prefix}.cls.predictions.decoder", 30522, 768),
    }


def albef_pretrained(m: str = "") -> Shapes:
    text = f"text_encoder{m}"
    return {
        **vit(f"visual_encoder{m}", 257),
        **bert(f"{text}.bert", range(6, 12), 30522, token_types=True),
        **masked_lm_head(text),
        **linear(f"vision_proj{m}", 256, 768),
        **linear(f"text_proj{m}", 256, 768),
    }


def retrieval(m: str, crossing: range, vocabulary: int, token_types: bool, depth: int = 12) -> Shapes:
    return {
        **vit(f"visual_encoder{m}", 577, depth),
        **bert(f"text_encoder{m}", crossing, vocabulary, token_types, depth),
        **linear(f"vision_proj{m}", 256, 768),
        **linear(f"text_proj{m}", 256, 768),
    }


def queues(size: int, pointer: str, index: bool) -> Shapes:
    shapes: Shapes = {"image_queue": (256, size), "text_queue": (256, size), pointer: (1,)}
    return shapes | ({"idx_queue": (1, size)} if index else {})


HEADS: Shapes = {"temp": (), **linear("itm_head", 2, 768)}

PUBLISHED: dict[str, Shapes] = {
    "albef-14m": {**albef_pretrained(), **albef_pretrained("_m"), **HEADS, **queues(65536, "queue_ptr", False)},
    "albef-retrieval": {
        **retrieval("", range(6, 12), 30522, True),
        **retrieval("_m", range(6, 12), 30522, True),
        **HEADS,
        **queues(65536, "queue_ptr", True),
    },
    "blip-retrieval": {
        **retrieval("", range(12), 30524, False),
        **retrieval("_m", range(12), 30524, False),
        **HEADS,
        **queues(57600, "ptr_queue", True),
    },
}


def clip_shapes(openai: bool) -> Shapes:
    """CLIP ViT-B/16 as OpenAI and open_clip name it."""
    shapes: Shapes = {
        "visual.class_embedding": (768,),
        "visual.positional_embedding": (197, 768),
        "visual.proj": (768, 512),
        "visual.conv1.weight": (768, 3, 16, 16),
        **norm("visual.ln_pre", 768),
        **norm("visual.ln_post", 768),
        "positional_embedding": (77, 512),
        "token_embedding.weight": (49408, 512),
        **norm("ln_final", 512),
        "text_projection": (512, 512),
        "logit_scale": (),
    }
    for tower, width in (("visual.transformer", 768), ("transformer", 512)):
        for block in (f"{tower}.resblocks.{index}" for index in range(12)):
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            shapes |= linear(f"{block}.attn.out_proj", width, width)
            shapes |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
            shapes |= linear(f"{block}.mlp.c_fc", 4 * width, width) | linear(f"{block}.mlp.c_proj", width, 4 * width)
    return shapes | ({"input_resolution": (), "context_length": (), "vocab_size": ()} if openai else {})


def random_state(shapes: Shapes) -> dict[str, Tensor]:
    """Norms around 1, the rest around 0; what should be left out is NaN and takes no memory."""
    generator = torch.Generator().manual_seed(0)
    left_out = ("_m.", "queue", "temp", "position_ids", ".cls.", "input_resolution", "context_length", "vocab_size")
    state = {}
    for name, shape in shapes.items():
        if any(part in name for part in left_out):
            state[name] = torch.tensor(float("nan")).expand(shape)
        else:
            spread = 0.02 if len(shape) > 1 else 0.1
            one = bool(("norm" in name.lower() or "ln_" in name) and name.endswith("weight"))
            state[name] = torch.randn(shape, generator=generator) * spread + one
    return state


def with_vocabulary(folder: Path) -> Path:
    """A WordPiece vocabulary of BERT's size beside the checkpoint."""
    words = ["[PAD]", *(f"[unused{index}]" for index in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [*"abcdefghijklmnopqrstuvwxyz", "red", "circle", "square", "blue"]
    words += [f"filler{index}" for index in range(30522 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder / "checkpoint.pth"


# References: what the layouts mean, written from their description alone.


def reference_vit(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Pre-norm ViT with one joined projection for queries, keys and values, and a norm at the end."""

    def parts(name: str) -> tuple[Tensor, Tensor]:
        return state[f"visual_encoder.{name}.weight"], state[f"visual_encoder.{name}.bias"]

    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    x = F.conv2d((pixels - mean) / std, *parts("patch_embed.proj"), stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual_encoder.cls_token"].expand(len(x), -1, -1), x], 1) + state["visual_encoder.pos_embed"]
    for block in (f"blocks.{index}" for index in range(12)):
        h = F.layer_norm(x, (768,), *parts(f"{block}.norm1"), eps=1e-6)
        q, k, v = F.linear(h, *parts(f"{block}.attn.qkv")).view(*h.shape[:2], 3, 12, 64).permute(2, 0, 3, 1, 4)
        h = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(h, *parts(f"{block}.attn.proj"))
        h = F.layer_norm(x, (768,), *parts(f"{block}.norm2"), eps=1e-6)
        x = x + F.linear(F.gelu(F.linear(h, *parts(f"{block}.mlp.fc1"))), *parts(f"{block}.mlp.fc2"))
    return F.layer_norm(x, (768,), *parts("norm"), eps=1e-6)


def reference_bert(
    state: dict[str, Tensor], prefix: str, x: Tensor, mask: Tensor, numbers: range, image: Tensor | None = None
) -> Tensor:
    """Post-norm BERT layers, with cross-attention after self-attention where there is an image."""

    def parts(name: str) -> tuple[Tensor, Tensor]:
        return state[f"{prefix}.{name}.weight"], state[f"{prefix}.{name}.bias"]

    def attend(name: str, x: Tensor, source: Tensor, hidden: Tensor | float) -> Tensor:
        q, k, v = (
            F.linear(of, *parts(f"{name}.self.{part}")).unflatten(2, (12, 64)).transpose(1, 2)
            for part, of in (("query", x), ("key", source), ("value", source))
        )
        seen = ((q @ k.mT / 8 + hidden).softmax(-1) @ v).transpose(1, 2).flatten(2)
        added = x + F.linear(seen, *parts(f"{name}.output.dense"))
        return F.layer_norm(added, (768,), *parts(f"{name}.output.LayerNorm"), eps=1e-12)

    for layer in (f"encoder.layer.{number}" for number in numbers):
        x = attend(f"{layer}.attention", x, x, (1 - mask[:, None, None].float()) * -1e4)
        if image is not None:
            x = attend(f"{layer}.crossattention", x, image, 0.0)
        h = F.linear(F.gelu(F.linear(x, *parts(f"{layer}.intermediate.dense"))), *parts(f"{layer}.output.dense"))
        x = F.layer_norm(x + h, (768,), *parts(f"{layer}.output.LayerNorm"), eps=1e-12)
    return x


def reference_embeddings(state: dict[str, Tensor], prefix: str, tokens: Tensor) -> Tensor:
    x = state[f"{prefix}.word_embeddings.weight"][tokens]
    x = x + state[f"{prefix}.position_embeddings.weight"][: tokens.shape[1]]
    if f"{prefix}.token_type_embeddings.weight" in state:
        x = x + state[f"{prefix}.token_type_embeddings.weight"][0]
    return F.layer_norm(x, (768,), state[f"{prefix}.LayerNorm.weight"], state[f"{prefix}.LayerNorm.bias"], eps=1e-12)


def reference_clip(state: dict[str, Tensor], tower: str, x: Tensor, causal: bool, quick: bool) -> Tensor:
    """The blocks of a CLIP tower: pre-norm, joined projection."""
    width, length = x.shape[2], x.shape[1]
    hidden = torch.full((length, length), -torch.inf).triu(1) if causal else torch.zeros(length, length)
    for block in (f"{tower}.resblocks.{index}" for index in range(12)):

        def parts(name: str, block: str = block) -> tuple[Tensor, Tensor]:
            return state[f"{block}.{name}.weight"], state[f"{block}.{name}.bias"]

        h = F.layer_norm(x, (width,), *parts("ln_1"))
        joined = F.linear(h, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"])
        q, k, v = (part.unflatten(2, (width // 64, 64)).transpose(1, 2) for part in joined.chunk(3, -1))
        h = ((q @ k.mT / 8 + hidden).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(h, *parts("attn.out_proj"))
        h = F.linear(F.layer_norm(x, (width,), *parts("ln_2")), *parts("mlp.c_fc"))
        x = x + F.linear(h * torch.sigmoid(1.702 * h) if quick else F.gelu(h), *parts("mlp.c_proj"))
    return x


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
    model = load(str(path), 384).eval()
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


def clip_tokenizer(folder: Path) -> None:
    """Bytes without merges, and CLIP's two special tokens at the end."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words = letters + [f"filler{index}" for index in range(49406 - len(letters))] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.mark.parametrize("openai", [True, False])
def test_clip(openai: bool, tmp_path: Path) -> None:
    """OpenAI's activation is QuickGELU, open_clip's is GELU."""
    state = random_state(clip_shapes(openai))
    clip_tokenizer(tmp_path)
    if openai:
        torch.save(state, tmp_path / "ViT-B-16.pt")
        model: Any = load(str(tmp_path / "ViT-B-16.pt"))
    else:
        save_file(state, tmp_path / "open_clip_model.safetensors")
        model = load(str(tmp_path / "open_clip_model.safetensors"))
    model.eval()
    tokens, mask = tokenize(model, CAPTIONS, 77)
    assert tokens[0, 0] == 49406
    assert (tokens == 49407).any(1).all()
    pixels = torch.rand(1, 3, 224, 224)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    x = F.conv2d((pixels - mean) / std, state["visual.conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(1, 1, -1), x], 1) + state["visual.positional_embedding"]
    x = F.layer_norm(x, (768,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = reference_clip(state, "visual.transformer", x, causal=False, quick=openai)[:, 0]
    x = F.layer_norm(x, (768,), state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    close(model.encode_image(pixels), x @ state["visual.proj"])
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"][: tokens.shape[1]]
    x = reference_clip(state, "transformer", x, causal=True, quick=openai)
    x = F.layer_norm(x, (512,), state["ln_final.weight"], state["ln_final.bias"])
    ends = x[torch.arange(2), (tokens == 49407).int().argmax(1)]
    close(model.encode_text(tokens, mask), ends @ state["text_projection"])


def small(shapes: Shapes) -> dict[str, Tensor]:
    """The same entries with 64 channels."""
    sides = {768: 64, 512: 64, 2304: 192, 1536: 192, 3072: 256, 2048: 256, 49408: 300}
    return random_state({name: tuple(sides.get(side, side) for side in shape) for name, shape in shapes.items()})


def small_clip() -> dict[str, Tensor]:
    """One layer a tower."""
    return small(
        {name: shape for name, shape in clip_shapes(False).items() if ".resblocks." not in name or ".0." in name}
    )


def test_open_clip_tells_its_activation(tmp_path: Path) -> None:
    clip_tokenizer(tmp_path)
    state = small_clip()

    def activation(file: str) -> str:
        return Clip.from_official(state, tmp_path / file, None).clip.config.vision_config.hidden_act

    assert activation("model.safetensors") == "gelu"
    assert activation("vit_b_32-quickgelu-laion400m_e32.pt") == "quick_gelu"
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    assert activation("model.safetensors") == "quick_gelu"


def test_positions_are_resampled_when_they_must_be(tmp_path: Path) -> None:
    clip_tokenizer(tmp_path)
    state = small_clip()
    model = Clip.from_official(state, tmp_path / "a.pt", 320)
    weight = model.clip.vision_model.embeddings.position_embedding.weight
    assert weight.shape == (1 + 20 * 20, 64)
    assert torch.equal(weight[0], state["visual.positional_embedding"][0])
    assert torch.equal(resampled(state["visual.positional_embedding"], 14), state["visual.positional_embedding"])


def test_whatever_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    clip_tokenizer(tmp_path)
    state = small_clip()
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


def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")
    with pytest.raises(InputError, match="TorchScript archives and pickled objects are not opened"):
        load(str(tmp_path / "a.pt"))


def test_a_folder_is_of_its_own_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "flava"}))
    with pytest.raises(InputError, match="is a flava; accepted are clip, siglip, blip, albef"):
        load(str(tmp_path))
    with pytest.raises(InputError, match=r"nowhere' cannot be loaded.*"):
        load(str(tmp_path / "nowhere"))


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    clip_tokenizer(tmp_path)
    model = Clip.from_official(small_clip(), tmp_path / "a.pt", None)
    model.save(tmp_path / "model")
    assert type(load(str(tmp_path / "model"))) is Clip
    weights = read_state(tmp_path / "model" / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing are visual_projection\.weight"):
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
