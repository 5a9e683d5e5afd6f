"""How a model's images are prepared: its family's way, or what lies beside its weights says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils import cached_file

from trainables.errors import InputError
from trainables.models import Resize, RetrievalModel

Statistics = tuple[list[float], list[float]]
"""Mean and standard deviation of pixels in [0, 1], three each."""

PROCESSOR = "preprocessor_config.json"

RESIZE_MODES: dict[str, Resize] = {"shortest": "crop", "squash": "stretch"}
"""By open_clip's names; its third, `longest`, adds borders."""


@dataclass(frozen=True)
class Preparation:
    """How images were prepared in a model's training, as far as a file says so.

    Attributes:
        statistics: that pixels were normalised by.
        resize: see `data.cache.resized`; None also where it is neither.
        other: what the file says of resizing that is done in another way here.
    """

    statistics: Statistics | None = None
    resize: Resize | None = None
    other: tuple[str, ...] = ()


def prepare_as_said(model: RetrievalModel, name: str, open_clip_config: Path | None) -> None:
    """Have the model prepare images as in its training; what is its family's custom or differs joins its guesses.

    Args:
        model: with buffers `mean` and `std`, (3, 1, 1).
        name: a folder or a hub id.
        open_clip_config: that of a file of open_clip, which is read instead.

    Raises:
        InputError: pixels are prepared in a way that is not done here.
    """
    said = _transformers(name) if open_clip_config is None else _open_clip(open_clip_config)
    if said.statistics is None:
        model.guesses += (f"no file beside it says how pixels are normalised: as {model.family}'s usually are",)
    else:
        buffers: tuple[Any, Any] = model.mean, model.std
        for buffer, values in zip(buffers, said.statistics, strict=True):
            buffer.copy_(torch.tensor(values).view_as(buffer))
    model.resize = said.resize or model.resize
    if said.other:
        model.guesses += (f"its images were resized in another way than here: {', '.join(said.other)}",)


def write_preparation(folder: Path, model: RetrievalModel) -> None:
    """Write it as `transformers` has it, for `prepare_as_said`."""
    buffers: tuple[Any, Any] = model.mean, model.std
    mean, std = (buffer.flatten().tolist() for buffer in buffers)
    side = model.image_pixels
    square = {"height": side, "width": side}
    said = {
        "image_processor_type": "CLIPImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "image_mean": mean,
        "image_std": std,
        "do_resize": True,
        "resample": int(Image.Resampling.BICUBIC),
        "size": {"shortest_edge": side} if model.resize == "crop" else square,
        "do_center_crop": model.resize == "crop",
        "crop_size": square,
    }
    (folder / PROCESSOR).write_text(json.dumps(said), encoding="utf-8")


def _open_clip(config: Path) -> Preparation:
    said = _read(config).get("preprocess_cfg", {}) if config.is_file() else {}
    mode, interpolation = said.get("resize_mode"), said.get("interpolation", "bicubic")
    other = {
        f"resize_mode {mode}": mode not in (None, *RESIZE_MODES),
        f"interpolation {interpolation}": interpolation != "bicubic",
    }
    return Preparation(
        _statistics(said.get("mean"), said.get("std"), config),
        RESIZE_MODES.get(str(mode)),
        tuple(field for field, differs in other.items() if differs),
    )


def _transformers(name: str) -> Preparation:
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(name, PROCESSOR, **lenient)
    said = {} if found is None else _read(Path(found))
    odd = {
        "do_flip_channel_order": said.get("do_flip_channel_order", False),
        "do_normalize": not said.get("do_normalize", True),
        "rescale_factor": abs(said.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3,
    }
    if any(odd.values()):
        fields = ", ".join(field for field, other in odd.items() if other)
        raise InputError(f"{found}: pixels are to be prepared in a way that is not done here: {fields}")
    statistics = _statistics(said.get("image_mean"), said.get("image_std"), Path(name) / PROCESSOR)
    resize, other = _resize(said)
    resample = said.get("resample")
    if resample not in (None, Image.Resampling.BICUBIC):
        other += (f"resample {resample} ({Image.Resampling(resample).name.lower()})",)
    return Preparation(statistics, resize, other)


def _resize(said: dict[str, Any]) -> tuple[Resize | None, tuple[str, ...]]:
    """How an image processor resizes, or what it says where that is neither crop nor stretch.

    A size that is one number is the short side where a crop follows, and no word otherwise: processors differ.
    """
    if said.get("do_resize") is False:
        return None, ("do_resize false",)
    size, cut, cropped = said.get("size"), said.get("crop_size"), said.get("do_center_crop")
    if isinstance(size, int):
        size = {"shortest_edge": size} if cropped else None
    if not isinstance(size, dict):
        return None, ()
    sides = {side for side, pixels in size.items() if pixels is not None}
    lengths = {size[side] for side in sides}
    kept = not cropped or cut is None or lengths == (set(cut.values()) if isinstance(cut, dict) else {cut})
    if len(lengths) == 1 and kept:
        if sides == {"height", "width"}:
            return "stretch", ()
        if sides == {"shortest_edge"} and cropped is not False:
            return "crop", ()
    return None, (f"size {size}, do_center_crop {cropped}, crop_size {cut}",)


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _statistics(mean: Any, std: Any, file: Path) -> Statistics | None:
    if mean is None or std is None:
        return None
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3 and min(std) > 0):
        raise InputError(f"{file}: mean {mean} and standard deviation {std} are not three numbers each")
    return list(map(float, mean)), list(map(float, std))
