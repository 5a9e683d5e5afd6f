"""How `ray up` reads a cluster file, and what its autoscaler decides. All use of Ray's private API for this is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

Demand = dict[str, float]


@dataclass(frozen=True)
class Decision:
    """One step of the autoscaler: nodes to launch by type, demands that no node may take, nodes to terminate."""

    launched: dict[str, int]
    infeasible: int = 0
    terminated: int = 0


class RayLauncher:
    """Of one cluster file."""

    def __init__(self, text: str) -> None:
        from ray.autoscaler._private.util import prepare_config, validate_config
        from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

        self.config: dict[str, Any] = prepare_config(yaml.safe_load(text))
        validate_config(self.config)
        self._autoscaling = AutoscalingConfig(yaml.safe_load(text), skip_content_hash=True)

    def _instance(self, node_type: str, name: str, available: Demand | None, idle_minutes: float) -> Any:
        from ray.autoscaler.v2.schema import AutoscalerInstance
        from ray.core.generated.autoscaler_pb2 import NodeState
        from ray.core.generated.instance_manager_pb2 import Instance, NodeKind

        is_head = node_type == self.config["head_node_type"]
        total = self.config["available_node_types"][node_type]["resources"]
        return AutoscalerInstance(
            cloud_instance_id=name,
            im_instance=Instance(
                instance_id=name,
                instance_type=node_type,
                status=Instance.RAY_RUNNING,
                node_kind=NodeKind.HEAD if is_head else NodeKind.WORKER,
            ),
            ray_node=NodeState(
                node_id=name.encode(),
                total_resources=total,
                available_resources=total if available is None else available,
                idle_duration_ms=int(idle_minutes * 60_000),
            ),
        )

    def decide(
        self,
        demand: Sequence[Demand] = (),
        *,
        head_free: Demand | None = None,
        busy: Sequence[str] = (),
        idle_minutes: Sequence[tuple[str, float]] = (),
        availability: Mapping[str, float] | None = None,
    ) -> Decision:
        """One step of the autoscaler beside a running head.

        Args:
            demand: Resources of each task or bundle that waits.
            head_free: What is free on the head; None for all of it.
            busy: Types of the nodes that run with nothing free.
            idle_minutes: For each further node, its type and how long it has had nothing to do.
            availability: By type, 0 right after all launches were refused to 1 where none was lately.
        """
        from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
        from ray.autoscaler.v2.utils import ResourceRequestUtil

        instances = [self._instance(self.config["head_node_type"], "head", head_free, 0)]
        instances += [self._instance(kind, f"busy-{i}", {}, 0) for i, kind in enumerate(busy)]
        instances += [self._instance(kind, f"idle-{i}", None, m) for i, (kind, m) in enumerate(idle_minutes)]
        reply = ResourceDemandScheduler().schedule(
            SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=self._autoscaling.get_node_type_configs(),
                max_num_nodes=self._autoscaling.get_max_num_nodes(),
                idle_timeout_s=self._autoscaling.get_idle_timeout_s(),
                resource_requests=ResourceRequestUtil.group_by_count(
                    [ResourceRequestUtil.make(resources) for resources in demand]
                ),
                current_instances=instances,
                cloud_resource_availabilities=dict(availability or {}),
                recoverable_resource_availabilities=dict(availability or {}),
            )
        )
        launched = {request.instance_type: request.count for request in reply.to_launch}
        return Decision(launched, len(reply.infeasible_resource_requests), len(reply.to_terminate))
