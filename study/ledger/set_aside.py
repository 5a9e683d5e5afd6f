"""A trial that is to run again: what came of it is put aside, and the ledger does the rest."""

from __future__ import annotations

import time
from collections.abc import Sequence

from study.paths import StudyPaths
from study.records import Event, TrialRecord, append_event, read_manifest
from trainables.errors import InputError
from trainables.files import Location, move


def set_aside(paths: StudyPaths, records: Sequence[TrialRecord], keys: Sequence[str]) -> None:
    """Move the files of ended trials to `set_aside/KEY/1`, `2`, ...; those that have not ended go on anyway.

    The account moves last: after a stop before that, a trial has ended and its model is aside; then it runs again.

    Args:
        paths: of the study.
        records: all trials of the ledger.
        keys: of the trials.

    Raises:
        InputError: there are no such trials; nothing was moved.
    """
    states = {record.key: record.state for record in records}
    if unknown := [key for key in keys if key not in states]:
        raise InputError(f"rerun: no trial {', '.join(unknown)}; trials are {', '.join(states) or 'none yet'}")
    for key in keys:
        if states[key] in ("waiting", "running"):
            continue
        folder = _next_folder(paths, key)
        certificate = paths.certificate(key)
        for path in (
            paths.certified_front,
            certificate,
            certificate.with_suffix(""),
            paths.runs / key,
            paths.manifest(key).parent,
        ):
            if path.exists():
                move(path, folder / ("run" if path.parent == paths.runs else path.name))


def retry_failed(paths: StudyPaths, records: Sequence[TrialRecord]) -> None:
    """Move the accounts of failed trials to `set_aside/KEY/1`, `2`, ...; with their logs and checkpoints they go on.

    Args:
        paths: of the study.
        records: all trials of the ledger.
    """
    for record in records:
        if record.state not in ("failed", "running"):
            continue
        account = paths.manifest(record.key)
        found = read_manifest(account)
        if found is None or found.state != "failed":
            continue
        append_event(paths.events(record.key), Event(time=time.time(), event="retry", message=found.reason or ""))
        move(account, _next_folder(paths, record.key) / account.name)


def _next_folder(paths: StudyPaths, key: str) -> Location:
    earlier = [int(path.name) for path in (paths.root / "set_aside" / key).glob("*")]
    folder = paths.root / "set_aside" / key / str(max(earlier, default=0) + 1)
    folder.mkdir(parents=True)
    return folder
