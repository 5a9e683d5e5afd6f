"""What was asked of each trial, in a file beside its account: what the database says and no account or log does.

A trial is written to the database first and to its file then, so a file says no more than the database has had.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from search_spaces.space import Space, is_inside
from study.config import StudyConfig
from study.ledger.rows import EARLIER, KEPT, OUTSIDE
from study.ledger.store import MirroredStorage
from study.paths import StudyPaths
from study.records import Asked, Manifest, TrialRecord, read_account, write_if_changed
from study.search.unit_box import UnitBox
from trainables.errors import InputError
from trainables.files import below


def asked_of(study: str | None, record: TrialRecord, trial: FrozenTrial) -> Asked:
    """Of a trial of Optuna's, whatever came of it.

    Args:
        study: id of the study.
        record: of the trial.
        trial: as Optuna has it.
    """
    return Asked(
        study=study,
        key=record.key,
        number=record.number,
        state="waiting" if trial.state == TrialState.WAITING else "running",
        params=record.params,
        attributes={name: value for name, value in trial.user_attrs.items() if name in (*KEPT, EARLIER)},
        system={name: value for name, value in trial.system_attrs.items() if not name.startswith("constraints")},
        begun=trial.datetime_start,
    )


def asked_before(manifest: Manifest) -> Asked:
    """What must have been asked of a trial that ended, where its file is gone or was never written."""
    first = manifest.number if manifest.replicate == 0 else int(manifest.key.rsplit("-", 2)[1].removeprefix("t"))
    attributes = {"recipe": manifest.recipe, "replicate": manifest.replicate, "replicate_of": first}
    if manifest.replicate == 0:
        attributes = {} if manifest.recipe is None else {"recipe": manifest.recipe}
    return Asked(
        study=manifest.study,
        key=manifest.key,
        number=manifest.number,
        state="running",
        params=manifest.params,
        attributes=attributes,
    )


def as_trial(asked: Asked, space: Space) -> FrozenTrial:
    """For Optuna, running or waiting.

    Args:
        asked: of the trial.
        space: of the study now; a trial that is no draw of it keeps its parameters where samplers do not see them.
    """
    inside = not asked.params or is_inside(space, asked.params)
    distributions = UnitBox(space).distributions
    trial = optuna.trial.create_trial(
        state=TrialState[asked.state.upper()],
        params=asked.params if inside else {},
        distributions={name: distributions[name] for name in asked.params} if inside else {},
        user_attrs={**asked.attributes, **({} if inside else {OUTSIDE: asked.params})},
        system_attrs=asked.system,
    )
    trial.datetime_start = asked.begun
    return trial


def read_asked(paths: StudyPaths, key: str) -> Asked | None:
    """Of a trial; None where there is none.

    Raises:
        InputError: what is there is none.
    """
    path = paths.asked(key)
    return read_account(path, Asked) if path.exists() else None


def refuse_others_asked(
    config: StudyConfig, study: str | None, records: Sequence[TrialRecord], ended: Collection[str]
) -> None:
    """See that the trials that have not ended are those that were begun.

    Args:
        config: of the study.
        study: its id.
        records: all trials of the database.
        ended: keys of those that have an account, which says it.

    Raises:
        InputError: with those that are not.
    """
    mistakes = []
    for record in records:
        asked = None if record.key in ended else read_asked(config.paths, record.key)
        if asked is None:
            continue
        begun = asked.state == "waiting" or (record.state != "waiting" and asked.params == record.params)
        if not begun or asked.number != record.number or asked.study not in (None, study):
            mistakes.append(
                f"{config.paths.asked(record.key)}: is of another trial than the database's {record.params}"
            )
    if mistakes:
        raise InputError(
            "\n".join(mistakes)
            + "\nput back the database that they belong to, or make the study in it again from its files: "
            + config.paths.rebuild_command(config.storage)
        )


def keep_asked(paths: StudyPaths, study: str | None, trials: Sequence[tuple[TrialRecord, FrozenTrial]]) -> None:
    """Write what is missing or behind: of a version that did not, or after a stop before it."""
    there = {path.parent.name for path in below(paths.root / "trials", "*/asked.json")}
    for record, trial in trials:
        if record.key not in there or not trial.state.is_finished():
            write_if_changed(paths.asked(record.key), asked_of(study, record, trial).model_dump_json(indent=1))


def keep_sampler(paths: StudyPaths, storage: MirroredStorage) -> None:
    """Write what samplers keep for the whole study, if anything."""
    (study,) = storage.get_all_studies()
    if study.system_attrs:
        write_if_changed(paths.sampler, json.dumps(study.system_attrs))
    storage.attributes_changed = False
