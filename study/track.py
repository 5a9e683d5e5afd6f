"""`python -m study.track`: bring MLflow up to date from a study's files, or rebuild it from nothing."""

from __future__ import annotations

import argparse
import fcntl
import sys
from collections.abc import Sequence
from pathlib import Path

from study.config import ConfigError, StudyConfig, load_frozen
from study.mlflow_store import TrackingError, redacted
from study.records import StudyPaths, TrialRecord, read_manifest
from study.tracking import STATUS, Final, Projection, ui_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 where MLflow fails, 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m study.track", description=__doc__)
    parser.add_argument("--name", default="quickstart", help="the study (default: %(default)s)")
    parser.add_argument("--studies-dir", type=Path, default=Path("studies"), help="default: %(default)s")
    parser.add_argument("--tracking-uri", help="default: that of the study")
    parser.add_argument("--rebuild", action="store_true", help="delete what MLflow has of the study first")
    options = parser.parse_args(arguments)
    try:
        _track(StudyPaths(options.studies_dir / options.name), options.tracking_uri, options.rebuild)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrackingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def study_end(records: Sequence[TrialRecord], config: StudyConfig) -> Final:
    """Whether the budget is spent and nothing is left to do, or the study was stopped before."""
    searched = [record for record in records if record.recipe is None]
    ended = all(record.state in STATUS for record in records)
    return "finished" if ended and len(searched) >= config.budget.trials else "interrupted"


def _track(paths: StudyPaths, uri: str | None, rebuild: bool) -> None:
    from dashboards.pareto_page import write_front_files
    from study.ledger import read_records

    if not paths.config.exists():
        known = ", ".join(sorted(path.parent.name for path in paths.root.parent.glob("*/study.yaml"))) or "none"
        raise ConfigError(f"there is no study at {paths.root}; studies in {paths.root.parent}: {known}")
    if _driver_runs(paths):
        raise ConfigError(f"the study {paths.root.name!r} is running and updates MLflow itself; try it afterwards")
    config = load_frozen(paths)
    records = read_records(paths, config.storage)
    manifests = [read_manifest(paths.manifest(record.key)) for record in records]
    ended = [manifest for manifest in manifests if manifest is not None]
    entries = write_front_files(paths, ended, config.objectives, f"Pareto front of {config.name}")
    uri = uri or config.tracking.uri
    projection = Projection(paths, uri, config.name, config.objectives, replace=rebuild)
    final = study_end(records, config)
    projection.sync(records, final)
    done = "rebuilt" if rebuild else "up to date"
    print(f"MLflow is {done}: {redacted(projection.uri)}, experiment {projection.experiment}")
    print(f"{len(records)} trials, {len(ended)} ended, {len(entries)} on the front; the study is {final}")
    print(f"To look at it: {ui_command(uri, paths)}")


def _driver_runs(paths: StudyPaths) -> bool:
    """Whether a driver holds the study's lock."""
    if not paths.lock.exists():
        return False
    with paths.lock.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
