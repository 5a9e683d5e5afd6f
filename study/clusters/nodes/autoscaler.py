"""Ray's autoscaler, which turns to another kind of node when the cloud refuses one.

Ray 2.60's own asks for the refused kind again, every second and for ever, whatever else the cluster file has: it ranks
lower what was allocated and did not come up, and forgets what was refused outright, as clouds do that have no spot
machine left. So the head starts Ray with `--no-monitor`, and `python -m study.clusters.nodes.autoscaler` beside it,
with the flags of Ray's `monitor.py`. A refused kind is asked for again after
`RAY_AUTOSCALER_AVAILABILITY_RECOVERY_S` (600 s).

All of it is Ray's private API.
"""

from __future__ import annotations

import runpy
from types import SimpleNamespace
from typing import Any


def main() -> None:
    """Run it until the process is ended."""
    from ray.autoscaler.v2 import autoscaler
    from ray.autoscaler.v2.instance_manager.node_provider import LaunchNodeError

    class Autoscaler(autoscaler.Autoscaler):
        def _init_instance_manager(self, **given: Any) -> None:
            super()._init_instance_manager(**given)
            provider, ranks = self._cloud_instance_provider, self._cloud_resource_monitor
            poll_errors = provider.poll_errors

            def polled() -> list[Any]:
                errors: list[Any] = poll_errors()
                for error in errors:
                    if isinstance(error, LaunchNodeError):
                        ranks.allocation_timeout(SimpleNamespace(instance_type=error.node_type))
                return errors

            provider.poll_errors = polled

    autoscaler.Autoscaler = Autoscaler
    runpy.run_module("ray.autoscaler.v2.monitor", run_name="__main__")


if __name__ == "__main__":
    main()
