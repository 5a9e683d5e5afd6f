"""Names and shapes of the published files, at the published sizes, and plain models that read them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

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
    left_out = ("_m.", "queue", "position_ids", ".cls.", "input_resolution", "context_length", "vocab_size")
    state = {}
    for name, shape in shapes.items():
        if name == "temp":
            state[name] = torch.tensor(0.05)
        elif any(part in name for part in left_out):
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


def with_clip_vocabulary(folder: Path, size: int = 49408) -> None:
    """Letters without merges, and CLIP's two special tokens at the end."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words = letters + [f"filler{index}" for index in range(size - 2 - len(letters))]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def small(shapes: Shapes) -> dict[str, Tensor]:
    """The same entries with 64 channels."""
    sides = {768: 64, 512: 64, 2304: 192, 1536: 192, 3072: 256, 2048: 256, 49408: 300}
    return random_state({name: tuple(sides.get(side, side) for side in shape) for name, shape in shapes.items()})


def small_clip(folder: Path, *, openai: bool = False) -> dict[str, Tensor]:
    """One layer a tower, and its tokenizer in a folder."""
    with_clip_vocabulary(folder, 300)
    shapes = clip_shapes(openai)
    return small({name: shape for name, shape in shapes.items() if ".resblocks." not in name or ".0." in name})


def said_by_open_clip(folder: Path, **config: object) -> None:
    """An `open_clip_config.json` with some fields of its model's."""
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))


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
    depth = sum(name.startswith(f"{tower}.resblocks.") and name.endswith("ln_1.weight") for name in state)
    for block in (f"{tower}.resblocks.{index}" for index in range(depth)):

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


def reference_clip_image(state: dict[str, Tensor], pixels: Tensor, quick: bool) -> Tensor:
    """CLIP's image features: patches, a tower that is read at its first token, a projection."""
    width, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    x = F.conv2d((pixels - mean) / std, state["visual.conv1.weight"], stride=patch).flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + state["visual.positional_embedding"]
    x = F.layer_norm(x, (width,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = reference_clip(state, "visual.transformer", x, causal=False, quick=quick)[:, 0]
    x = F.layer_norm(x, (width,), state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    return x @ state["visual.proj"]
