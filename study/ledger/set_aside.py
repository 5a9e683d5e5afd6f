"""A trial that is to run again: everything that came of it is put aside, and the ledger does the rest."""

from __future__ import annotations

from collections.abc import Sequence

from study.records import StudyPaths, TrialRecord
from trainables.errors import InputError
from trainables.files import move


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
        earlier = [int(path.name) for path in (paths.root / "set_aside" / key).glob("*")]
        folder = paths.root / "set_aside" / key / str(max(earlier, default=0) + 1)
        folder.mkdir(parents=True)
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
