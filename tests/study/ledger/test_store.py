"""The study's database: never half made."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa

from study.ledger.store import open_storage
from study.records import StudyPaths


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
