"""Whose study a database holds. It has one study of a name, and any folder or program may have made it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search_spaces.space import Space, is_draw
from study.config import StudyConfig
from study.ledger.asked import keep_asked
from study.ledger.frozen import freeze, load_frozen
from study.ledger.ledger import read_records
from study.ledger.remake import (
    CARRIED,
    FINGERPRINT,
    ID,
    MOVED,
    UNFINISHED,
    asked_on_disk,
    cannot_carry,
    id_of,
    make_room,
    make_study,
)
from study.ledger.rows import KEPT
from study.ledger.sessions import sessions
from study.ledger.strays import marks
from study.ledger.whereabouts import leave_mark, refuse_older_copy
from study.paths import StudyPaths
from study.records import left_on_disk, manifest_ids, read_frozen, read_manifests, study_id
from trainables.errors import InputError, redacted


def held_study(config: StudyConfig, paths: StudyPaths, storage: optuna.storages.RDBStorage) -> optuna.Study | None:
    """The folder's study in the database; None before it is begun.

    Raises:
        InputError: the database has lost it, has another study of its name, is not what `study.yaml` belongs to, or has
            trials in it that another program added.
    """
    where = redacted(config.storage or str(paths.database))
    try:
        study = optuna.load_study(study_name=config.name, storage=storage)
    except KeyError:
        refuse_lost(config, optuna.get_all_study_names(storage))
        return None
    _refuse_another(config, paths, study, storage.engine)
    if paths.config.exists():
        accepted, space = read_frozen(paths).accepted, load_frozen(paths).space
        added = [t.number for t in study.get_trials(deepcopy=False) if not _made_here(t, None if accepted else space)]
        if added:
            raise InputError(
                f"storage: the study {config.name!r} in {where} has trials that were not made here: "
                f"{', '.join(map(str, added))} (by number). Put back a copy of the database from before another "
                "program added them, or use another --name; what shall be tried is given as points"
            )
    return study


def refuse_lost(config: StudyConfig, others: Sequence[str]) -> None:
    """See that a study which its database does not have was not begun.

    Args:
        config: of the study.
        others: that are there.

    Raises:
        InputError: it was.
    """
    paths = config.paths
    if left := left_on_disk(paths):
        raise InputError(
            f"storage: {redacted(config.storage or str(paths.database))} has no study {config.name!r}, but {paths.root}"
            f" has trials ({len(left)}); studies there: {', '.join(others) or 'none'}. Give the --storage that the "
            "study was begun with, or put its database back, or make the study there from its files: "
            f"{paths.rebuild_command(config.storage)}"
        )


def _refuse_another(config: StudyConfig, paths: StudyPaths, study: optuna.Study, engine: sa.Engine) -> None:
    """See that the study of the database is the folder's."""
    where = redacted(config.storage or str(paths.database))
    theirs, mine, begun = id_of(study), _folders_id(paths), paths.config.exists()
    if theirs is not None and theirs != mine and not (begun and mine is None):
        drivers = sessions(engine, config.name)
        last = f", last driven from {drivers[-1].host}" if drivers else ""
        raise InputError(
            f"storage: {where} has another study {config.name!r} (id {theirs}{last}), which does not belong to "
            f"{paths.root}; use another --name or another --storage. If its folder is gone for good, remove it: "
            f'optuna delete-study --study-name {config.name} --storage "$STORAGE_URL"'
        )
    if moved := study.user_attrs.get(MOVED):
        raise InputError(
            f"storage: the study {config.name!r} was moved from {where} to {moved}; leave --storage out, or give that"
        )
    if study.user_attrs.get(UNFINISHED):
        raise InputError(
            f"storage: the study {config.name!r} in {where} was being made from its files and is not whole; "
            f"go on with it: {paths.rebuild_command(config.storage)}"
        )
    opened = study.user_attrs.get(FINGERPRINT)
    if begun and opened is not None and opened not in marks(paths):
        raise InputError(
            f"storage: the study {config.name!r} in {where} was last opened with settings that {paths.config} does not "
            f"know (fingerprint {opened}); put back the study.yaml that belongs to it"
        )
    refuse_older_copy(paths, study, where, paths.rebuild_command(config.storage))


def _folders_id(paths: StudyPaths) -> str | None:
    """What the folder says of its study: `study.yaml`, or where that is lost, the accounts of trials."""
    known = study_id(paths)
    found = manifest_ids(paths) if known is None else set()
    return found.pop() if len(found) == 1 else known


def _made_here(trial: FrozenTrial, space: Space | None) -> bool:
    """Whether the trial is as the ledger writes them: enqueued with what it is, else begun with all that was drawn.

    Args:
        trial: of the study.
        space: that all trials were drawn from; None: an earlier one may have been another.
    """
    if trial.state == TrialState.WAITING or "recipe" in trial.user_attrs:
        return any(name in trial.user_attrs for name in KEPT)
    return is_draw(space, trial.params)


def claim(config: StudyConfig, storage: optuna.storages.RDBStorage, mark: dict[str, Any], accept_changes: bool) -> str:
    """Open the folder's study: `study.yaml` and the database hold one study, which is made where there is none.

    The file is written before the study is made in the database. So one that is in the database already belongs to the
    folder only if the folder says so.

    Args:
        config: of the study.
        storage: its database; the caller holds the study there.
        mark: the fingerprint.
        accept_changes: go on with another fingerprint, or without the settings that the study was begun with.

    Returns:
        The fingerprint's hash.

    Raises:
        InputError: nothing was written: the database has lost the study, or has another folder's or program's, or
            `study.yaml` is gone, or has another fingerprint.
    """
    paths, begun = config.paths, config.paths.config.exists()
    study = held_study(config, paths, storage)
    owner = None if study is None else id_of(study)
    if study is not None and storage.get_n_trials(study._study_id):
        where = redacted(config.storage or str(paths.database))
        if owner is None and not (begun and _of_this_space(config, study)):
            raise InputError(
                f"storage: {where} has a study {config.name!r} with trials that were not made here; use another --name "
                "or another --storage"
            )
        if not begun and not accept_changes:
            raise InputError(
                f"study {config.name!r} has trials in {where}, and {paths.config}, which would say with what settings "
                "they were made, is not there. If the file is lost, put it back, or --accept-changes to go on"
            )
    remade = study is not None and begun and accept_changes and _changes_trials(paths, study, mark)
    if remade:
        _refuse_what_cannot_be(config, storage)
    hash_ = freeze(config, mark, accept_changes, owner or _folders_id(paths))
    if study is not None and (remade or _is_behind(paths, study)):
        _remake(config, storage)
        study = optuna.load_study(study_name=config.name, storage=storage)
    if study is None:
        directions = [StudyDirection[objective.direction.upper()] for objective in config.objectives]
        study = optuna.create_study(study_name=config.name, storage=storage, directions=directions)
    for name, value in ((ID, study_id(paths)), (FINGERPRINT, hash_)):
        if study.user_attrs.get(name) != value:
            study.set_user_attr(name, value)
    leave_mark(paths, study)
    return hash_


def _of_this_space(config: StudyConfig, study: optuna.Study) -> bool:
    """Whether its trials may be of an earlier version, which did not write an owner."""
    return all(trial.params.keys() <= config.space.keys() for trial in study.get_trials(deepcopy=False))


def _changes_trials(paths: StudyPaths, study: optuna.Study, mark: dict[str, Any]) -> bool:
    """Whether other settings are given under which the database holds trials in another way."""
    before = read_frozen(paths).fingerprint
    return bool(study.get_trials(deepcopy=False)) and any(before.get(name) != mark.get(name) for name in CARRIED)


def _is_behind(paths: StudyPaths, study: optuna.Study) -> bool:
    """Whether changes were accepted, and the database was not brought there: a stop came between."""
    accepted, opened = read_frozen(paths).accepted, study.user_attrs.get(FINGERPRINT)
    places = [place for place, change in enumerate(accepted) if change["trials_before"] == opened]
    lines = [line for change in accepted[places[-1] :] for line in change["changes"]] if places else []
    return any(line.startswith(CARRIED) for line in lines)


def _refuse_what_cannot_be(config: StudyConfig, storage: optuna.storages.RDBStorage) -> None:
    """See that the trials that there are can be trials of the changed study.

    Raises:
        InputError: with all reasons why not; nothing was changed.
    """
    paths = config.paths
    records, before = read_records(config.name, storage), load_frozen(paths)
    manifests = read_manifests(paths, records)
    problems = cannot_carry([objective.metric for objective in before.objectives], config, manifests)
    if problems:
        raise InputError(
            f"study {config.name!r} cannot go on with these changes:\n  "
            + "\n  ".join(problems)
            + "\nleave them out, or use another --name"
        )


def _remake(config: StudyConfig, storage: optuna.storages.RDBStorage) -> None:
    """Have the trials under the settings as they are now; the ledger tells again what came of them."""
    study = optuna.load_study(study_name=config.name, storage=storage)
    records = read_records(config.name, storage)
    keep_asked(config.paths, study_id(config.paths), list(zip(records, study.get_trials(deepcopy=False), strict=True)))
    asked = asked_on_disk(config.paths)
    make_room(config, storage, asked)
    make_study(config, storage, asked)
