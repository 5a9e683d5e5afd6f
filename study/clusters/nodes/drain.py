"""`python -m study.clusters.nodes.drain`: what `ray drain-node` does, in half of its time.

Ray puts nothing more on the node, and tells the trials there; this is not part of what Ray promises to keep. It is a
process of its own because Ray's client needs much memory, and ends its process when the head stays away.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Drain a node; returns 0, or 1 with the reason as the last line of the errors.

    Args:
        arguments: the head's host:port, Ray's id of the node, when it will be taken away in milliseconds since 1970,
            and what for.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    head, node, deadline_milliseconds, message = arguments
    preempted = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=head).drain_node(node, preempted, message, int(deadline_milliseconds))
    if not accepted:
        print(why, file=sys.stderr)
    return 0 if accepted else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
