"""Lets Ray Tune end the Ray Train run inside a trial, which it does not do by itself.

When Tune stops a trial, it ends the trial's process. The run's controller dies with it, but the workers' placement
group stays booked: the helper that should free it asks Ray's dashboard whether the controller lives, and without a
dashboard it asks for ever. So each report carries the controller, and whoever stops the trial aborts that first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import UserCallback

CONTROLLER = "controller"
"""The field of a report that holds the controller's handle."""

ABORT_SECONDS = 30.0


class Forward(UserCallback):
    """Hands on what rank 0 reports, with the controller, which this runs in.

    Args:
        reports: a `ray.util.queue.Queue`.
    """

    def __init__(self, reports: Any) -> None:
        self._reports = reports

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray Train."""
        self._reports.put({**metrics[0], CONTROLLER: ray.get_runtime_context().current_actor})


def abort(result: Mapping[str, Any]) -> None:
    """End the run that a report came from and wait until its workers' resources are free.

    Args:
        result: the report.
    """
    with contextlib.suppress(RayError):  # it ends by ending its own process
        ray.get(result[CONTROLLER].abort.remote(), timeout=ABORT_SECONDS)
