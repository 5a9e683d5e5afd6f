"""What is wrong with data, in one message."""

from __future__ import annotations

from collections.abc import Sequence

LISTED_PROBLEMS = 20


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
