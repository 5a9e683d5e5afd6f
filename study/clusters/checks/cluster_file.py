"""What would go wrong with a cluster file, found before anything is paid: pure checks, one message each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from packaging.specifiers import SpecifierSet

from study.clusters.files.common import AUTHENTICATION, TOKEN, variables_of

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Surroundings:
    """Where the file would be used.

    Attributes:
        ray: version of the Ray that reads it.
        pythons: that the project runs on, such as ">=3.11,<3.14".
        files: those of the file's mounts that are there, as the file names them.
        programs: of ssh and rsync, those that are there.
        modules: of boto3 and googleapiclient, those that are there.
        variables: of the environment.
    """

    ray: str
    pythons: str
    files: frozenset[str] = frozenset()
    programs: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    variables: Mapping[str, str] = field(default_factory=dict)


Check = Callable[[Config, Surroundings], Iterable[str]]


def problems(config: Config, here: Surroundings) -> list[str]:
    """Everything that is wrong, in the order of the file.

    Args:
        config: the file, parsed.
        here: where it would be used.
    """
    checks = (*EVERYWHERE, *(RENTED if "available_node_types" in config else OWN))
    return [problem for check in checks for problem in check(config, here)]


def head_of(config: Config) -> Config:
    """The head's node type."""
    return _types(config).get(str(config.get("head_node_type")), {})


def workers_of(config: Config) -> dict[str, Config]:
    """The other node types by name."""
    return {name: node for name, node in _types(config).items() if name != config.get("head_node_type")}


def is_spot(node: Config) -> bool:
    """Whether the cloud may take it away."""
    machine = node.get("node_config") or {}
    market = (machine.get("InstanceMarketOptions") or {}).get("MarketType")
    scheduling = machine.get("scheduling") or {}
    settings = scheduling if isinstance(scheduling, list) else [scheduling]
    return market == "spot" or any(
        each.get("provisioningModel") == "SPOT" or each.get("preemptible") for each in settings
    )


def _types(config: Config) -> dict[str, Config]:
    return {name: node or {} for name, node in (config.get("available_node_types") or {}).items()}


def _commands(config: Config, *keys: str) -> list[str]:
    return [str(command) for key in keys for command in config.get(f"{key}_commands") or ()]


def _starts(config: Config, kind: str) -> list[str]:
    return [command for command in _commands(config, f"{kind}_start_ray") if re.search(r"\bray start\b", command)]


def _left_to_fill_in(config: Config, _: Surroundings) -> Iterator[str]:
    def found(value: object, path: str) -> Iterator[str]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from found(inner, f"{path}.{key}".lstrip("."))
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                yield from found(inner, f"{path}[{number}]")
        elif "FILL-IN" in str(value):
            yield path

    if left := list(found(config, "")):
        places = ", ".join(left)
        yield f"{places}: still FILL-IN; the comments there say what belongs in, or --stack of study.cluster knows it"


def _tools_are_here(config: Config, here: Surroundings) -> Iterator[str]:
    provider = (config.get("provider") or {}).get("type")
    if lacking := [name for name in ("ssh", "rsync") if name not in here.programs]:
        yield f"{' and '.join(lacking)}: not found on this machine, which Ray's launcher needs; install them"
    module, package = {
        "aws": ("boto3", "boto3"),
        "gcp": ("googleapiclient", "google-api-python-client google-auth-httplib2"),
    }.get(str(provider), ("", ""))
    if module and module not in here.modules:
        yield f"{module}: not found in this environment, which Ray's launcher needs; uv pip install {package}"


def _files_are_here(config: Config, here: Surroundings) -> Iterator[str]:
    for there, local in (config.get("file_mounts") or {}).items():
        if local in (".", "./"):
            yield f"file_mounts.{there}: the whole project, with .venv and .git, is read each time; name its parts"
        elif local not in here.files and local != TOKEN:
            yield f"file_mounts.{there}: {local} is not here; run `ray up` in the project's folder"


def _token_is_shared(config: Config, here: Surroundings) -> Iterator[str]:
    if (config.get("file_mounts") or {}).get(TOKEN) != TOKEN:
        yield f"file_mounts: {TOKEN} is not copied, and nodes without the token cannot join; add `{TOKEN}: {TOKEN}`"
    elif TOKEN not in here.files:
        yield f"{TOKEN}: not here; `ray get-auth-token --generate` makes it"


def _authentication_is_everywhere(config: Config, _: Surroundings) -> Iterator[str]:
    for kind in ("head", "worker"):
        for start in _starts(config, kind):
            if AUTHENTICATION not in start.split():
                yield f"{kind}_start_ray_commands: no {AUTHENTICATION} before `ray start`; such a node joins no others"


def _dashboard_is_closed(config: Config, _: Surroundings) -> Iterator[str]:
    for start in _starts(config, "head"):
        if re.search(r"--dashboard-host[= ](0\.0\.0\.0|::)", start):
            yield "head_start_ray_commands: --dashboard-host is open to whoever reaches the head; use 127.0.0.1"


def _versions_agree(config: Config, here: Surroundings) -> Iterator[str]:
    setup = " ".join(_commands(config, "setup", "head_setup", "worker_setup"))
    for python in sorted(set(re.findall(r"--python \S*?(3\.\d+)", setup))):
        if python not in SpecifierSet(here.pythons):
            yield f"setup_commands: Python {python} on the nodes, and the project runs on {here.pythons}"
    for ray in sorted(set(re.findall(r"\bray(?:\[\w+\])?==(\d[\w.]*)", setup))):
        if ray != here.ray:
            yield f"setup_commands: Ray {ray} on the nodes and {here.ray} here, which do not understand each other"
    if config.get("head_setup_commands") is None and "available_node_types" in config:
        yield "head_setup_commands: not given, so Ray installs into the system's Python; write []"


def _autoscaler_is_the_second(_: Config, here: Surroundings) -> Iterator[str]:
    if here.variables.get("RAY_UP_enable_autoscaler_v2", "1").lower() in ("0", "false"):
        yield "RAY_UP_enable_autoscaler_v2: turned off in this shell, and types have priorities only with it; unset it"


def _studies_are_shared(config: Config, _: Surroundings) -> Iterator[str]:
    given = variables_of(config)
    studies, cache = given.get("PARETOVL_STUDIES_DIR"), given.get("PARETOVL_CACHE_DIR")
    if studies is None:
        yield "head_start_ray_commands: no PARETOVL_STUDIES_DIR, so studies are on the head's disk and end with it"
    elif "://" in studies:
        if "PARETOVL_STORAGE" not in given:
            yield f"head_start_ray_commands: studies in {studies} need a database server; add PARETOVL_STORAGE"
    elif "available_node_types" in config and not any(_below(studies, folder) for folder in _mounted(config)):
        mounted = ", ".join(_mounted(config)) or "nothing"
        yield f"PARETOVL_STUDIES_DIR: {studies} is on no file system that all nodes mount; mounted is {mounted}"
    if cache is None:
        yield "head_start_ray_commands: no PARETOVL_CACHE_DIR, so caches are on the disk with the system"
    elif studies is not None and "://" not in studies and cache.startswith(studies.rpartition("/")[0] + "/"):
        yield f"PARETOVL_CACHE_DIR: {cache} is on the shared file system; caches belong on each node's own disk"


def _mounted(config: Config) -> list[str]:
    prepared = " ".join(_commands(config, "initialization", "setup"))
    return re.findall(r"\bmount -t \w+ (?:-o \S+ )?\S+:\S+ ([^\s)]+)", prepared)


def _below(place: str, folder: str) -> bool:
    return f"{place}/".startswith(f"{folder.rstrip('/')}/")


def _cloud_types(config: Config, _: Surroundings) -> Iterator[str]:
    head, workers = head_of(config), workers_of(config)
    if not head:
        yield f"head_node_type: {config.get('head_node_type')!r} is none of {', '.join(_types(config))}"
        return
    if is_spot(head):
        yield "the head is a spot machine, and the study goes with it; take the spot settings out of its node_config"
    if not (head.get("resources") or {}).get("trial_driver"):
        yield "the head has no trial_driver among its resources, so trials' own processes run on nodes that go; give 64"
    for name, node in workers.items():
        if (node.get("resources") or {}).get("trial_driver"):
            yield f"{name}: has trial_driver among its resources, which only the head may have; take it out"
        if node.get("min_workers"):
            yield f"{name}: min_workers {node['min_workers']}, which are paid without work; set it to 0"
    if not workers:
        yield "available_node_types: none but the head; trials need workers with GPUs"
    elif all(map(is_spot, workers.values())):
        yield "available_node_types: workers are spot only, and without spot a study waits; add an on-demand type"
    if workers and not config.get("max_workers"):
        yield "max_workers: 0, so no worker ever starts"


def _devices_are_of_one_kind(config: Config, _: Surroundings) -> Iterator[str]:
    workers = workers_of(config)
    families: dict[str, list[str]] = {}
    for name, node in workers.items():
        machine = node.get("node_config") or {}
        kind = re.split(r"[.-]", str(machine.get("InstanceType") or machine.get("machineType") or ""))[0]
        families.setdefault(kind.removeprefix("gr").removeprefix("g") or kind, []).append(name)
    if len(families) > 1:
        named = "; ".join(f"{', '.join(names)}" for names in families.values())
        yield f"workers have several kinds of GPU ({named}), whose device-seconds do not compare; keep one kind"
    cpus = {name: (node.get("resources") or {}).get("CPU") for name, node in workers.items()}
    if len(set(cpus.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in cpus.items())
        yield f"resources.CPU differ ({told}): Ray chooses by them before priority; give all types the smallest"


def _nodes_are_given_up(config: Config, _: Surroundings) -> Iterator[str]:
    given = variables_of(config)
    idle = "RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S"
    if float(given.get(idle, -1)) < 0:
        yield f"head_start_ray_commands: no {idle}=300, so nodes that are no longer needed still start"
    for state, default in (("ALLOCATE", 60), ("RAY_INSTALL", 30)):
        name = f"RAY_AUTOSCALER_RECONCILE_{state}_STATUS_TIMEOUT_S"
        if name not in given:
            yield f"head_start_ray_commands: no {name}=1200, so a node that hangs costs {default} minutes"


def _workers_are_watched(config: Config, _: Surroundings) -> Iterator[str]:
    watched = any("study.clusters.nodes.notices" in command for command in _commands(config, "worker_start_ray"))
    if not watched and any(map(is_spot, workers_of(config).values())):
        yield "worker_start_ray_commands: nothing reads notices of spot; start study.clusters.nodes.notices after Ray"


def _trials_fit(config: Config, _: Surroundings) -> Iterator[str]:
    given = variables_of(config).get("PARETOVL_CLUSTER__CONCURRENCY")
    most = int(config.get("max_workers") or 0)
    gpus = [float((node.get("resources") or {}).get("GPU", 0)) for node in workers_of(config).values()]
    if given and gpus and float(given) > most * max(gpus):
        yield f"PARETOVL_CLUSTER__CONCURRENCY: {given} trials at once, {most} workers have {most * max(gpus):g} GPUs"


def _aws_is_closed(config: Config, _: Surroundings) -> Iterator[str]:
    if config["provider"].get("type") != "aws":
        return
    if "security_group" in config["provider"]:
        yield "provider.security_group: Ray adds rules to it; name a group of your own by SecurityGroupIds instead"
    for name, node in _types(config).items():
        machine = node.get("node_config") or {}
        if not machine.get("SecurityGroupIds") and not machine.get("NetworkInterfaces"):
            yield f"{name}: no SecurityGroupIds, so Ray makes a group whose port 22 is open to the world"
        if not machine.get("ImageId"):
            yield f"{name}: no ImageId, so Ray takes an image of Ubuntu 18.04; the environment needs 24.04"
        if (machine.get("MetadataOptions") or {}).get("HttpTokens") != "required":
            yield f"{name}: MetadataOptions.HttpTokens is not required, so any request forged on the node gets its keys"
    profile = (head_of(config).get("node_config") or {}).get("IamInstanceProfile")
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
    for name, node in _types(config).items():
        if not (node.get("node_config") or {}).get("networkInterfaces"):
            yield f"{name}: no networkInterfaces, so it is in a network whose port 22 may be open to the world"


def _addresses_are_apart(config: Config, _: Surroundings) -> Iterator[str]:
    provider = config.get("provider") or {}
    addresses = [provider.get("head_ip"), *(provider.get("worker_ips") or ())]
    if twice := sorted({str(each) for each in addresses if addresses.count(each) > 1}):
        yield f"provider: {', '.join(twice)} is named twice; each machine has one address"
    if own := [str(each) for each in addresses if re.match(r"127\.|localhost", str(each))]:
        yield f"provider: {', '.join(own)} is every machine's own; give addresses by which they reach each other"


def _head_drives_trials(config: Config, _: Surroundings) -> Iterator[str]:
    for start in _starts(config, "head"):
        if "trial_driver" not in start:
            yield """head_start_ray_commands: no --resources='{"trial_driver": 64}', so trial processes go anywhere"""


EVERYWHERE: tuple[Check, ...] = (
    _left_to_fill_in,
    _tools_are_here,
    _files_are_here,
    _token_is_shared,
    _authentication_is_everywhere,
    _dashboard_is_closed,
    _versions_agree,
    _autoscaler_is_the_second,
    _studies_are_shared,
)
RENTED: tuple[Check, ...] = (
    _cloud_types,
    _devices_are_of_one_kind,
    _nodes_are_given_up,
    _workers_are_watched,
    _trials_fit,
    _aws_is_closed,
    _gcp_is_closed,
)
OWN: tuple[Check, ...] = (_addresses_are_apart, _head_drives_trials)
