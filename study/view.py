"""A study as it is at this moment, read from another process without changing it."""

from __future__ import annotations

import argparse
import fcntl
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from study.config import StudyConfig
from study.ledger.frozen import load_frozen
from study.paths import StudyPaths
from study.records import Manifest, TrialRecord, accounted, left_on_disk, read_manifests
from trainables.cli.command import argument, command_parser, place_or_url
from trainables.config.fields import check_name
from trainables.errors import InputError, without_password
from trainables.files import UrlPath

if TYPE_CHECKING:
    from study.ledger.sessions import SessionRow


@dataclass(frozen=True)
class StudyView:
    """What is recorded of a study.

    Attributes:
        config: frozen with it.
        paths: its files.
        records: all trials of the ledger, in order.
        manifests: the ended ones, in the order they ended.
        sessions: of drivers, in order.
        running: whether a driver works on it now.
    """

    config: StudyConfig
    paths: StudyPaths
    records: list[TrialRecord]
    manifests: list[Manifest]
    sessions: list[SessionRow]
    running: bool


def study_parser(program: str, description: str | None, *examples: str) -> argparse.ArgumentParser:
    """Flags of every command about an existing study; its help ends with examples."""
    parser = command_parser(program, description, *examples)
    parser.add_argument(
        "--name", type=argument(check_name), default="quickstart", help="the study (default: %(default)s)"
    )
    parser.add_argument(
        "--studies-dir",
        type=place_or_url,
        metavar="PATH",
        default=Path("studies"),
        help="root of all studies: a path, or s3:// or gs:// with a bucket (default: %(default)s)",
    )
    return parser


def read_study(paths: StudyPaths) -> StudyView:
    """Read everything that is recorded.

    Raises:
        InputError: there is no such study, its database cannot be used, has lost it or is another's, or a manifest
            cannot be read or is of another study.
    """
    from study.ledger.ledger import read_records
    from study.ledger.ownership import held_study, refuse_lost
    from study.ledger.sessions import now_of, sessions
    from study.ledger.store import open_storage, storage_as_input_errors
    from study.ledger.strays import marks, refuse_strays

    if not paths.config.exists():
        others = paths.root.parent.iterdir() if paths.root.parent.is_dir() else ()
        known = ", ".join(sorted(folder.name for folder in others if (folder / paths.config.name).exists())) or "none"
        raise InputError(f"there is no study at {paths.root}; studies in {paths.root.parent}: {known}")
    config = with_passwords(load_frozen(paths))
    left = left_on_disk(paths)
    records: list[TrialRecord] = []
    rows: list[SessionRow] = []
    now = time.time()
    if config.storage is None and not paths.database.exists():
        refuse_lost(config, ())
    else:
        with storage_as_input_errors(config):
            storage = open_storage(paths, config.storage, make=False)
            if held_study(config, paths, storage) is not None:
                records = read_records(config.name, storage)
            rows, now = sessions(storage.engine, config.name), now_of(storage.engine)
    manifests = read_manifests(paths, records)
    refuse_strays(config, left, records, manifests, marks(paths))
    return StudyView(config, paths, accounted(records, manifests), manifests, rows, _driver_runs(paths, rows, now))


def with_passwords(config: StudyConfig) -> StudyConfig:
    """The study with the URLs of the variables, where those are its own with a password."""
    storage, tracking = os.environ.get("PARETOVL_STORAGE"), os.environ.get("PARETOVL_TRACKING__URI")
    if storage and without_password(storage) == config.storage:
        config = config.model_copy(update={"storage": storage})
    if tracking and without_password(tracking) == config.tracking.uri:
        config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": tracking})})
    return config


def _driver_runs(paths: StudyPaths, rows: Sequence[SessionRow], now: float) -> bool:
    """Whether a driver has the study: it holds the lock file on this machine, or its heart beats on another."""
    host = socket.gethostname()
    if any(row.open and not row.gone(now, host) for row in rows):
        return True
    if isinstance(paths.root, UrlPath) or not paths.lock.exists():
        return False
    with paths.lock.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
