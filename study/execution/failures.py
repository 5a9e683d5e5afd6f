"""Failures that are alike: a bug, which would spoil every further trial the same way."""

from __future__ import annotations

import re
from collections import Counter

from study.records import Manifest

PLACE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in ')


def signature(reason: str | None, trace: str | None) -> str | None:
    """Type of an exception and the place that raised it; None for a failure without a trace, such as a lost node.

    Example:
        >>> signature("KeyError: 'x'", 'Traceback ...\\n  File "a/b.py", line 3, in f\\n    d[x]\\nKeyError: x')
        'KeyError at a/b.py:3'
    """
    places = list(PLACE.finditer(trace or ""))
    if not places:
        return None
    return f"{(reason or '').partition(':')[0]} at {places[-1]['file']}:{places[-1]['line']}"


class AlikeFailures:
    """Counts the failed trials of a session by their signature.

    Attributes:
        bug: the signature that occurred `allowed` times; None until then.

    Args:
        allowed: so many alike are a bug.
    """

    def __init__(self, allowed: int) -> None:
        self.bug: str | None = None
        self._allowed = allowed
        self._seen: Counter[str] = Counter()
        self._trace = ""

    def add(self, manifest: Manifest) -> None:
        """Account for an ended trial."""
        found = signature(manifest.reason, manifest.trace) if manifest.state == "failed" else None
        if found is None:
            return
        self._seen[found] += 1
        if self._seen[found] >= self._allowed and self.bug is None:
            self.bug, self._trace = found, manifest.trace or ""

    def report(self, study: str) -> str:
        """The bug, for the user: the trace once, and what to do."""
        return (
            f"{self._trace.rstrip()}\n"
            f"study {study} was stopped: {self._seen[self.bug or '']} trials failed alike, {self.bug}.\n"
            "That is a bug, not bad luck. Mend it and run the same command again with --accept-changes "
            "--retry-failed: what ended well is kept, what failed is run again."
        )
