"""A refused command leaves what it found: no study of which no trial was begun, no database that it made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import sqlalchemy as sa
from optuna.trial import TrialState

from study.config import StudyConfig
from study.ledger.remake import id_of
from study.ledger.store import open_storage
from study.records import study_id
from trainables.errors import Away, InputError
from trainables.files import below, remove_tree


@contextmanager
def undone_if_refused(config: StudyConfig) -> Iterator[None]:
    """Within, a refusal takes back the study that this command has begun, and the database that it has made.

    Outside of the lease, which is ended in that database.
    """
    paths = config.paths
    begun, file = paths.config.exists(), _file_of(config)
    made = file is not None and not file.exists()
    try:
        yield
    except Away:  # the same command goes on
        raise
    except InputError:
        if not begun and paths.config.exists() and not below(paths.root, "trials/*/events.jsonl"):
            _forget(config)
        if made and file is not None and file.exists() and not _studies(config):
            file.unlink()
        raise


def _file_of(config: StudyConfig) -> Path | None:
    """The study's database, where it is a file."""
    if config.storage is None:
        return config.paths.database
    try:
        url = sa.make_url(config.storage)
    except sa.exc.ArgumentError:  # told when it is opened
        return None
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def _studies(config: StudyConfig) -> list[str]:
    storage = open_storage(config.paths, config.storage, make=False)
    try:
        return optuna.get_all_study_names(storage)
    finally:
        storage.engine.dispose()


def _forget(config: StudyConfig) -> None:
    paths, storage = config.paths, open_storage(config.paths, config.storage, make=False)
    if config.name in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=config.name, storage=storage)
        if id_of(study) != study_id(paths) or any(t.state != TrialState.WAITING for t in study.get_trials(False)):
            return
        storage.delete_study(study._study_id)
    storage.engine.dispose()
    remove_tree(paths.root / "trials")
    for path in (paths.sampler, paths.sessions, paths.config):
        path.unlink(missing_ok=True)
