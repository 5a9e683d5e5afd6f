"""One table at the end of the tests: what was done to a study, and how it compares with an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

Tell = Callable[[str, int, Iterable[object], Iterable[object], bool], None]
"""Called with what was done, how often, the trials and MLflow runs of the disturbed and of the undisturbed study, and
whether all of both is equal: trials, values, front, MLflow runs."""

ROW = "chaos"
"""Property of a test, in which a row travels to the process that prints."""
COLUMNS = ("what was done", "times", "trials and runs", "lost", "doubled", "equal to the undisturbed study")


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Tell:
    """Adds a row to the table."""

    def add(what: str, times: int, disturbed: Iterable[object], undisturbed: Iterable[object], equal: bool) -> None:
        found, expected = list(disturbed), set(undisturbed)
        lost, doubled = len(expected - set(found)), len(found) - len(set(found))
        record_property(ROW, [what, str(times), str(len(found)), str(lost), str(doubled), "yes" if equal else "NO"])

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    reports = [report for state in ("passed", "failed") for report in terminalreporter.getreports(state)]
    rows = [row for report in reports if report.when == "call" for name, row in report.user_properties if name == ROW]
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    terminalreporter.section("chaos")
    for row in (COLUMNS, *rows):
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
