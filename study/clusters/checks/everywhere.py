"""What would go wrong with a cluster file whosever machines they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from packaging.specifiers import SpecifierSet

from study.clusters.checks.parts import Check, Config, Surroundings, commands_of, starts_of
from study.clusters.files.common import AUTHENTICATION, PROJECT_FILES, TOKEN, variables_of


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


def _project_is_whole(config: Config, _: Surroundings) -> Iterator[str]:
    mounted = {str(local).removeprefix("./").rstrip("/") for local in (config.get("file_mounts") or {}).values()}
    if mounted & {*PROJECT_FILES} and (lacking := [name for name in PROJECT_FILES if name not in mounted]):
        yield f"file_mounts: of the project {', '.join(lacking)} would not be copied, and nodes need all of it; add it"


def _user_is_the_homes(config: Config, _: Surroundings) -> Iterator[str]:
    user = (config.get("auth") or {}).get("ssh_user")
    starts = " ".join(start for kind in ("head", "worker") for start in starts_of(config, kind))
    owners = {name or root for name, root in re.findall(r"/(?:home/([^/\s]+)|(root))/", starts)}
    for owner in sorted(owners - {user}):
        if user and user != "root" and not config.get("docker"):
            yield f"auth.ssh_user: {user} logs in, and Ray is in the home of {owner}; make both the same"


def _keys_stay_here(config: Config, here: Surroundings) -> Iterator[str]:
    for there, local in (config.get("file_mounts") or {}).items():
        if (secret := here.secrets.get(str(local))) and "available_node_types" in config:
            yield f"file_mounts.{there}: brings {secret}, a secret, to every node; those have roles of their own"


def _own_key_is_here(config: Config, here: Surroundings) -> Iterator[str]:
    key = (config.get("auth") or {}).get("ssh_private_key")
    if key and key not in here.files:
        yield f"auth.ssh_private_key: {key} is not here; name the key that lets you in, or make it with `ssh-keygen`"


def _ports_agree(config: Config, _: Surroundings) -> Iterator[str]:
    heads = {port for start in starts_of(config, "head") for port in re.findall(r"--port[= ](\d+)", start)} or {"6379"}
    for start in starts_of(config, "worker"):
        for port in re.findall(r"\$\{?RAY_HEAD_IP\}?:(\d+)", start):
            if port not in heads:
                yield f"worker_start_ray_commands: port {port}, and the head listens at {', '.join(sorted(heads))}"


def _files_may_be_open(config: Config, _: Surroundings) -> Iterator[str]:
    for kind in ("head", "worker"):
        for start in starts_of(config, kind):
            if not re.search(r"\bulimit -S?H?n", start) and not config.get("docker"):
                yield f"{kind}_start_ray_commands: no `ulimit -n 65536;` before `ray start`, which needs more than 1024"


def _token_is_shared(config: Config, here: Surroundings) -> Iterator[str]:
    if (config.get("file_mounts") or {}).get(TOKEN) != TOKEN:
        yield f"file_mounts: {TOKEN} is not copied, and nodes without the token cannot join; add `{TOKEN}: {TOKEN}`"
    elif TOKEN not in here.files:
        yield f"{TOKEN}: not here; `ray get-auth-token --generate` makes it"


def _authentication_is_everywhere(config: Config, _: Surroundings) -> Iterator[str]:
    for kind in ("head", "worker"):
        for start in starts_of(config, kind):
            if AUTHENTICATION not in start.split():
                yield f"{kind}_start_ray_commands: no {AUTHENTICATION} before `ray start`; such a node joins no others"


def _dashboard_is_closed(config: Config, _: Surroundings) -> Iterator[str]:
    for start in starts_of(config, "head"):
        if re.search(r"--dashboard-host[= ](0\.0\.0\.0|::)", start):
            yield "head_start_ray_commands: --dashboard-host is open to whoever reaches the head; use 127.0.0.1"


def _versions_agree(config: Config, here: Surroundings) -> Iterator[str]:
    setup = " ".join(commands_of(config, "setup", "head_setup", "worker_setup"))
    for python in sorted(set(re.findall(r"--python \S*?(3\.\d+)", setup))):
        if python not in SpecifierSet(here.pythons):
            yield f"setup_commands: Python {python} on the nodes, and the project runs on {here.pythons}"
    images = " ".join(str(value) for name, value in (config.get("docker") or {}).items() if name.endswith("image"))
    named = (
        re.findall(r"\bray(?:\[\w+\])?==(\d[\w.]*)", setup),
        re.findall(r"rayproject/ray\S*:(\d+\.\d+\.\d+)", images),
    )
    for ray in sorted({version for found in named for version in found}):
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


def _container_sees_them(config: Config, _: Surroundings) -> Iterator[str]:
    if not (docker := config.get("docker")):
        return
    given = variables_of(config)
    for kind in ("head", "worker"):
        options = " ".join(map(str, [*docker.get("run_options", ()), *docker.get(f"{kind}_run_options", ())]))
        mounted = re.findall(r"(?:-v|--volume)[= ]?[^\s:]+:([^\s:]+)", options)
        for place in (given.get("PARETOVL_STUDIES_DIR", ""), given.get("PARETOVL_CACHE_DIR", "")):
            if place.startswith("/") and not any(_below(place, folder) for folder in mounted):
                yield f"docker.{kind}_run_options: {place} is not seen in the container; add `-v FOLDER:FOLDER`"


def _locks_work(config: Config, _: Surroundings) -> Iterator[str]:
    if re.search(r"\bmount -t nfs4? -o \S*\bnolock\b", " ".join(commands_of(config, "initialization", "setup"))):
        yield "initialization_commands: nolock, so two drivers could write the same database; leave it out"


def _mounted(config: Config) -> list[str]:
    prepared = " ".join(commands_of(config, "initialization", "setup"))
    return re.findall(r"\bmount -t \w+ (?:-o \S+ )?\S+:\S+ ([^\s)]+)", prepared)


def _below(place: str, folder: str) -> bool:
    return f"{place}/".startswith(f"{folder.rstrip('/')}/")


EVERYWHERE: tuple[Check, ...] = (
    _left_to_fill_in,
    _tools_are_here,
    _files_are_here,
    _keys_stay_here,
    _own_key_is_here,
    _project_is_whole,
    _user_is_the_homes,
    _token_is_shared,
    _authentication_is_everywhere,
    _ports_agree,
    _files_may_be_open,
    _dashboard_is_closed,
    _versions_agree,
    _autoscaler_is_the_second,
    _studies_are_shared,
    _locks_work,
    _container_sees_them,
)
REACHING: tuple[Check, ...] = (_left_to_fill_in, _tools_are_here, _own_key_is_here)
"""Of these, what keeps this machine from asking any of the cluster's."""
