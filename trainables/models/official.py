"""Checkpoints as the papers' own code writes them: read without pickles, renamed, and every entry accounted for."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from trainables.command import InputError

State = dict[str, Tensor]

SHOWN = 5
"""Names told of each kind of mistake."""


def read_state(path: Path) -> State:
    """The tensors of a checkpoint by their names, on the CPU, without what training wrapped around them.

    Raises:
        InputError: not readable without running code from the file, or no tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            # Mapped, what is dropped is never read: more than half of a published file are momentum copies and queues.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason, _, _ = str(error).partition("\n")
        raise InputError(
            f"{path} cannot be read as plain tensors: {reason or type(error).__name__}\n"
            "  save its state_dict() as .safetensors; TorchScript archives and pickled objects are not opened"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise InputError(f"{path} holds no state dict: tensors by name, alone or under 'model' or 'state_dict'")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


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
    }
    told = [
        f"  {kind}: {', '.join(names[:SHOWN])}" + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for kind, names in mistakes.items()
        if names
    ]
    if told:
        raise InputError("\n".join([f"{path} does not fit {type(network).__name__}:", *told]))
    network.load_state_dict(entries)


def from_directory(network: Any, name: str) -> Any:
    """`network.from_pretrained`, but nothing may stay as it was initialised.

    Raises:
        InputError: naming what is missing.
        OSError: nothing there.
    """
    found, info = network.from_pretrained(name, use_safetensors=True, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{name} does not fit {network.__name__}: missing are {', '.join(missing[:SHOWN])} ...")
    return found


def layers(state: State, prefix: str) -> int:
    """How many there are: one more than the highest number behind the prefix."""
    numbers = (re.match(re.escape(prefix) + r"\.(\d+)\.", name) for name in state)
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)


def resampled(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings (1 + own grid squared, width) for another grid of patches; the first token's stays."""
    own = round((len(positions) - 1) ** 0.5)
    if own == grid:
        return positions
    square = positions[1:].float().view(1, own, own, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1].float(), square.flatten(2)[0].T])


def tokenizer_beside(path: Path, kind: Any, hub_id: str) -> Any:
    """The tokenizer that lies in the checkpoint's folder, otherwise that of the hub.

    Raises:
        InputError: neither can be loaded.
    """
    beside = any((path.parent / name).exists() for name in ("tokenizer.json", *kind.vocab_files_names.values()))
    try:
        return kind.from_pretrained(path.parent if beside else hub_id)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: put the tokenizer's files beside it, those of {hub_id}") from error
