"""The same exception at the same place is a bug."""

from __future__ import annotations

from study.execution.failures import AlikeFailures, signature
from study.records import Manifest

TRACE = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    g()\n  File "b.py", line {line}, in g\n'


def failed(line: int, reason: str = "KeyError: 'x'", state: str = "failed", trace: str | None = TRACE) -> Manifest:
    text = None if trace is None else trace.format(line=line)
    fields = {"key": "k", "number": 0, "recipe": None, "params": {}, "point": {}, "fingerprint": "f", "ended": 0}
    return Manifest.model_validate({**fields, "state": state, "reason": reason, "trace": text})


def test_alike_is_type_and_innermost_place() -> None:
    assert signature("KeyError: 1", TRACE.format(line=7)) == "KeyError at b.py:7"
    assert signature("workers lost 3 times", None) is None


def test_a_bug_is_what_fails_alike_so_many_times() -> None:
    alike = AlikeFailures(allowed=3)
    for manifest in (
        failed(7),
        failed(8),
        failed(7, "ValueError: x"),
        failed(7, "KeyError: 'y'"),
        failed(7, state="infeasible"),
        failed(7, trace=None),
    ):
        alike.add(manifest)
        assert alike.bug is None
    alike.add(failed(7))
    assert alike.bug == "KeyError at b.py:7"
    told = alike.report("mine")
    assert told.count("Traceback") == 1
    assert "3 trials failed alike, KeyError at b.py:7" in told
    assert "--accept-changes --retry-failed" in told
