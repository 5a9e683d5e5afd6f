"""Where a trial's files lie: said so that a process that stands in another folder finds them, and looked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainables.config import SEARCHED_ATTACKS, AttackConfig, ModelConfig, Protocol, TrialConfig
from trainables.errors import InputError

if TYPE_CHECKING:
    from trainables.data import Dataset

MODELS = ("base", "image_tower", "text_tower", "masked_lm")
"""Fields that name one."""


def absolute(config: TrialConfig) -> TrialConfig:
    """The trial with absolute paths, seen from here: Ray's workers stand in folders of their own.

    A model's name is a path if there is something of that name, and a hub id otherwise.
    """
    model = config.model
    local = {
        name: str(Path(value).resolve())
        for name in MODELS
        if (value := getattr(model, name)) is not None and Path(value).exists()
    }
    pretrain = model.pretrain.model_copy(update={"root": _resolved(model.pretrain.root)})
    data: dict[str, Any] = {name: _resolved(getattr(config.data, name)) for name in ("root", "generated_captions")}
    data["linked_folders"] = tuple(folder.resolve() for folder in config.data.linked_folders)
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "model": model.model_copy(update={**local, "pretrain": pretrain}),
            "protocol": config.protocol.model_copy(update={"attacks": tuple(map(_found, config.protocol.attacks))}),
            "cache_dir": config.cache_dir.resolve(),
            "storage_path": _resolved_url(config.storage_path),
            "shared_cache": config.shared_cache and _resolved_url(config.shared_cache),
        }
    )


WEIGHTS = (".pth", ".pt", ".safetensors", ".bin")
"""Endings of a file with a model."""


def open_named(config: TrialConfig) -> Dataset:
    """The data of a trial; before it is decoded, everything else that the trial names is looked for.

    Raises:
        InputError: with all that is not there or cannot be used: models, attacks, data.
    """
    from trainables.data import DataError, load_dataset
    from trainables.data.depot import sharing

    problems = [*_missing_models(config.model), *_wrong_attacks(config.protocol)]
    try:
        with sharing(config.shared_cache):
            dataset = load_dataset(config.data, config.cache_dir)
    except DataError as error:
        problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return dataset


def family_in(model: ModelConfig) -> str:
    """The family of a model, which its base says where the configuration does not.

    Raises:
        InputError: the base cannot be read.
    """
    if model.known_family is not None or model.base is None:
        return model.known_family or "clip"
    from trainables.models.loading import family_of  # needs PyTorch

    return family_of(model.base)


def _missing_models(model: ModelConfig) -> list[str]:
    """Names that are written as paths, with nothing there. Others may be hub ids."""
    pairs = model.pretrain.root
    lost = [f"model.pretrain.root: {pairs} is no folder"] if pairs is not None and not pairs.is_dir() else []
    return lost + [
        f"model.{name}: there is no {value}; give a hub id, a folder, or a file of weights"
        for name in MODELS
        if (value := getattr(model, name)) is not None and is_path(value) and not Path(value).exists()
    ]


def is_path(name: str) -> bool:
    """Whether a model's name is written as a path; others may be hub ids."""
    return name.startswith((".", "/")) or name.count("/") > 1 or name.endswith(WEIGHTS)


def _wrong_attacks(protocol: Protocol) -> list[str]:
    """Attacks that cannot be built. Those that a study measures by itself can."""
    problems = []
    for attack in protocol.attacks:
        if attack in SEARCHED_ATTACKS:
            continue
        from trainables.attacks.registry import build_attack  # needs PyTorch, which takes seconds to load

        try:
            build_attack(attack, protocol)
        except InputError as error:
            problems.append(str(error))
    return problems


def _found(attack: AttackConfig) -> AttackConfig:
    if attack.file is None:
        return attack
    return attack.model_copy(update={"attack": f"{attack.file.resolve()}:{attack.attack.rpartition(':')[2]}"})


def _resolved_url(place: str) -> str:
    return place if "://" in place else str(Path(place).resolve())


def _resolved(path: Path | None) -> Path | None:
    return None if path is None else path.resolve()
