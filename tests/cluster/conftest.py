"""What the tests of clusters share with those that kill and cut: the table at their end."""

from tests.chaos.conftest import pytest_terminal_summary, tell

__all__ = ["pytest_terminal_summary", "tell"]
