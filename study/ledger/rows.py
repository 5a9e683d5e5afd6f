"""A trial's rows in Optuna's tables: what is new of it is one transaction, and may be written twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

from trainables.errors import InputError

KEPT = ("recipe", "given", "replicate", "replicate_of")
"""User attributes that say what a trial is; the others say what came of it."""

OUTSIDE = "outside"
"""User attribute with the parameters of a trial that is no draw of the present space: samplers must not see them."""

EARLIER = "earlier"
"""User attribute of a trial that was begun again after it had ended: what came of it each time."""

STUDIES, TRIALS, VALUES, PARAMS, USER, SYSTEM = (
    model.__table__
    for model in (
        models.StudyModel,
        models.TrialModel,
        models.TrialValueModel,
        models.TrialParamModel,
        models.TrialUserAttributeModel,
        models.TrialSystemAttributeModel,
    )
)


def write_trial(engine: sa.Engine, study: int, before: FrozenTrial | None, now: FrozenTrial) -> int:
    """Bring a trial in the database to what it is.

    Args:
        engine: of the database.
        study: its id there.
        before: the trial as it was written last; None if it never was.
        now: the trial as it is.

    Returns:
        Its id in the database.

    Raises:
        InputError: somebody else has made a trial of this number.
    """
    with engine.begin() as connection:
        trial = _made(connection, study, now) if before is None else before._trial_id
        for table, attributes, old in (
            (USER, now.user_attrs, before.user_attrs if before else {}),
            (SYSTEM, now.system_attrs, before.system_attrs if before else {}),
        ):
            changed = [key for key, value in attributes.items() if key not in old or old[key] != value]
            rows = [{"trial_id": trial, "key": key, "value_json": json.dumps(attributes[key])} for key in changed]
            _replace(connection, table, (table.c.trial_id == trial) & table.c.key.in_(changed), rows)
        drawn = [name for name in now.params if before is None or name not in before.params]
        rows = [{"trial_id": trial, "param_name": name, **_param(now, name)} for name in drawn]
        _replace(connection, PARAMS, (PARAMS.c.trial_id == trial) & PARAMS.c.param_name.in_(drawn), rows)
        if now.values is not None and (before is None or before.values != now.values):
            rows = [{"trial_id": trial, "objective": place, **_value(v)} for place, v in enumerate(now.values)]
            _replace(connection, VALUES, VALUES.c.trial_id == trial, rows)
        times = {name: _utc(getattr(now, name)) for name in ("datetime_start", "datetime_complete")}
        connection.execute(sa.update(TRIALS).where(TRIALS.c.trial_id == trial).values(state=now.state, **times))
    return trial


def _made(connection: sa.Connection, study: int, trial: FrozenTrial) -> int:
    """Give the trial its number, unless that was done and the answer was lost. Numbers are given one at a time."""
    connection.execute(sa.select(STUDIES.c.study_id).where(STUDIES.c.study_id == study).with_for_update())
    numbered = (TRIALS.c.study_id == study) & (TRIALS.c.number == trial.number)
    there = connection.execute(sa.select(TRIALS.c.trial_id, TRIALS.c.state).where(numbered)).one_or_none()
    if there is None:
        row = {"study_id": study, "number": trial.number, "state": trial.state}
        key = connection.execute(sa.insert(TRIALS).values(row)).inserted_primary_key
        assert key is not None
        return int(key[0])
    query = sa.select(USER.c.key, USER.c.value_json).where(USER.c.trial_id == there.trial_id)
    attributes = {key: json.loads(value) for key, value in connection.execute(query)}
    query = sa.select(PARAMS.c.param_name, PARAMS.c.param_value).where(PARAMS.c.trial_id == there.trial_id)
    params = dict(map(tuple, connection.execute(query)))
    same = {name: _param(trial, name)["param_value"] for name in trial.params}
    if (there.state, attributes, params) != (trial.state, trial.user_attrs, same):
        raise InputError(
            f"storage: the study's database has a trial {trial.number} already that was not made here. Put back a copy "
            "of the database from before another program added it, or use another --name"
        )
    return int(there.trial_id)


def _replace(connection: sa.Connection, table: sa.Table, which: Any, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        connection.execute(sa.delete(table).where(which))
        connection.execute(sa.insert(table), rows)


def _param(trial: FrozenTrial, name: str) -> dict[str, Any]:
    distribution = trial.distributions[name]
    value = float(distribution.to_internal_repr(trial.params[name]))
    return {"param_value": value, "distribution_json": distribution_to_json(distribution)}


def _value(value: float) -> dict[str, Any]:
    stored, kind = models.TrialValueModel.value_to_stored_repr(value)
    return {"value": stored, "value_type": kind}


def _utc(time: datetime | None) -> datetime | None:
    """As Optuna stores it."""
    return None if time is None else time.astimezone(UTC).replace(tzinfo=None)


def reopen(database: optuna.storages.RDBStorage, name: str, numbers: Sequence[int]) -> None:
    """Have ended trials run again under their numbers. Optuna itself never changes what has ended.

    Args:
        database: with the study.
        name: of the study.
        numbers: of its trials.
    """
    trials = database.get_all_trials(database.get_study_id_from_name(name))
    with database.engine.begin() as connection:
        for trial in (trials[number] for number in numbers):
            came = {"state": trial.state.name, "values": trial.values, "reason": trial.user_attrs.get("reason")}
            earlier = json.dumps([*trial.user_attrs.get(EARLIER, []), came])
            key, values, user, system = (
                table.c.trial_id == trial._trial_id for table in (TRIALS, VALUES, USER, SYSTEM)
            )
            again = sa.update(TRIALS).where(key).values(state=TrialState.RUNNING, datetime_complete=None)
            connection.execute(again)
            connection.execute(sa.delete(VALUES).where(values))
            connection.execute(sa.delete(USER).where(user, USER.c.key.not_in((*KEPT, OUTSIDE))))
            connection.execute(sa.delete(SYSTEM).where(system, SYSTEM.c.key.like("constraints%")))
            connection.execute(sa.insert(USER).values(trial_id=trial._trial_id, key=EARLIER, value_json=earlier))
