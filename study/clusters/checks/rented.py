"""What would go wrong with a cluster of rented machines, which come and go."""

from __future__ import annotations

import re
from collections.abc import Iterator

from study.clusters.checks.parts import (
    Check,
    Config,
    Surroundings,
    commands_of,
    head_of,
    is_spot,
    machine_of,
    resource,
    starts_of,
    types_of,
    workers_of,
)
from study.clusters.files import aws, gcp
from study.clusters.files.common import variables_of

KNOWN = {**aws.MACHINES, **aws.HEADS, **gcp.MACHINES}
SHORTEST_IDLE_MINUTES, LONGEST_IDLE_MINUTES = 1, 120
"""The gap between two trials, and what two hours of a machine cost."""


def _cloud_types(config: Config, _: Surroundings) -> Iterator[str]:
    head, workers = head_of(config), workers_of(config)
    if not head:
        yield f"head_node_type: {config.get('head_node_type')!r} is none of {', '.join(types_of(config))}"
        return
    if is_spot(head):
        yield "the head is a spot machine, and the study goes with it; take the spot settings out of its node_config"
    if not resource(head, "trial_driver"):
        yield "the head has no trial_driver among its resources, so trials' own processes run on nodes that go; give 64"
    for name, node in workers.items():
        if resource(node, "trial_driver"):
            yield f"{name}: has trial_driver among its resources, which only the head may have; take it out"
        if node.get("min_workers"):
            yield f"{name}: min_workers {node['min_workers']}, which are paid without work; set it to 0"
    if not workers:
        yield "available_node_types: none but the head; trials need workers with GPUs"
    elif all(map(is_spot, workers.values())):
        yield "available_node_types: workers are spot only, and without spot a study waits; add an on-demand type"
    each = [node.get("max_workers", config.get("max_workers", 0)) for node in workers.values()]
    if workers and not (config.get("max_workers") and any(each)):
        yield "max_workers: 0, so no worker ever starts"


def _rents_end(config: Config, _: Surroundings) -> Iterator[str]:
    idle = float(config.get("idle_timeout_minutes", 5))
    if not SHORTEST_IDLE_MINUTES <= idle <= LONGEST_IDLE_MINUTES:
        fault = (
            "workers end between two trials" if idle < SHORTEST_IDLE_MINUTES else "workers without work are paid for"
        )
        yield f"idle_timeout_minutes: {idle:g}, so {fault}; take {SHORTEST_IDLE_MINUTES} to {LONGEST_IDLE_MINUTES}"
    if (config["provider"].get("type") == "aws") and config["provider"].get("cache_stopped_nodes", True):
        yield "provider.cache_stopped_nodes: nodes are stopped, not ended, and their disks stay paid; set it to false"


def _spot_comes_first(config: Config, _: Surroundings) -> Iterator[str]:
    workers = workers_of(config)
    lowest = min((node.get("priority") or 0 for node in workers.values() if is_spot(node)), default=None)
    for name, node in workers.items():
        if lowest is not None and not is_spot(node) and (mine := node.get("priority") or 0) >= lowest:
            yield f"{name}: on demand with priority {mine}, and spot has {lowest}; give spot types the higher one"


def _zones_are_of_the_region(config: Config, _: Surroundings) -> Iterator[str]:
    provider = config["provider"]
    if provider.get("type") not in ("aws", "gcp"):
        return
    region, zones = str(provider.get("region") or ""), str(provider.get("availability_zone") or "")
    if not region:
        yield f"provider.region: not given; say where the {'zones are' if zones else 'machines are'}"
        return
    if away := [
        zone for zone in re.split(r"[,\s]+", zones) if zone and not re.match(f"{re.escape(region)}-?[a-z]", zone)
    ]:
        yield f"provider.availability_zone: {', '.join(away)} is not in the region {region}"
    prepared = " ".join(commands_of(config, "initialization", "setup"))
    for place in sorted({*re.findall(r"\.efs\.([\w-]+)\.amazonaws", prepared)} - {region}):
        yield f"initialization_commands: the file system is in {place}, nodes are in {region}"


def _devices_are_of_one_kind(config: Config, _: Surroundings) -> Iterator[str]:
    workers = workers_of(config)
    families: dict[str, list[str]] = {}
    for name, node in workers.items():
        kind = re.split(r"[.-]", machine_of(node))[0]
        families.setdefault(kind.removeprefix("gr").removeprefix("g") or kind, []).append(name)
    if len(families) > 1:
        named = "; ".join(f"{', '.join(names)}" for names in families.values())
        yield f"workers have several kinds of GPU ({named}), whose device-seconds do not compare; keep one kind"
    for kind in ("CPU", "GPU"):
        counts = {name: resource(node, kind) for name, node in workers.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in counts.items())
            yield f"resources.{kind} differ ({told}): Ray chooses by them before priority; give all the smallest"
        elif workers and not any(counts.values()):
            yield f"resources: no {kind} for any worker, so Ray starts none for a trial; say how many each has"


def _machines_have_what_is_said(config: Config, _: Surroundings) -> Iterator[str]:
    for name, node in types_of(config).items():
        if machine := KNOWN.get(machine_of(node)):
            for kind, most in (("CPU", machine.cpus), ("GPU", machine.gpus)):
                if (said := resource(node, kind)) > most:
                    yield f"{name}: resources.{kind} {said}, and {machine.name} has {most}; Ray believes it"
    if head_of(config) and not resource(head_of(config), "CPU"):
        yield "the head has no CPU among its resources, and trials' own processes need a share of one; give its cores"


def _nodes_are_given_up(config: Config, _: Surroundings) -> Iterator[str]:
    given = variables_of(config)
    idle = "RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S"
    if float(given.get(idle, -1)) < 0:
        yield f"head_start_ray_commands: no {idle}=300, so nodes that are no longer needed still start"
    for state, default in (("ALLOCATE", 60), ("RAY_INSTALL", 30)):
        name = f"RAY_AUTOSCALER_RECONCILE_{state}_STATUS_TIMEOUT_S"
        if name not in given:
            yield f"head_start_ray_commands: no {name}=1200, so a node that hangs costs {default} minutes"


def _one_autoscaler_runs(config: Config, _: Surroundings) -> Iterator[str]:
    own = sum(
        bool(re.search(r" -m study\.clusters\.\S*autoscaler\b", each)) for each in commands_of(config, "head_start_ray")
    )
    for start in starts_of(config, "head"):
        if "--autoscaling-config" not in start:
            yield "head_start_ray_commands: no --autoscaling-config at `ray start`, so no worker ever starts"
        rays = "--no-monitor" not in start
        if own and rays:
            yield "head_start_ray_commands: two autoscalers, Ray's and the project's; add --no-monitor to `ray start`"
        elif not own and not rays:
            yield "head_start_ray_commands: --no-monitor and no autoscaler of the project, so no worker ever starts"


def _workers_are_watched(config: Config, _: Surroundings) -> Iterator[str]:
    watched = any("study.clusters.nodes.notices" in command for command in commands_of(config, "worker_start_ray"))
    if not watched and any(map(is_spot, workers_of(config).values())):
        yield "worker_start_ray_commands: nothing reads notices of spot; start study.clusters.nodes.notices after Ray"


def _trials_fit(config: Config, _: Surroundings) -> Iterator[str]:
    given = variables_of(config).get("PARETOVL_CLUSTER__CONCURRENCY")
    most = int(config.get("max_workers") or 0)
    gpus = [resource(node, "GPU") for node in workers_of(config).values()]
    if given and gpus and float(given) > most * max(gpus):
        yield f"PARETOVL_CLUSTER__CONCURRENCY: {given} trials at once, {most} workers have {most * max(gpus):g} GPUs"


def _aws_is_closed(config: Config, _: Surroundings) -> Iterator[str]:
    if config["provider"].get("type") != "aws":
        return
    if "security_group" in config["provider"]:
        yield "provider.security_group: Ray adds rules to it; name a group of your own by SecurityGroupIds instead"
    for name, node in types_of(config).items():
        machine = node.get("node_config") or {}
        if not machine.get("SecurityGroupIds") and not machine.get("NetworkInterfaces"):
            yield f"{name}: no SecurityGroupIds, so Ray makes a group whose port 22 is open to the world"
        if not machine.get("ImageId"):
            yield f"{name}: no ImageId, so Ray takes an image of Ubuntu 18.04; the environment needs 24.04"
        if (machine.get("MetadataOptions") or {}).get("HttpTokens") != "required":
            yield f"{name}: MetadataOptions.HttpTokens is not required, so any request forged on the node gets its keys"
    groups = {
        name: {*(node.get("node_config") or {}).get("SecurityGroupIds", ())} for name, node in types_of(config).items()
    }
    alone = [
        name for name in workers_of(config) if groups[name].isdisjoint(groups.get(str(config["head_node_type"]), ()))
    ]
    if alone and all(groups.values()):
        yield f"{', '.join(alone)}: in no SecurityGroupIds of the head, so they may not reach each other; share one"
    profile = (head_of(config).get("node_config") or {}).get("IamInstanceProfile")
    for name, node in workers_of(config).items():
        if profile and (node.get("node_config") or {}).get("IamInstanceProfile") == profile:
            yield f"{name}: has the head's IamInstanceProfile, so what runs there may start machines; give workers' own"
    if not profile:
        yield "the head has no IamInstanceProfile, so Ray gives it all rights on EC2 and S3"
    elif (name := str(profile.get("Name", ""))).endswith("-head") and name != f"{config.get('cluster_name')}-head":
        yield (
            f"cluster_name: {config.get('cluster_name')}, and the role {name} may only start nodes of "
            f"{name.removesuffix('-head')}; give both the same name"
        )


def _gcp_is_closed(config: Config, _: Surroundings) -> Iterator[str]:
    if config["provider"].get("type") != "gcp":
        return
    if not config["provider"].get("project_id"):
        yield "provider.project_id: not given; say which project pays"
    for name, node in types_of(config).items():
        if not (node.get("node_config") or {}).get("networkInterfaces"):
            yield f"{name}: no networkInterfaces, so it is in a network whose port 22 may be open to the world"


RENTED: tuple[Check, ...] = (
    _cloud_types,
    _spot_comes_first,
    _rents_end,
    _zones_are_of_the_region,
    _devices_are_of_one_kind,
    _machines_have_what_is_said,
    _one_autoscaler_runs,
    _nodes_are_given_up,
    _workers_are_watched,
    _trials_fit,
    _aws_is_closed,
    _gcp_is_closed,
)
