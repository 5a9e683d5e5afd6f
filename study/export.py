"""`python -m study.export`: a study as three tables, one row a trial, one row an attempt and one row a logged value;
these with the front and the configuration in one archive; or one of its trials as the configuration that
`python -m trainables.trial` runs.
"""

from __future__ import annotations

import argparse
import io
import shlex
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from study.ledger.attempts import message_of, read_attempts
from study.paths import StudyPaths
from study.records import Event, Manifest, TrialRecord, read_events, write_atomically
from study.view import StudyView, read_study, study_parser
from trainables.cli.command import exit_on_input_error, place
from trainables.cli.yaml_core import dump
from trainables.errors import InputError, counted
from trainables.files import filled
from trainables.results import Attempt

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("csv", "parquet")


def trial_row(record: TrialRecord, manifest: Manifest | None, on_front: bool) -> dict[str, Any]:
    """A trial as one wide row.

    Columns are `param/...` as searched, `point/...` as trained with, every metric by its own name with `.low` and
    `.high` of its interval, and `cost/...`.
    """
    row: dict[str, Any] = {
        "key": record.key,
        "number": record.number,
        "recipe": record.recipe,
        "state": manifest.state if manifest else record.state,
        "on_front": on_front,
        **{f"param/{name}": value for name, value in record.params.items()},
    }
    if manifest is None:
        return row
    row |= {"reason": manifest.reason, "ended": manifest.ended, "fingerprint": manifest.fingerprint}
    row |= {f"point/{name}": value for name, value in manifest.point.items()}
    for name, metric in manifest.metrics.items():
        row |= {name: metric.value, f"{name}.low": metric.low, f"{name}.high": metric.high}
    for name, value in manifest.cost.items():
        if isinstance(value, dict):
            row |= {f"cost/{name}/{phase}": seconds for phase, seconds in value.items()}
        elif not isinstance(value, list):
            row[f"cost/{name}"] = value
    return row


def event_rows(key: str, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
    """A trial's log in long form: one row a value, `train/...` for the history and `rung/...` for small evaluations.

    The final evaluation goes by the metrics' own names. An event without values is one row without a name.
    """
    for event in events:
        shared = {"key": key, "time": event.time, "event": event.event, "step": event.step}
        if not event.metrics and not event.history:
            yield {**shared, "name": None, "value": None, "message": message_of(event)}
        for entry in event.history:
            at = {**shared, "step": int(entry.get("step", event.step)), "time": entry.get("time", event.time)}
            for name, value in entry.items():
                if name not in ("step", "time"):
                    yield {**at, "name": f"train/{name}", "value": value, "message": event.message}
        prefix = "rung/" if event.event == "rung" else ""
        for name, value in event.metrics.items():
            yield {**shared, "name": prefix + name, "value": value, "message": event.message}


def attempt_rows(key: str, attempts: Sequence[Attempt]) -> Iterator[dict[str, Any]]:
    """A trial's tries, numbered from 1, with what each held."""
    for number, attempt in enumerate(attempts, 1):
        fields = {**attempt.model_dump(), "nodes": " ".join(attempt.nodes)}
        yield {"key": key, "attempt": number, **fields, "device_seconds": attempt.device_seconds}


def tables(view: StudyView) -> dict[str, pd.DataFrame]:
    """`trials` and `attempts`, wide, and `events`, long."""
    import pandas as pd

    from study.front.estimates import front

    ended = {manifest.key: manifest for manifest in view.manifests}
    members = {entry.key for entry in front(view.manifests, view.config.objectives)}
    trials = [trial_row(record, ended.get(record.key), record.key in members) for record in view.records]
    logged = [
        row for record in view.records for row in event_rows(record.key, read_events(view.paths.events(record.key)))
    ]
    columns = ["key", "time", "event", "step", "name", "value", "message"]
    known = read_attempts(view.paths, view.records, view.manifests, None if view.running else view.sessions)
    tries = [row for record in view.records for row in attempt_rows(record.key, known.of(record.key))]
    return {
        "trials": pd.DataFrame(trials).convert_dtypes(),
        "attempts": pd.DataFrame(tries, columns=["key", "attempt", *Attempt.model_fields, "device_seconds"]),
        "events": pd.DataFrame(logged, columns=columns),
    }


def archive(view: StudyView, format: str) -> bytes:
    """A .tar.gz with what one looks at: configuration, front, page, and the tables below `export/`."""
    paths, made = view.paths, io.BytesIO()
    files = (paths.config, paths.front, paths.pareto_page, paths.certified_front)
    found = {path.name: path.read_bytes() for path in files if path.exists()}
    found |= {f"export/{name}.{format}": written(table, format) for name, table in tables(view).items()}
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, content in found.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return made.getvalue()


def written(table: pd.DataFrame, format: str) -> bytes:
    """A table as a file."""
    made = io.BytesIO()
    if format == "csv":
        table.to_csv(made, index=False)
    else:
        table.to_parquet(made, index=False)
    return made.getvalue()


def trial_yaml(view: StudyView, key: str) -> str:
    """A trial's configuration. Its checkpoints are not those of the study, so it runs from the start.

    Raises:
        InputError: there is no such trial, or it was not begun.
    """
    from study.ledger.trials import trial_of, trial_template

    begun = {record.key: record for record in view.records if record.state != "waiting"}
    if key not in begun:
        raise InputError(f"--trial {key}: no trial of that key was begun; trials are {', '.join(begun) or 'none yet'}")
    trial = trial_of(view.config, trial_template(view.config), begun[key])
    return dump(trial.model_dump(mode="json", exclude={"storage_path", "owner"}))


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    examples = "python -m study.export --name quickstart", "python -m study.export --trial quickstart-t00009-s0"
    parser = study_parser("python -m study.export", __doc__, *examples)
    parser.add_argument("--format", choices=FORMATS, default="csv", help="of the tables (default: %(default)s)")
    parser.add_argument(
        "--out", type=place, metavar="PATH", help="folder for the files (default: export in the study's folder)"
    )
    parser.add_argument(
        "--archive", type=place, metavar="FILE", help="the tables, study.yaml and the front in one .tar.gz"
    )
    parser.add_argument("--trial", metavar="KEY", help="this trial's configuration, instead of the tables")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parser().parse_args(arguments)
    with exit_on_input_error():
        view = read_study(StudyPaths(options.studies_dir / options.name))
        folder = options.out or view.paths.root / "export"
        if options.trial is not None:
            path = folder / f"{options.trial}.yaml"
            write_atomically(path, trial_yaml(view, options.trial))
            print(f"{path}: to run it alone: {shlex.join(['python', '-m', 'trainables.trial', str(path)])}")
            return 0
        if options.archive is not None:
            options.archive.write_bytes(archive(view, options.format))
            print(f"{options.archive}: study.yaml, the front, and the tables")
            return 0
        with filled(folder) as disk:
            for name, table in tables(view).items():
                file = f"{name}.{options.format}"
                (disk / file).write_bytes(written(table, options.format))
                print(f"{folder / file}: {counted(len(table), 'row')}, {len(table.columns)} columns")
    return 0


if __name__ == "__main__":
    sys.exit(main())
