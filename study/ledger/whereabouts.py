"""From which folder a study's database was last worked on, and how long the sessions were that only a folder knows.

A folder may be moved, and then is the same study. It may also be copied, and two copies with one database would each
do again what the other has done. Every session leaves a mark in the folder, then in the database: whoever does not
know the database's mark has not seen what was done there last.
"""

from __future__ import annotations

import socket
import time
import uuid
from itertools import pairwise

import optuna

from study.ledger.sessions import SessionRow
from study.paths import StudyPaths
from study.records import Begun, append_event, left_on_disk, read_begun, read_events
from trainables.errors import InputError

LAST = "paretovl_last_session"
"""User attribute of the Optuna study: the session that was begun last, as the folder has it."""

SAME_SECONDS = 60.0
"""A session's row in the database and its line in the folder are written within so long of each other, and the clocks
of hosts differ by less."""


def leave_mark(paths: StudyPaths, study: optuna.Study) -> None:
    """A session begins: first the folder knows it, then the database."""
    begun = Begun(id=uuid.uuid4().hex, host=socket.gethostname(), folder=str(paths.root.resolve()), time=time.time())
    append_event(paths.sessions, begun)
    study.set_user_attr(LAST, begun.model_dump())


def refuse_older_copy(paths: StudyPaths, study: optuna.Study, where: str, rebuild: str) -> None:
    """See that the folder knows what was done in the database last; one without marks is of an earlier version.

    Args:
        paths: of the study.
        study: in its database, and no other than the folder's by its id.
        where: the database is.
        rebuild: the command that makes the study there from the files.

    Raises:
        InputError: another copy of the folder has been worked on since.
    """
    last, known = study.user_attrs.get(LAST), {begun.id for begun in read_begun(paths)}
    if last is None or not known or last["id"] in known:
        return
    raise InputError(
        f"storage: the study {study.study_name!r} in {where} was last worked on from {last['folder']} on {last['host']}"
        f", and {paths.root} is a copy of that folder from before: it has not what was done since. Go on from there, "
        f"or copy its files here. If that folder is gone for good, drop what only it had: {rebuild} --lost"
    )


def unknown_sessions(paths: StudyPaths, known: list[SessionRow]) -> list[tuple[Begun, float]]:
    """Sessions of the folder that a database does not have, with the time until which something happened in them.

    Args:
        paths: of the study.
        known: sessions of the database.
    """
    times = sorted(event.time for key in left_on_disk(paths) for event in read_events(paths.events(key)))
    begun = read_begun(paths)
    ends = [other.time for _, other in pairwise(begun)] + [float("inf")] * bool(begun)
    found = []
    for one, end in zip(begun, ends, strict=True):
        if any(row.started - SAME_SECONDS <= one.time <= row.started + row.seconds() + SAME_SECONDS for row in known):
            continue
        found.append((one, max([one.time, *(moment for moment in times if one.time <= moment < end)])))
    return found
