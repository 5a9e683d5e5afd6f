"""Whose study a database holds. It has one study of a name, and any folder or program may have made it."""

from __future__ import annotations

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search_spaces.space import Space, is_draw
from study.config import StudyConfig
from study.ledger.frozen import load_frozen
from study.ledger.store import KEPT
from study.records import StudyPaths, folder_id, read_frozen, write_atomically
from trainables.errors import InputError, redacted

OWNER = "paretovl_folder"
"""User attribute of the Optuna study: the id of the folder it belongs to."""


def held_study(config: StudyConfig, paths: StudyPaths, storage: optuna.storages.RDBStorage) -> optuna.Study | None:
    """The folder's study in the database; None before it is begun.

    Raises:
        InputError: the database has lost it, has another folder's study of its name, or has trials in it that another
            program added.
    """
    where = redacted(config.storage or str(paths.database))
    try:
        study = optuna.load_study(study_name=config.name, storage=storage)
    except KeyError:
        ended = len(list(paths.root.glob("trials/*/manifest.json")))
        if not ended:
            return None
        others = ", ".join(optuna.get_all_study_names(storage)) or "none"
        raise InputError(
            f"storage: {where} has no study {config.name!r}, but {paths.root / 'trials'} has {ended} ended trials of "
            f"it; studies there: {others}. Give the --storage that the study was begun with, put its database back, or "
            "use another --name"
        ) from None
    owner = study.user_attrs.get(OWNER)
    if owner is not None and paths.folder_id.exists() and owner != folder_id(paths):
        raise InputError(
            f"storage: the study {config.name!r} in {where} belongs to another folder than {paths.root}; use another "
            "--name or another --storage"
        )
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


def _made_here(trial: FrozenTrial, space: Space | None) -> bool:
    """Whether the trial is as the ledger writes them: enqueued with what it is, else begun with all that was drawn.

    Args:
        trial: of the study.
        space: that all trials were drawn from; None: an earlier one may have been another.
    """
    if trial.state == TrialState.WAITING or "recipe" in trial.user_attrs:
        return any(name in trial.user_attrs for name in KEPT)
    return is_draw(space, trial.params)


def claim(config: StudyConfig, storage: optuna.storages.RDBStorage, accept_changes: bool) -> None:
    """Make the folder's study in the database, or see that the one that is there is its own.

    Before `study.yaml` is written, so that a database with trials and a folder without one do not belong together.

    Args:
        config: of the study.
        storage: its database.
        accept_changes: go on without the settings that the study was begun with.

    Raises:
        InputError: the database has lost the study, or another folder's or program's, or `study.yaml` is gone.
    """
    paths = config.paths
    study = held_study(config, paths, storage)
    if study is None:
        directions = [StudyDirection[objective.direction.upper()] for objective in config.objectives]
        study = optuna.create_study(study_name=config.name, storage=storage, directions=directions)
    owner, begun = study.user_attrs.get(OWNER), paths.config.exists()
    if storage.get_n_trials(study._study_id):
        where = redacted(config.storage or str(paths.database))
        if owner is None and not (begun and _of_this_space(config, study)):
            raise InputError(
                f"storage: {where} has a study {config.name!r} with trials that were not made here; use another --name "
                "or another --storage"
            )
        if not begun and not (accept_changes and paths.folder_id.exists()):
            raise InputError(
                f"study {config.name!r} has trials in {where}, and {paths.config}, which would say with what settings "
                "they were made, is not there. If they are another folder's, use another --name; if the file is lost, "
                "put it back" + (", or --accept-changes to go on" if paths.folder_id.exists() else "")
            )
    if owner is None:
        study.set_user_attr(OWNER, folder_id(paths))
    elif not paths.folder_id.exists():
        write_atomically(paths.folder_id, owner)


def _of_this_space(config: StudyConfig, study: optuna.Study) -> bool:
    """Whether its trials may be of an earlier version, which did not write an owner."""
    return all(trial.params.keys() <= config.space.keys() for trial in study.get_trials(deepcopy=False))
