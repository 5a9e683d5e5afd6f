"""How pixels are normalised before a model's first layer: its family's way, or what lies beside its weights says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from trainables.errors import InputError

Statistics = tuple[list[float], list[float]]
"""Mean and standard deviation of pixels in [0, 1], three each."""

PROCESSOR = "preprocessor_config.json"


def said_statistics(name: str, open_clip_config: Path | None) -> Statistics | None:
    """What a model's pixels were normalised by in its training, if anything says so.

    Args:
        name: a folder or a hub id.
        open_clip_config: that of a file of open_clip, which is read instead.

    Raises:
        InputError: they are prepared in a way that is not done here.
    """
    if open_clip_config is not None:
        said = _read(open_clip_config).get("preprocess_cfg", {}) if open_clip_config.is_file() else {}
        return _statistics(said.get("mean"), said.get("std"), open_clip_config)
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
    return _statistics(said.get("image_mean"), said.get("image_std"), Path(name) / PROCESSOR)


def write_statistics(folder: Path, statistics: Statistics) -> None:
    """Write them as `transformers` has them, for `said_statistics`."""
    mean, std = statistics
    said = {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "image_mean": mean, "image_std": std}
    (folder / PROCESSOR).write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", **said}), encoding="utf-8"
    )


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _statistics(mean: Any, std: Any, file: Path) -> Statistics | None:
    if mean is None or std is None:
        return None
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3 and min(std) > 0):
        raise InputError(f"{file}: mean {mean} and standard deviation {std} are not three numbers each")
    return list(map(float, mean)), list(map(float, std))
