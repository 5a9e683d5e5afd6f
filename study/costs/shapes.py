"""From a study's configuration to the shapes its cost is counted from; loads no weights and no images."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from study.config import StudyConfig
from study.costs.cost_model import Counted, Fusion, Shape, Tower
from trainables.config import DataConfig, ModelConfig, TinyConfig
from trainables.errors import InputError
from trainables.hub import PINNED

COCO_CAPTION_WORDS = 10.5
"""Mean length of a COCO caption; used where no data is there yet."""
TOKENS_A_WORD = 1.3
SPECIAL_TOKENS = 2

CLIP_VOCABULARY = 49408
KNOWN_CLIPS: dict[str, dict[str, Any]] = {
    f"openai/clip-vit-{name}": {
        "vision_config": {"hidden_size": width, "num_hidden_layers": layers, "patch_size": patch},
        "text_config": {"hidden_size": text_width, "num_hidden_layers": 12, "vocab_size": CLIP_VOCABULARY},
    }
    for name, width, layers, patch, text_width in (
        ("base-patch32", 768, 12, 32, 512),
        ("base-patch16", 768, 12, 16, 512),
        ("large-patch14", 1024, 24, 14, 768),
    )
}
"""Shapes of the models that presets name, so that a plan needs no download (Radford et al. 2021, table 20)."""

HEAD_WIDTH = 64
"""Channels of an attention head in every model that presets name."""

BERT_VOCABULARY = 30524
"""With the two tokens that BLIP adds."""
VIT_AND_BERT: dict[str, Any] = {
    "vision_config": {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 16},
    "text_config": {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": BERT_VOCABULARY},
}
"""ViT-B/16 and BERT-base: the published files of ALBEF (Li et al. 2021, 3.1) and BLIP (Li et al. 2022, 4.1)."""
KNOWN: dict[str, dict[str, Any]] = {
    **KNOWN_CLIPS,
    "Salesforce/blip-itm-base-coco": {"model_type": "blip", **VIT_AND_BERT},
}


def shape_of(config: StudyConfig) -> Shape:
    """Towers and amounts of data of a study's trials.

    Raises:
        InputError: the model's configuration cannot be found.
    """
    words, train, gallery, captions = _amounts(config.data)
    drawn = min(train, config.trial.training.epoch_images or train)
    model = config.trial.model
    tokens = min(model.max_tokens, round(words * TOKENS_A_WORD) + SPECIAL_TOKENS)
    image, text, fusion = _parts(model, config.data.image_pixels, tokens)
    return Shape(image, text, words, drawn, min(gallery, config.protocol.gallery_images), captions, fusion)


def architecture_of(model: ModelConfig) -> tuple[str, TinyConfig, TinyConfig]:
    """Family, image tower and text tower, with the space that both share, to make a model of that size.

    Raises:
        InputError: the configuration cannot be found, or is not one of two transformers.
    """
    if model.base is None and model.image_tower is None:
        return model.family or "clip", model.tiny, model.tiny
    if model.base is None:
        raise InputError("trial.model.image_tower: only models of one configuration are made of random numbers")
    configuration = _base_configuration(model)
    family = model.family or configuration.get("model_type", "clip")
    space = configuration.get("projection_dim" if family == "clip" else "image_text_hidden_size")
    parts = []
    for name in ("vision_config", "text_config"):
        tower = configuration.get(name, {})
        width = tower.get("hidden_size", 768 if name == "vision_config" else 512)
        parts.append(
            TinyConfig(
                width=width,
                layers=tower.get("num_hidden_layers", 12),
                heads=tower.get("num_attention_heads", width // HEAD_WIDTH),
                patch_pixels=tower.get("patch_size", 16),
                embedding=space or (512 if family == "clip" else 256),
            )
        )
    return family, parts[0], parts[1]


def _amounts(data: DataConfig) -> tuple[float, int, int, float]:
    """Words of a caption, training images, evaluation images, captions of an image."""
    if data.root is None:
        train, gallery = data.shapes.train_images, data.shapes.val_images
        if data.max_train_images is not None:  # a preset for data that is not here
            train, gallery = data.max_train_images, sys.maxsize
        return COCO_CAPTION_WORDS, train, gallery, 5.0
    from trainables.data import read_pairs

    train_pictures, test_pictures, _ = read_pairs(data, data.root)
    texts = [text for picture in train_pictures[:1000] for _, text in picture.captions]
    words = sum(len(text.split()) for text in texts) / len(texts)
    captions = sum(len(picture.captions) for picture in test_pictures) / len(test_pictures)
    return words, min(len(train_pictures), data.max_train_images or sys.maxsize), len(test_pictures), captions


def _parts(model: ModelConfig, pixels: int, tokens: int) -> tuple[Tower | Counted, Tower, Fusion | None]:
    if model.image_tower is not None:
        text = Tower(tokens, 256, 0, 0, vocabulary=CLIP_VOCABULARY)  # a bag of words
        if model.text_tower is not None:
            text = _text_tower(_configuration(model.text_tower), tokens)
        return _image_tower(model.image_tower, _configuration(model.image_tower), pixels), text, None
    if model.base is not None:
        configuration = _base_configuration(model)
        vision, words = configuration.get("vision_config"), configuration.get("text_config")
        if vision is None or words is None:
            raise InputError(f"trial.model.base: {model.base} has no vision_config and text_config to count from")
        image, text = _image_tower(model.base, vision, pixels), _text_tower(words, tokens)
        return image, *_fused(model.family or configuration.get("model_type"), image, text)
    tiny = model.tiny
    patches = (pixels // tiny.patch_pixels) ** 2
    inner = 4 * tiny.width
    image = Tower(patches + 1, tiny.width, tiny.layers, inner, patch_values=3 * tiny.patch_pixels**2)
    layers = max(2, tiny.layers) if model.family == "albef" else tiny.layers
    return image, *_fused(model.family, image, Tower(tokens, tiny.width, layers, inner, vocabulary=1000))


def _fused(family: str | None, image: Tower | Counted, text: Tower) -> tuple[Tower, Fusion | None]:
    """What reads captions alone, and what reads pairs.

    The upper half of ALBEF's text layers fuses. BLIP reads a pair with all of its text layers once more.
    """
    if family not in ("albef", "blip") or not isinstance(image, Tower):
        return text, None
    own = family == "albef"
    lower = text.layers // 2 if own else 0
    fusion = Fusion(text.tokens, text.width, text.layers - lower, text.inner, image.tokens, image.width, own)
    return (replace(text, layers=lower) if own else text), fusion


def _base_configuration(model: ModelConfig) -> dict[str, Any]:
    assert model.base is not None
    published = model.family in ("albef", "blip") and model.base.endswith(".pth")
    return VIT_AND_BERT if published else _configuration(model.base)


def _configuration(name: str) -> dict[str, Any]:
    if (found := PINNED.fullmatch(name)) is not None:
        name = found[1]
    if name in KNOWN:
        return KNOWN[name]
    path = Path(name) / "config.json"
    if not path.is_file():
        raise InputError(
            f"trial.model: the shape of {name!r} is not known here; give a folder with config.json, or one of "
            f"{', '.join(KNOWN)}"
        )
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def _image_tower(name: str, configuration: dict[str, Any], pixels: int) -> Tower | Counted:
    width, layers, patch = (configuration.get(key) for key in ("hidden_size", "num_hidden_layers", "patch_size"))
    if width is None or layers is None or patch is None:
        return _counted(Path(name), pixels)
    inner = configuration.get("intermediate_size", 4 * width)
    return Tower((pixels // patch) ** 2 + 1, width, layers, inner, patch_values=3 * patch**2)


def _text_tower(configuration: dict[str, Any], tokens: int) -> Tower:
    width = configuration.get("hidden_size", 512)
    inner = configuration.get("intermediate_size", 4 * width)
    layers = configuration.get("num_hidden_layers", 12)
    return Tower(tokens, width, layers, inner, vocabulary=configuration.get("vocab_size", CLIP_VOCABULARY))


def _counted(folder: Path, pixels: int) -> Counted:
    """A tower that is no transformer, counted by PyTorch without any data."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        tower = AutoModel.from_config(AutoConfig.from_pretrained(folder)).eval()
        image = torch.zeros(1, 3, pixels, pixels)
    outputs: list[int] = []
    for module in tower.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, __, output: outputs.append(output.numel()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(image)
    parameters = sum(parameter.numel() for parameter in tower.parameters())
    return Counted(float(counter.get_total_flops()), float(parameters), 2.0 * sum(outputs))
