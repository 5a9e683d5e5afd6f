"""Checkpoints as the papers' own code writes them: read without pickles, renamed, and every entry accounted for."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from trainables.errors import InputError, reason
from trainables.models.tokenizers import load_tokenizer

State = dict[str, Tensor]

SHOWN = 5
"""Names told of each kind of mistake."""


def read_state(path: Path) -> State:
    """The tensors of a checkpoint by their names, on the CPU, without what training wrapped around them.

    Raises:
        InputError: not readable without running code from the file, or no tensors by name.
    """
    if zipfile.is_zipfile(path) and _is_torchscript(path):
        raise InputError(
            f"{path} is a TorchScript archive, as OpenAI publishes them, and is not opened\n{_converted(path)}"
        )
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            # Mapped, what is dropped is never read: more than half of a published file are momentum copies and queues.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        held = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        what = f"it holds pickled objects ({held[1]})" if held else "it is no checkpoint of PyTorch"
        raise InputError(
            f"{path} cannot be read as plain tensors: {what}\n"
            "  where it was made, save its state_dict() alone, as .safetensors; pickled objects are not opened"
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as plain tensors: {reason(error)}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise InputError(f"{path} holds no state dict: tensors by name, alone or under 'model' or 'state_dict'")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _converted(path: Path) -> str:
    """How an archive's tensors are saved with all that tells them from others of the same names."""
    saved = str(path.with_suffix(".safetensors"))
    return (
        "  if you trust it, save its tensors once with all their names, also input_resolution, which tells that they\n"
        "  were trained with QuickGELU (a state dict of clip.load() has lost it), and give that file:\n"
        "    import torch; from safetensors.torch import save_file\n"
        f"    state = torch.jit.load({str(path)!r}, map_location='cpu').state_dict()\n"
        f"    save_file({{name: value.clone() for name, value in state.items()}}, {saved!r})"
    )


def renamed(state: State, rules: Sequence[tuple[str, str]], dropped: Iterable[str]) -> State:
    """Entries under new names.

    Args:
        state: official names.
        rules: regular expressions and what takes their place, one after the other on every name.
        dropped: regular expressions of whole names that are left out on purpose.
    """
    left_out = re.compile("|".join(dropped))
    entries = {}
    for name, tensor in state.items():
        if not left_out.fullmatch(name):
            for pattern, new in rules:
                name = re.sub(pattern, new, name)
            entries[name] = tensor
    return entries


def fill(network: nn.Module, entries: State, path: Path) -> None:
    """Put the entries in; all of them, and nothing stays as it was initialised.

    Raises:
        InputError: naming what is missing, unknown, or of another shape.
    """
    wanted = network.state_dict()
    both = wanted.keys() & entries.keys()
    mistakes = {
        "missing": sorted(wanted.keys() - entries.keys()),
        "unknown": sorted(entries.keys() - wanted.keys()),
        "of another shape": sorted(name for name in both if wanted[name].shape != entries[name].shape),
        "no floating-point numbers": sorted(
            name for name in both if wanted[name].is_floating_point() > entries[name].is_floating_point()
        ),
    }
    if any(mistakes.values()):
        raise InputError(f"{path} does not fit {type(network).__name__}:{_listed(mistakes)}")
    network.load_state_dict(entries)


def from_directory(network: Any, name: str, **options: Any) -> Any:
    """`network.from_pretrained` in float32, but nothing may stay as it was initialised, see also `check_weights`.

    Args:
        network: a class, or an automatic one; a pooler that the checkpoint lacks is left out.
        name: hub id or directory.
        options: further ones of `from_pretrained`.

    Raises:
        InputError: naming what is missing, of another shape, or cannot be computed with.
        OSError: nothing there.
    """
    found, info = network.from_pretrained(
        name,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told below instead
        trust_remote_code=False,
        dtype=torch.float32,
        **options,
    )
    without_pooler(found, info["missing_keys"])
    mistakes = {
        "missing": sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")),
        "of another shape": sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]),
    }
    if any(mistakes.values()):
        raise InputError(f"{name} does not fit {type(found).__name__}:{_listed(mistakes)}")
    check_weights(found, name)
    return found


def without_pooler(network: Any, missing: Iterable[str]) -> None:
    """Leave out a tower's pooler if its weights are missing: it would compute with random ones."""
    if any(key.startswith("pooler.") for key in missing):
        network.pooler = None


def _listed(mistakes: dict[str, list[str]]) -> str:
    return "".join(
        f"\n  {kind}: {', '.join(names[:SHOWN])}" + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for kind, names in mistakes.items()
        if names
    )


def check_weights(network: nn.Module, name: str | Path, own: State | None = None) -> None:
    """Refuse what nothing can be computed with.

    Args:
        network: with its weights.
        name: that the user gave.
        own: the weights under the names that they have in the user's file, if others.

    Raises:
        InputError: naming tensors with NaN or infinity, and layers that are nothing but zeros.
    """
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    weighted = {f"{key}.weight" for key, module in network.named_modules() if isinstance(module, layers)}
    mistakes = _unusable(network.state_dict(), weighted)
    if any(mistakes.values()):
        told = _unusable(own or {}, {key for key, tensor in (own or {}).items() if tensor.ndim > 1})
        named = {kind: names and (told[kind] or names) for kind, names in mistakes.items()}
        raise InputError(f"the weights of {name} cannot be used:{_listed(named)}")


def _unusable(state: State, weighted: Collection[str]) -> dict[str, list[str]]:
    numbers = {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}
    return {
        "NaN or infinity in": [key for key, tensor in numbers.items() if not tensor.isfinite().all()],
        "nothing but zeros in": [key for key, tensor in numbers.items() if key in weighted and not tensor.any()],
    }


def layers(state: State, prefix: str) -> int:
    """How many there are: one more than the highest number behind the prefix."""
    numbers = (re.match(re.escape(prefix) + r"\.(\d+)\.", name) for name in state)
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)


def resampled(positions: Tensor, grid: int, *, antialias: bool) -> Tensor:
    """Position embeddings (1 + own grid squared, width) for another grid of patches; the first token's stays.

    Args:
        positions: learned.
        grid: patches of a side.
        antialias: as open_clip and timm do it; ALBEF, BLIP and `transformers` do not.
    """
    own = round((len(positions) - 1) ** 0.5)
    if own == grid:
        return positions
    square = positions[1:].float().view(1, own, own, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([positions[:1].float(), square.flatten(2)[0].T])


def tokenizer_beside(path: Path, kind: Any, hub_id: str, rows: int) -> Any:
    """The tokenizer that lies in the checkpoint's folder, otherwise that of the hub.

    Raises:
        InputError: neither can be loaded, or does not fit so many rows of embeddings.
    """
    beside = any((path.parent / name).exists() for name in ("tokenizer.json", *kind.vocab_files_names.values()))
    try:
        return load_tokenizer(path.parent if beside else hub_id, rows, kind=kind)
    except InputError as error:
        raise InputError(f"{path}: {error}\n  put the tokenizer's files beside it, those of {hub_id}") from error
