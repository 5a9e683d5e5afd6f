"""What a study may learn from earlier ones: their ended trials, if they can be compared."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from study.config import StudyConfig
from study.ledger.frozen import load_frozen
from study.ledger.store import open_storage
from study.paths import StudyPaths
from study.records import read_frozen
from trainables.errors import InputError
from trainables.identity import differences

FREE = {"seed", "recipes", "recipe_temperature"}
"""Fields of the fingerprint that do not change what a searched trial measures, up to noise."""


def prior_trials(config: StudyConfig) -> list[FrozenTrial]:
    """The complete and stopped trials of the studies in `warm_start`, with negative numbers.

    Raises:
        InputError: a study or its database is not there, or its trials cannot be compared with this one's.
    """
    found: list[FrozenTrial] = []
    for name in config.warm_start:
        paths = StudyPaths(config.studies_dir / name)
        if not paths.config.exists():
            raise InputError(f"warm_start: there is no study {name!r} in {config.studies_dir}")
        changes = differences(_deciding(paths), _deciding(config.paths))
        if changes:
            raise InputError(
                f"warm_start: the trials of study {name!r} cannot be compared with this one's:\n  "
                + "\n  ".join(changes)
            )
        earlier = load_frozen(paths)
        if earlier.storage is None and not paths.database.exists():
            raise InputError(f"warm_start: study {name!r} has lost its database {paths.database}")
        storage = open_storage(paths, earlier.storage, make=False)
        try:
            study = optuna.load_study(study_name=name, storage=storage)
        except KeyError:
            raise InputError(f"warm_start: the database of study {name!r} has no study of that name") from None
        for trial in study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)):
            if trial.params:
                trial.system_attrs = {key: value for key, value in trial.system_attrs.items() if "constraint" in key}
                found.append(trial)
    for number, trial in enumerate(reversed(found), 1):
        trial.number = trial._trial_id = -number
    return found


def _deciding(paths: StudyPaths) -> dict[str, Any]:
    return {name: value for name, value in read_frozen(paths).fingerprint.items() if name not in FREE}
