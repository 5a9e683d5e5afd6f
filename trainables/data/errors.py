"""What is wrong with data, in one message."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

LISTED_PROBLEMS, LISTED_NAMES = 20, 8


def holding(folder: Path, pattern: str) -> str:
    """What is there of the kind that was looked for, to be put behind a message."""
    if not folder.is_dir():
        return f"{folder} is no folder"
    found = sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))
    more = f" and {len(found) - LISTED_NAMES} more" if len(found) > LISTED_NAMES else ""
    return f"{folder} has {', '.join(found[:LISTED_NAMES]) or f'no {pattern}'}{more}"


class DataError(ValueError):
    """Data that cannot be used. The message says what is wrong, then lists all problems.

    Args:
        message: What is wrong, and what is accepted.
        problems: One line each; after `LISTED_PROBLEMS` the message only tells how many there are.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        lines = list(problems[:LISTED_PROBLEMS])
        if len(problems) > len(lines):
            lines.append(f"... and {len(problems) - len(lines)} more ({len(problems)} in all)")
        super().__init__("\n  ".join([message, *lines]))
