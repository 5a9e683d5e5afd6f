"""The study's database: never half made."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa

from study.ledger.prior_studies import prior_trials
from study.ledger.store import open_storage
from study.paths import StudyPaths
from study.tracking.mlflow_store import open_experiment
from study.tracking.projection import default_uri
from tests.study.helpers import complete, opened, run_next, study
from trainables.errors import InputError


class Killed(BaseException):
    """Stands for a kill: nothing after it runs, and SQLite has kept the statements before it."""


@pytest.mark.parametrize("table", ["studies", "trials", "version_info", "paretovl_sessions"])
def test_a_stop_while_it_is_made_leaves_no_second_study(tmp_path: Path, table: str) -> None:
    def stop(connection: object, cursor: object, statement: str, *_: object) -> None:
        if f"CREATE TABLE {table} " in statement:
            raise Killed

    paths = StudyPaths(tmp_path)
    sa.event.listen(sa.Engine, "after_cursor_execute", stop)
    try:
        with pytest.raises(Killed):
            open_storage(paths, None)
    finally:
        sa.event.remove(sa.Engine, "after_cursor_execute", stop)
    assert not paths.database.exists()

    storage = open_storage(paths, None)
    optuna.create_study(study_name="s", storage=storage)
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        optuna.create_study(study_name="s", storage=storage)


@pytest.mark.parametrize("name", ["what?", "50%25", "#1", "a b", "été"])
def test_any_path_may_hold_the_studies(tmp_path: Path, name: str) -> None:
    config = study(tmp_path / name)
    ledger = opened(config)
    run_next(ledger, config, complete(0.7, 0.2))
    assert config.paths.database.is_file()
    again = opened(config)
    assert [record.state for record in again.records()] == ["complete", "waiting"]
    assert {path.name for path in tmp_path.iterdir()} == {name}


def test_mlflow_keeps_its_store_in_any_path(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path / "what? 50%25#1" / "s")
    paths.root.mkdir(parents=True)
    open_experiment(default_uri(paths), "paretovl/s", "id", paths.mlflow_artifacts, movable=True)
    assert paths.mlflow_database.is_file()
    assert list(paths.root.glob("*.part")) == []


def test_an_earlier_study_is_only_read_and_what_it_lacks_is_told(tmp_path: Path) -> None:
    first = study(tmp_path, name="first")
    opened(first)
    second = study(tmp_path, name="second", warm_start=("first",))
    opened(second.model_copy(update={"warm_start": ()}))
    first.paths.database.rename(tmp_path / "elsewhere.db")
    with pytest.raises(InputError, match="warm_start: study 'first' has lost its database"):
        prior_trials(second)
    assert not first.paths.database.exists()
    optuna.storages.RDBStorage(f"sqlite:///{first.paths.database}")
    with pytest.raises(InputError, match="warm_start: the database of study 'first' has no study of that name"):
        prior_trials(second)
