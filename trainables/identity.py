"""What things were made from, so that what is found again by its name is known to be the same thing."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainables.config import BATCH_IMAGES, AttackConfig, Protocol, TrialConfig, content_hash

NO_MATTER = {
    "protocol": {"batch_images"},
    "training": {"log_every_steps", "gradient_checkpointing", "micro_batch", "compile", "checkpoint_minutes"},
}
"""Fields that decide how fast a trial is and what it tells, but no result; as for the number of workers, up to the
arithmetic and the draws of dropout."""

READING = ("caption_text", "max_tokens")
"""Fields of the model that are not in its files."""


SETTLED_NS = 2_000_000_000
"""A file that was changed just now may change again without another time."""

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
    fields["protocol"]["attacks"] = [attack_content(attack) for attack in config.protocol.attacks]
    fields["model"] = {name: getattr(config.model, name) for name in READING}
    fields |= {"owner": config.owner, "version": VERSION}
    return {**fields, **{f"{name} (content)": hashes[name] for name in hashes}}


def protocol_hash(protocol: Protocol) -> str:
    """Of an evaluation; attacks of somebody's own by what their files hold, wherever they lie."""
    fields = protocol.model_dump(mode="json")
    attacks, batch = [attack_content(attack) for attack in protocol.attacks], protocol.batch_images or BATCH_IMAGES
    return content_hash({**fields, "attacks": attacks, "batch_images": batch})


def attack_content(attack: AttackConfig) -> dict[str, Any]:
    """A file with an attack by what it holds."""
    fields = attack.model_dump(mode="json")
    if attack.file is not None and attack.file.is_file():
        fields["attack"] = f"{source_digest(attack.file)}:{attack.attack.rpartition(':')[2]}"
    return fields


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Lines `field: before -> after` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted({*before, *after})
        return [
            line for key in keys for line in differences(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if before == after else [f"{path}: {before} -> {after}"]


def remembered(path: Path, memory: Path | None, digest: Callable[[Path], str]) -> str:
    """`digest(path)`, computed once as long as the file is the same by its size, times and place on the disk.

    Args:
        path: of the file.
        memory: folder where it is kept; None: nowhere.
        digest: of a file.
    """
    if memory is None:
        return digest(path)
    before = path.stat()
    stamp = [before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino, before.st_dev]
    entry = memory / "digests" / content_hash({"path": str(path.resolve()), "digest": digest.__name__})
    with suppress(OSError, ValueError):
        known, found = json.loads(entry.read_text(encoding="utf-8"))
        if known == stamp:
            return str(found)
    found = digest(path)
    if time.time_ns() - before.st_ctime_ns > SETTLED_NS and path.stat().st_ctime_ns == before.st_ctime_ns:
        entry.parent.mkdir(parents=True, exist_ok=True)
        part = entry.with_name(f"{entry.name}.{os.getpid()}.part")
        part.write_text(json.dumps([stamp, found]), encoding="utf-8")
        part.replace(entry)
    return found


def source_digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of what Python code does: without comments, layout and descriptions."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "description"]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [part for part in node.body if not _is_text(part)] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def _is_text(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def file_digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def files_digest(paths: Iterable[Path], root: Path, memory: Path | None = None) -> str:
    """First 16 hex digits of the SHA-256 of files, their names below `root` included; `memory` as of `remembered`."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(root)}\0{remembered(path, memory, file_digest)}\n".encode())
    return digest.hexdigest()[:16]


def model_files_digest(name: str, memory: Path | None = None) -> str:
    """What a named model holds: weights, configuration and tokenizer. A hub id, which is no path, stands for itself.

    Args:
        name: of a folder; of a file, which is read with the configuration and the tokenizer beside it; or a hub id.
        memory: see `remembered`.
    """
    path = Path(name)
    if path.is_dir():
        return files_digest((file for file in path.rglob("*") if file.is_file()), path, memory)
    if path.is_file():
        beside = (file for file in path.parent.iterdir() if file.suffix in (".json", ".txt") and file.is_file())
        return files_digest({path, *beside}, path.parent, memory)
    return name
