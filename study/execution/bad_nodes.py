"""Nodes on which trials fail that succeed elsewhere: a device with errors, a full disk, a broken mount."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from trainables.errors import counted
from trainables.execution.reserved import node_id
from trainables.results import Attempt

TRIALS = 2
"""So many that failed on a node and came further elsewhere speak against the node: one may have had bad luck."""

FAR = ("complete", "stopped", "point", "out_of_memory")
"""Causes with which an attempt has come as far as it could."""


def bad_nodes(attempts: Mapping[str, Sequence[Attempt]], least: int = TRIALS) -> dict[str, list[str]]:
    """Names of nodes to leave out, and the trials that say so.

    Only the loss of a worker speaks against the node it was on: what the trial did wrong it does everywhere.

    Args:
        attempts: of each trial, by its key, in order.
        least: how many trials have to say so.
    """
    against: defaultdict[str, list[str]] = defaultdict(list)
    for key, tries in attempts.items():
        for node in dict.fromkeys(found for tried in tries if (found := failed_on(tried)) is not None):
            if any(
                failed_on(tried) == node and _further(tried, tries[place + 1 :], node)
                for place, tried in enumerate(tries)
            ):
                against[node].append(key)
    return {node: sorted(keys) for node, keys in against.items() if len(keys) >= least}


def failed_on(attempt: Attempt) -> str | None:
    """The node that an attempt failed on, if one can be told."""
    if attempt.cause != "infrastructure":
        return None
    nodes = set(attempt.nodes)
    return attempt.failed_on or (nodes.pop() if len(nodes) == 1 else None)


def _further(failed: Attempt, later: Sequence[Attempt], node: str) -> bool:
    elsewhere = [one for one in later if node not in one.nodes and one.ended is not None]
    return any(one.cause in FAR or one.to_step > failed.to_step for one in elsewhere)


def left_out(bad: Mapping[str, Sequence[str]], able: Sequence[str]) -> dict[str, str]:
    """Those of the bad nodes that are not used any more, by id, with a sentence that says why; never the last one.

    Args:
        bad: see `bad_nodes`; those with most against them first.
        able: ids of all nodes that are alive and could hold a worker.
    """
    found: dict[str, str] = {}
    for name, keys in sorted(bad.items(), key=lambda item: -len(item[1])):
        if node_id(name) in able and len(set(able) - found.keys()) > 1:
            found[node_id(name)] = (
                f"{counted(len(keys), 'trial')} failed on {name} and came further elsewhere: {', '.join(keys)}"
            )
    return found
