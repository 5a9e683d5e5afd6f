"""The devices of one attempt, reserved before anything of it runs, and given back by whoever reserved them.

A placement group of Ray is the reservation. Ray Train would make one of its own, for which a trial's processes would
have to wait, and which stays booked when its controller is killed: so its workers are put into this one (`Workplace`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainables.config import WorkersConfig

RESERVED_SHARE = 0.8
"""Of a worker's cores that Ray books. The rest is for the trial's own process and Ray's helpers, which only wait."""

NODE_LABEL = "ray.io/node-id"
KIND = "accelerator_type:"
"""How Ray names the resource that tells the kind of a node's devices."""

RECLAIMED = "AUTOSCALER_DRAIN_PREEMPTED"
"""Why a node is gone, in Ray's words, when its owner took it away."""


@dataclass(frozen=True)
class Devices:
    """What a reservation holds.

    Attributes:
        nodes: of the workers, host name and Ray's id of the node.
        kind: of device, in lower case; empty on CPUs.
    """

    nodes: list[str]
    kind: str


def demand(workers: WorkersConfig) -> dict[str, float]:
    """What one worker books."""
    gpus = workers.gpus_per_worker or 0
    return {"CPU": RESERVED_SHARE * workers.cpus_per_worker, **({"GPU": gpus} if gpus else {})}


def reserve(workers: WorkersConfig, left_out: Collection[str] = ()) -> Any:
    """Ask for the devices of one attempt; Ray's autoscaler sees it as demand. It returns at once.

    Args:
        workers: that shall have them.
        left_out: ids of nodes that are not used.

    Returns:
        A placement group.
    """
    from ray.util import placement_group

    selector = [{NODE_LABEL: f"!in({','.join(sorted(left_out))})"}] * workers.count if left_out else None
    return placement_group([demand(workers)] * workers.count, strategy="PACK", bundle_label_selector=selector)


def held_on(group: Any) -> list[str] | None:
    """Ids of the nodes where the devices are held; None while some are waited for, or are on a node that goes."""
    from ray.util import placement_group_table

    table = placement_group_table(group)
    if table.get("state") != "CREATED":
        return None
    nodes = list(table["bundles_to_node_id"].values())
    return None if reclaimed_nodes() & set(nodes) else nodes


def give_back(group: Any) -> None:
    """End what runs there, and let others have the devices. Twice is as good as once."""
    from ray.util import remove_placement_group

    remove_placement_group(group)


def reclaimed_nodes() -> set[str]:
    """Ids of nodes that are being taken away, or were."""
    import ray
    from ray._private.state import state
    from ray.core.generated.common_pb2 import NodeDeathInfo

    taken = NodeDeathInfo.Reason.Value(RECLAIMED)
    return {node["NodeID"] for node in ray.nodes() if node["DeathReason"] == taken} | set(state.get_draining_nodes())


def able_nodes(workers: WorkersConfig) -> dict[str, int]:
    """Ids of the nodes, alive now, that a worker fits on while nothing else is there; and how many do."""
    import ray

    able = {node["NodeID"]: fit(node["Resources"], workers) for node in ray.nodes() if node["Alive"]}
    return {node: count for node, count in able.items() if count}


def fit(resources: Mapping[str, float], workers: WorkersConfig) -> int:
    """How many workers fit on a node that has so much.

    Example:
        >>> fit({"CPU": 8, "GPU": 4}, WorkersConfig(gpus_per_worker=0.5)), fit({"CPU": 1}, WorkersConfig())
        (8, 1)
    """
    return min(int(resources.get(name, 0) / amount + 1e-9) for name, amount in demand(workers).items())


def devices_on(ids: Sequence[str]) -> Devices:
    """Names of nodes, and the kind of devices that they have."""
    import ray

    known = {node["NodeID"]: node for node in ray.nodes()}
    kinds = [
        name.removeprefix(KIND).lower()
        for node in ids
        for name in known.get(node, {}).get("Resources", {})
        if name.startswith(KIND)
    ]
    names = [f"{known[node]['NodeManagerHostname']} {node}" if node in known else f"? {node}" for node in ids]
    return Devices(names, kinds[0] if kinds else "")


def node_id(name: str) -> str:
    """Ray's id in the name of a node."""
    return name.rpartition(" ")[2]


def take_place(group: Any) -> None:
    """In this process, Ray Train's worker groups are put where `group` is, which stays reserved when they end."""
    from ray.train.v2._internal.execution.worker_group import worker_group
    from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle

    class Held(DefaultPlacementGroupHandle):
        def shutdown(self) -> None:
            """It belongs to whoever reserved it."""

    worker_group.WorkerGroup._create_placement_group = lambda *_: Held(group)
