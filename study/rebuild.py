"""`python -m study.rebuild`: make a study's database again from its files; in another database, move the study there.

What counts of a study is in its folder: what was asked of every trial, its log and its account. So a lost database,
an older copy of one, or a new place for it are the same: trials get the numbers, parameters, states and values that
they had, and the study goes on. The database that a study is moved from is marked, and used no more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import optuna
import sqlalchemy as sa

from study.config import StudyConfig
from study.ledger.frozen import load_frozen
from study.ledger.lease import Lease, driver_lock, leave_at_once
from study.ledger.ledger import Ledger
from study.ledger.ownership import held_study
from study.ledger.remake import FINGERPRINT, MOVED, asked_on_disk, make_room, make_study
from study.ledger.sessions import SESSIONS, make_sessions_table, sessions
from study.ledger.store import open_storage, storage_as_input_errors
from study.ledger.undo import undone_if_refused
from study.ledger.whereabouts import leave_mark, unknown_sessions
from study.paths import StudyPaths, sqlite_url
from study.records import TrialRecord, read_frozen, write_atomically
from study.view import study_parser, with_passwords
from trainables.cli.command import exit_on_input_error
from trainables.cli.passwords import hide_passwords
from trainables.cli.yaml_core import dump
from trainables.errors import InputError, redacted, without_password

Storage = optuna.storages.RDBStorage
Say = Callable[[str], None]


def copy_sessions(before: sa.Engine | None, after: sa.Engine, paths: StudyPaths) -> None:
    """How long drivers have worked on the study goes with it; what no database has is read from its logs."""
    name = paths.root.name
    make_sessions_table(after)
    rows = [row for row in sessions(before, name) if not row.open] if before is not None else []
    values = [
        {column: getattr(row, column) for column in (c.name for c in SESSIONS.columns) if column != "id"}
        for row in rows
    ]
    who = {"study": name, "process": 0, "process_started": 0.0, "device": ""}
    for begun, end in unknown_sessions(paths, rows or sessions(after, name)):
        values.append({**who, "host": begun.host, "started": begun.time, "heartbeat": end, "ended": end})
    with after.begin() as connection:
        if rows:
            connection.execute(sa.delete(SESSIONS).where(SESSIONS.c.study == name, SESSIONS.c.ended.is_not(None)))
        if values:
            connection.execute(sa.insert(SESSIONS), values)


def rebuild(paths: StudyPaths, url: str | None, earlier_url: str | None, lost: bool, say: Say) -> None:
    """Make the study in a database, and mark the one it was in.

    Args:
        paths: of the study.
        url: of the database; None: SQLite in the study's folder.
        earlier_url: of the one it was in.
        lost: that one is gone for good, so it is not marked as left; what it has beyond the files is given up.
        say: told what was done.

    Raises:
        InputError: the study is running, its files or the databases are of something else, or the one it was in cannot
            be used and is not known to be lost.
    """
    config = load_frozen(paths).model_copy(update={"storage": url})
    before = config.model_copy(update={"storage": earlier_url})
    moves = _place(paths, url) != _place(paths, earlier_url)
    where = redacted(url or str(paths.database))
    with ExitStack() as stack:
        stack.enter_context(driver_lock(config))
        stack.enter_context(undone_if_refused(config))
        earlier, records = None, None
        if moves and not lost:
            earlier, records = _opened_before(before, stack)
        storage = open_storage(paths, url)
        stack.enter_context(storage_as_input_errors(config))
        stack.enter_context(Lease(storage.engine, config.name, leave_at_once))
        mark = read_frozen(paths).hash
        if not (moves or lost) and _is_whole(config, storage, mark):
            say(f"study {config.name} in {where} is all there: nothing to do")
            return
        asked = asked_on_disk(paths)
        make_room(config, storage, asked, lost and not moves)
        for number in make_study(config, storage, asked):
            say(f"trial {number} left nothing on disk: it is asked anew")
        copy_sessions(earlier.engine if earlier else None, storage.engine, paths)
        ledger = Ledger(config, paths, mark, database=storage)
        if records is not None and ledger.records() != records:
            raise InputError(f"{paths.root}: its files do not say what its database has, where nothing was changed")
        made = optuna.load_study(study_name=config.name, storage=storage)
        made.set_user_attr(FINGERPRINT, mark)
        leave_mark(paths, made)
        if earlier is not None:
            optuna.load_study(study_name=config.name, storage=earlier).set_user_attr(MOVED, where)
        frozen = read_frozen(paths)
        fields = {**frozen.config, "storage": None if url is None else without_password(url)}
        write_atomically(paths.config, dump(frozen.model_copy(update={"config": fields}).model_dump(mode="json")))
        states = [record.state for record in ledger.records()]
        told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "no trials"
        say(f"study {config.name} is in {where}: {told}; to go on: {paths.resume_command}")


def _place(paths: StudyPaths, url: str | None) -> str:
    return sa.make_url(url or sqlite_url(paths.database)).set(password=None).render_as_string()


def _opened_before(config: StudyConfig, stack: ExitStack) -> tuple[Storage | None, list[TrialRecord] | None]:
    """The database that the study was in, if it has it still, and its trials; what it alone knows gets into files."""
    if config.storage is None and not config.paths.database.exists():
        return None, None
    try:
        storage = open_storage(config.paths, config.storage, make=False)
        with storage_as_input_errors(config):
            if held_study(config, config.paths, storage) is None:
                return None, None
            stack.enter_context(Lease(storage.engine, config.name, leave_at_once))
            ledger = Ledger(config, config.paths, read_frozen(config.paths).hash, database=storage)
            return storage, ledger.records()
    except InputError as error:
        raise InputError(
            f"{error}\nthe study would go on there, too: put that right (--from gives its URL with a password), or "
            "give --lost if it is gone for good"
        ) from None


def _is_whole(config: StudyConfig, storage: Storage, mark: str) -> bool:
    """Whether the study in a database is what its files say."""
    try:
        if held_study(config, config.paths, storage) is None:
            return False
        Ledger(config, config.paths, mark, database=storage)
    except InputError:
        return False
    return True


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    examples = (
        "python -m study.rebuild --name mine",
        "python -m study.rebuild --storage postgresql+psycopg://me@db/paretovl",
    )
    parser = study_parser("python -m study.rebuild", __doc__, *examples)
    parser.add_argument("--storage", metavar="URL", help="database to make it in (default: the study's own)")
    parser.add_argument("--sqlite", action="store_true", help="make it in the study's folder, in study.db")
    parser.add_argument(
        "--from",
        dest="earlier",
        metavar="URL",
        help="the database it was in, if its password is not known otherwise",
    )
    parser.add_argument(
        "--lost",
        action="store_true",
        help="the database it was in is gone for good: go by the study's files alone",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    if arguments is None:
        hide_passwords()
    options = parser().parse_args(arguments)
    with exit_on_input_error():
        paths = StudyPaths(options.studies_dir / options.name)
        if not paths.config.exists():
            raise InputError(f"there is no study at {paths.root}")
        own = with_passwords(load_frozen(paths)).storage
        url = None if options.sqlite else options.storage or os.environ.get("PARETOVL_STORAGE") or own
        rebuild(paths, url, options.earlier or os.environ.get("PARETOVL_FROM") or own, options.lost, print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
