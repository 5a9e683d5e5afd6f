"""`python -m study.track`: bring MLflow up to date from a study's files, or rebuild it from nothing."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from study.paths import StudyPaths
from study.tracking.mlflow_store import TrackingError
from study.tracking.projection import Final, Projection, ui_command
from study.view import read_study, study_parser
from trainables.cli.command import exit_on_input_error
from trainables.cli.passwords import hide_passwords
from trainables.errors import InputError, counted, redacted


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    examples = "python -m study.track --name quickstart", "python -m study.track --name quickstart --rebuild"
    parser = study_parser("python -m study.track", __doc__, *examples)
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        default=os.environ.get("PARETOVL_TRACKING__URI"),
        help="of MLflow's server or database (default: that of the study)",
    )
    parser.add_argument("--rebuild", action="store_true", help="delete what MLflow has of the study first")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 1 where MLflow fails."""
    options = parser().parse_args(arguments)
    with exit_on_input_error():
        try:
            _track(StudyPaths(options.studies_dir / options.name), options.tracking_uri, options.rebuild)
        except TrackingError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def _track(paths: StudyPaths, uri: str | None, rebuild: bool) -> None:
    from dashboards.pareto_page import write_front_files
    from study.status import status_of

    view = read_study(paths)
    if view.running:
        raise InputError(f"the study {paths.root.name!r} is running and updates MLflow itself; try it afterwards")
    config = view.config
    title = f"Pareto front of {config.name}"
    entries = write_front_files(paths, view.manifests, config.objectives, title, config.protocol)
    uri = uri or config.tracking.uri
    projection = Projection(paths, uri, config.name, config.objectives, replace=rebuild)
    final: Final = "finished" if status_of(view).done else "interrupted"
    projection.sync(view.records, final)
    done = "rebuilt" if rebuild else "up to date"
    print(f"MLflow is {done}: {redacted(projection.uri)}, experiment {projection.experiment}")
    trials = f"{counted(len(view.records), 'trial')}, {len(view.manifests)} ended"
    print(f"{trials}, {len(entries)} on the front; the study is {final}")
    print(f"To look at it: {ui_command(uri, paths)}")


if __name__ == "__main__":
    hide_passwords()
    sys.exit(main())
