"""What a study leaves on disk: the schema of the files that others read, and how they are written.

Every write is atomic (temporary file, fsync, rename; objects are put whole), so a stop at any instruction leaves either
the old file or the new one.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from study.paths import StudyPaths
from trainables.cli.command import read_yaml
from trainables.config import TEST, Model, SplitName
from trainables.errors import InputError
from trainables.files import Location, UrlPath, below
from trainables.results import Attempt, Metric

Ended = Literal["complete", "stopped", "infeasible", "failed"]
"""How a trial ended. `stopped`: early, as others were better at a rung; it has no final measurements. `infeasible`: the
point itself cannot be used (diverged, out of memory, beyond a constraint). The sampler learns from both. `failed`: the
infrastructure or the code broke, from which it does not."""

State = Literal["waiting", "running"] | Ended
"""Of a trial."""

INFEASIBLE = "infeasible"
"""In Optuna: the constraint that an infeasible trial violates, and its user attribute with the reason."""


class Frozen(Model):
    """`study.yaml`: what a study was begun with."""

    config: dict[str, Any]
    """Fields of `StudyConfig`."""
    id: str | None = None
    """Of the study, made once: what tells it from others of its name. None in files of earlier versions."""
    preset: str | None = None
    """They came over; None where no record says."""
    hash: str
    fingerprint: dict[str, Any]
    accepted: list[Any] = []
    """Changes of the fingerprint since."""


def read_frozen(paths: StudyPaths) -> Frozen:
    """What the study was begun with.

    Raises:
        InputError: it is not there, or is cut short, or of another program or version, or the folder has another name
            than its study.
    """
    try:
        frozen = Frozen.model_validate(read_yaml(paths.config))
    except ValidationError as error:
        wrong = ", ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise InputError(
            f"{paths.config}: is not what a study was begun with: it is cut short, or of another program or version "
            f"({wrong}). Put it back, or use another --name"
        ) from None
    if (name := frozen.config.get("name")) != paths.root.name:
        raise InputError(
            f"{paths.root}: is the folder of study {name!r}, whose name it has to have. Give it that name again (a "
            "copy needs another --studies-dir), or use another --name"
        )
    return frozen


@dataclass(frozen=True)
class TrialRecord:
    """A trial as the ledger knows it.

    Attributes:
        number: in the database.
        key: stable name; a replicate has that of the trial it repeats, but for its end `-s1`, `-s2`, ...
        state: of the trial.
        params: searched knobs.
        recipe: the published defence, or None.
        replicate: 0 for the first run of a point, then 1, 2, ... for runs with fresh seeds.
        reruns: how often the trial was begun again after it had ended.
    """

    number: int
    key: str
    state: State
    params: dict[str, Any]
    recipe: str | None
    replicate: int = 0
    reruns: int = 0

    @property
    def searched(self) -> bool:
        """Whether the budget counts it."""
        return self.recipe is None and self.replicate == 0


class Event(Model):
    """One line of a trial's log.

    `start` and `resume` carry the optimiser step training begins at; `rung` an epoch's small evaluation and the
    training history since the last one, and what the trial is made from as `hashes`; `final` the whole evaluation,
    on other images and under a stronger attack than those of rungs, with the rest of the history; `attempt` one
    try, when it holds its devices and again when it has ended; `end` the state; `retry` that a failed trial was
    asked to go on.
    """

    time: float
    event: Literal["start", "resume", "rung", "final", "attempt", "end", "retry"]
    step: int = 0
    metrics: dict[str, float] = {}
    history: list[dict[str, float]] = []
    hashes: dict[str, str] = {}
    attempt: Attempt | None = None
    message: str = ""


class Begun(Model):
    """A session of a driver, one line of `sessions.jsonl`.

    The database has the last one. So a folder that does not know it is a copy from before, or the database is.
    """

    id: str
    host: str
    folder: str
    time: float


class Asked(Model):
    """What the database knows of a trial before it ends, so that the database can be made again: see `study.rebuild`.

    `attributes` and `system` are what Optuna keeps of the trial, without what came of it.
    """

    study: str | None
    key: str
    number: int
    state: Literal["waiting", "running"]
    params: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    system: dict[str, Any] = {}
    begun: datetime | None = None


class Manifest(Model):
    """An ended trial. Written once, never changed.

    `study` is the id of the study; None in files of earlier versions.
    `metrics` are those of the full evaluation, on the images of `split`. `rungs` are what the small ones measured, by
    optimiser step, with the device-seconds held until then; they are never compared with `metrics`. `attempts` are all
    tries, in order.
    """

    study: str | None = None
    key: str
    number: int
    recipe: str | None
    replicate: int = 0
    params: dict[str, Any]
    point: dict[str, Any]
    state: Ended
    reason: str | None = None
    trace: str | None = None
    metrics: dict[str, Metric] = {}
    split: SplitName = TEST
    rungs: dict[int, dict[str, float]] = {}
    cost: dict[str, Any] = {}
    attempts: list[Attempt] = []
    seeds: dict[str, int] = {}
    versions: dict[str, str] = {}
    hashes: dict[str, str] = {}
    fingerprint: str
    untouched: str | None = None
    correct: dict[str, str] = {}
    queries: dict[str, int] = {}
    captions_per_image: list[int] = []
    ended: float


Account = TypeVar("Account", bound=Model)


def write_atomically(path: Location, text: str) -> None:
    """Replace `path` by `text`, or leave it as it was."""
    if isinstance(path, UrlPath):
        path.write_text(text, encoding="utf-8")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_if_changed(path: Location, text: str) -> None:
    """Replace `path` by `text` atomically, and leave its time alone where nothing changed."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)


def write_manifest(path: Location, manifest: Manifest) -> Manifest:
    """Write it unless one is there, and return the one that counts."""
    existing = read_manifest(path)
    if existing is not None:
        return existing
    return manifest if _write_once(path, manifest.model_dump_json(indent=1)) else read_account(path, Manifest)


def _write_once(path: Location, text: str) -> bool:
    """Write a file that nobody has written yet; False if it is there. On a disk, of two at one moment one succeeds."""
    if isinstance(path, UrlPath):
        write_atomically(path, text)
        return True
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    write_atomically(part, text)
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        os.replace(part, path)
        return True
    finally:
        part.unlink(missing_ok=True)
    return True


def read_manifest(path: Location) -> Manifest | None:
    """The manifest, or None where there is none.

    Raises:
        InputError: what is there is none.
    """
    return read_account(path, Manifest) if path.exists() else None


def read_account(path: Location, schema: type[Account]) -> Account:
    """What was written once of a trial.

    Raises:
        InputError: what is there is empty, cut short, or something else.
    """
    try:
        return schema.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        field = ".".join(map(str, first["loc"])) if first else ""
        reason = f"{field}: {first['msg']}" if first and field else "it is empty or cut short"
        raise InputError(f"{path}: is not the account of a trial: {reason}") from None


WHO = ("key", "number", "recipe", "replicate", "params")
"""What a manifest and the database both say of a trial."""


def read_manifests(paths: StudyPaths, records: Sequence[TrialRecord]) -> list[Manifest]:
    """The accounts of those trials that have one, in the order they ended.

    Raises:
        InputError: some cannot be read, or are of other trials; all are told at once.
    """
    found, mistakes = [], []
    for record in records:
        path = paths.manifest(record.key)
        try:
            manifest = read_manifest(path)
        except InputError as error:
            mistakes.append(str(error))
            continue
        if manifest is None:
            continue
        if any(getattr(manifest, name) != getattr(record, name) for name in WHO):
            known = {name: getattr(record, name) for name in WHO}
            mistakes.append(f"{path}: is the account of another trial than the database's {known}")
        found.append(manifest)
    if mistakes:
        raise InputError(
            "\n".join(mistakes)
            + "\nput back what was there; or move the file out of the study's folder, and the trial "
            "runs again, from its checkpoint if it is left"
        )
    return sorted(found, key=lambda manifest: manifest.ended)


def accounted(records: Sequence[TrialRecord], manifests: Sequence[Manifest]) -> list[TrialRecord]:
    """The trials as their accounts have it: one that ended and has none is still to be done."""
    keys = {manifest.key for manifest in manifests}
    open_ = ("waiting", "running")
    return [r if r.key in keys or r.state in open_ else replace(r, state="running") for r in records]


def left_on_disk(paths: StudyPaths) -> dict[str, Location]:
    """A folder of every trial of which something is on disk, by key; of whichever study."""
    key = re.compile(r".+-t\d{5,}-s\d+")
    folders = (paths.runs, paths.root / "trials")
    return {path.name: path for folder in folders for path in below(folder, "*") if key.fullmatch(path.name)}


def manifest_ids(paths: StudyPaths) -> set[str]:
    """Ids of the studies that the accounts on disk are of."""
    manifests = (read_manifest(paths.manifest(key)) for key in left_on_disk(paths))
    return {manifest.study for manifest in manifests if manifest is not None and manifest.study is not None}


def study_id(paths: StudyPaths) -> str | None:
    """The id of the study in a folder; None before it is begun."""
    known = read_yaml(paths.config).get("id") if paths.config.exists() else None
    if known is None and paths.earlier_id.exists():
        return paths.earlier_id.read_text(encoding="utf-8").strip()
    return known


def append_event(path: Location, event: Event | Begun) -> None:
    """Add one line to a log. An object is put anew with it: a study has one writer."""
    line = event.model_dump_json().encode() + b"\n"
    if isinstance(path, UrlPath):
        path.write_bytes((path.read_bytes() if path.exists() else b"") + line)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * torn + line)


def read_events(path: Location) -> Iterator[Event]:
    """The trial's log; a line torn by a crash is left out."""
    return _read_lines(path, Event)


def read_begun(paths: StudyPaths) -> list[Begun]:
    """The sessions that the folder knows, in order."""
    return list(_read_lines(paths.sessions, Begun))


def _read_lines(path: Location, schema: type[Account]) -> Iterator[Account]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield schema.model_validate(json.loads(line))
        except ValueError:
            continue
