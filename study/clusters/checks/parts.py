"""Parts of a cluster file, as the checks read them, and where it would be used."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]
"""A file for `ray up`, parsed."""


@dataclass(frozen=True)
class Surroundings:
    """Where the file would be used.

    Attributes:
        ray: version of the Ray that reads it.
        pythons: that the project runs on, such as ">=3.11,<3.14".
        files: those of the file's mounts and keys that are there, as the file names them.
        secrets: those of the file's mounts that are, or hold, keys and passwords; each with one of them.
        programs: of ssh and rsync, those that are there.
        modules: of boto3 and googleapiclient, those that are there.
        variables: of the environment.
    """

    ray: str
    pythons: str
    files: frozenset[str] = frozenset()
    secrets: Mapping[str, str] = field(default_factory=dict)
    programs: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    variables: Mapping[str, str] = field(default_factory=dict)


Check = Callable[[Config, Surroundings], Iterable[str]]
"""What is wrong in one regard, one message each."""


def head_of(config: Config) -> Config:
    """The head's node type."""
    return types_of(config).get(str(config.get("head_node_type")), {})


def workers_of(config: Config) -> dict[str, Config]:
    """The other node types by name."""
    return {name: node for name, node in types_of(config).items() if name != config.get("head_node_type")}


def is_spot(node: Config) -> bool:
    """Whether the cloud may take it away."""
    machine = node.get("node_config") or {}
    market = (machine.get("InstanceMarketOptions") or {}).get("MarketType")
    scheduling = machine.get("scheduling") or {}
    settings = scheduling if isinstance(scheduling, list) else [scheduling]
    return market == "spot" or any(
        each.get("provisioningModel") == "SPOT" or each.get("preemptible") for each in settings
    )


def types_of(config: Config) -> dict[str, Config]:
    """All node types by name."""
    return {name: node or {} for name, node in (config.get("available_node_types") or {}).items()}


def commands_of(config: Config, *keys: str) -> list[str]:
    """Those under `KEY_commands`, of all keys."""
    return [str(command) for key in keys for command in config.get(f"{key}_commands") or ()]


def starts_of(config: Config, kind: str) -> list[str]:
    """The commands that start Ray on the nodes of a kind: head or worker."""
    return [command for command in commands_of(config, f"{kind}_start_ray") if re.search(r"\bray start\b", command)]


def machine_of(node: Config) -> str:
    """Its type as the cloud calls it; empty where the file does not say."""
    machine = node.get("node_config") or {}
    return str(machine.get("InstanceType") or machine.get("machineType") or "")


def resource(node: Config, name: str) -> int:
    """How much of a resource Ray is told that it has."""
    return int((node.get("resources") or {}).get(name) or 0)
