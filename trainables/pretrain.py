"""`python -m trainables.pretrain config.yaml`: make everything a trial of that config needs, ahead of time."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trainables.command import exit_on_input_error, read_config
from trainables.places import absolute


def main(arguments: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    from trainables.prepare import prepare

    with exit_on_input_error():
        prepare(absolute(read_config(arguments, "python -m trainables.pretrain")), log=print)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
