"""What things were made from, so that what is found again by its name is known to be the same thing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainables.config import BATCH_IMAGES, AttackConfig, Protocol, TrialConfig, content_hash

NO_MATTER = {
    "protocol": {"batch_images"},
    "training": {"log_every_steps", "gradient_checkpointing", "micro_batch", "compile"},
}
"""Fields that decide how fast a trial is and what it tells, but no result; as for the number of workers, up to the
arithmetic and the draws of dropout."""

READING = ("caption_text", "max_tokens")
"""Fields of the model that are not in its files."""


VERSION = 2
"""Of how a trial is trained: raise it when the same trial would be trained on other pairs or in other steps."""


def made_from(config: TrialConfig, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What decides a trial's result, and whose it is. Its name, its workers, and where its files lie do not.

    Args:
        config: of the trial.
        hashes: of what its data and models hold, see `prepare.Workshop.hashes`; they stand for the fields that name
            them.
    """
    fields = config.model_dump(mode="json", include={"point", "training", "protocol", "seed"}, exclude=NO_MATTER)
    fields["protocol"]["attacks"] = [_content(attack) for attack in config.protocol.attacks]
    fields["model"] = {name: getattr(config.model, name) for name in READING}
    fields |= {"owner": config.owner, "version": VERSION}
    return {**fields, **{f"{name} (content)": hashes[name] for name in hashes}}


def protocol_hash(protocol: Protocol) -> str:
    """Of an evaluation; attacks of somebody's own by what their files hold, wherever they lie."""
    fields = protocol.model_dump(mode="json")
    attacks, batch = [_content(attack) for attack in protocol.attacks], protocol.batch_images or BATCH_IMAGES
    return content_hash({**fields, "attacks": attacks, "batch_images": batch})


def _content(attack: AttackConfig) -> dict[str, Any]:
    """A file with an attack by what it holds."""
    fields = attack.model_dump(mode="json")
    if attack.file is not None and attack.file.is_file():
        fields["attack"] = f"{file_digest(attack.file)}:{attack.attack.rpartition(':')[2]}"
    return fields


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Lines `field: before -> after` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted({*before, *after})
        return [
            line for key in keys for line in differences(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if before == after else [f"{path}: {before} -> {after}"]


def file_digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def files_digest(paths: Iterable[Path], root: Path) -> str:
    """First 16 hex digits of the SHA-256 of files, their names below `root` included."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(root)}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()[:16]


def model_files_digest(name: str) -> str:
    """What a named model holds: weights, configuration and tokenizer. A hub id, which is no path, stands for itself.

    Args:
        name: of a folder; of a file, which is read with the configuration and the tokenizer beside it; or a hub id.
    """
    path = Path(name)
    if path.is_dir():
        return files_digest((file for file in path.rglob("*") if file.is_file()), path)
    if path.is_file():
        beside = (file for file in path.parent.iterdir() if file.suffix in (".json", ".txt") and file.is_file())
        return files_digest({path, *beside}, path.parent)
    return name
