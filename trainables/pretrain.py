"""`python -m trainables.pretrain config.yaml`: make everything a trial of that config needs, ahead of time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from trainables.cli.command import config_parser, exit_on_input_error, read_config
from trainables.execution.places import absolute


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    return config_parser("python -m trainables.pretrain", __doc__)


def main(arguments: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    path = parser().parse_args(arguments).config
    with exit_on_input_error():
        config = absolute(read_config(path))
        from trainables.prepare import prepare

        prepare(config, log=print)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
