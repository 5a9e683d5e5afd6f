"""Where a trial's files lie, said so that a process that stands in another folder finds them."""

from __future__ import annotations

from pathlib import Path

from trainables.config import AttackConfig, TrialConfig


def absolute(config: TrialConfig) -> TrialConfig:
    """The trial with absolute paths, seen from here: Ray's workers stand in folders of their own.

    A model's name is a path if there is something of that name, and a hub id otherwise.
    """
    model = config.model
    local = {
        name: str(Path(value).resolve())
        for name in ("base", "image_tower", "text_tower", "masked_lm")
        if (value := getattr(model, name)) is not None and Path(value).exists()
    }
    pretrain = model.pretrain.model_copy(update={"root": _resolved(model.pretrain.root)})
    data = {name: _resolved(getattr(config.data, name)) for name in ("root", "generated_captions")}
    storage = config.storage_path
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "model": model.model_copy(update={**local, "pretrain": pretrain}),
            "protocol": config.protocol.model_copy(update={"attacks": tuple(map(_found, config.protocol.attacks))}),
            "cache_dir": config.cache_dir.resolve(),
            "storage_path": storage if "://" in storage else str(Path(storage).resolve()),
        }
    )


def _found(attack: AttackConfig) -> AttackConfig:
    if attack.file is None:
        return attack
    return attack.model_copy(update={"attack": f"{attack.file.resolve()}:{attack.attack.rpartition(':')[2]}"})


def _resolved(path: Path | None) -> Path | None:
    return None if path is None else path.resolve()
