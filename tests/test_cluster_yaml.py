"""`cluster.yaml`: what Ray's own launcher and autoscaler make of it, and the rules Ray does not check."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from pydantic import BaseModel

from study.arguments import PRESETS
from study.config import StudyConfig
from study.paths import StudyPaths

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

PROJECT = "/home/ubuntu/paretovl"
VENV = "/home/ubuntu/venv"
UV = "/home/ubuntu/uv"

TRIAL = {"CPU": 0.1, "trial_driver": 0.01}
WORKER = {"CPU": 0.9, "GPU": 1.0}

Demand = dict[str, float]


class RayLauncher:
    """All use of Ray's private API: how `ray up` reads the file, and what the autoscaler then decides."""

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
        busy_workers: int = 0,
        idle_minutes: Sequence[float] = (),
    ) -> tuple[dict[str, int], int, int]:
        """One step of the autoscaler beside a running head.

        Args:
            demand: Resources of each task or bundle that waits.
            head_free: What is free on the head; None for all of it.
            busy_workers: GPU nodes that run with nothing free.
            idle_minutes: For each further GPU node, how long it has had nothing to do.

        Returns:
            Nodes to launch by type, the number of demands no node may take, and of nodes to terminate.
        """
        from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
        from ray.autoscaler.v2.utils import ResourceRequestUtil

        instances = [self._instance(self.config["head_node_type"], "head", head_free, 0)]
        instances += [self._instance("gpu_spot", f"busy-{i}", {}, 0) for i in range(busy_workers)]
        instances += [self._instance("gpu_spot", f"idle-{i}", None, m) for i, m in enumerate(idle_minutes)]
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
            )
        )
        launched = {request.instance_type: request.count for request in reply.to_launch}
        return launched, len(reply.infeasible_resource_requests), len(reply.to_terminate)


@pytest.fixture(scope="module")
def ray_launcher() -> RayLauncher:
    return RayLauncher(TEXT)


@pytest.fixture(scope="module")
def config(ray_launcher: RayLauncher) -> dict[str, Any]:
    """The file as `ray up` sees it, with Ray's defaults for AWS filled in."""
    return ray_launcher.config


@pytest.fixture(scope="module")
def commands(config: dict[str, Any]) -> list[str]:
    """Every command that any node runs."""
    return [command for key, value in config.items() if key.endswith("_commands") for command in value]


@pytest.fixture(scope="module")
def usage() -> dict[str, list[str]]:
    """The command lines of the head comment, as the shell splits them."""
    lines = [shlex.split(line) for line in re.findall(r"^#   (ray .+)$", TEXT, re.M)]
    assert [line[:3] for line in lines] == [["ray", verb, "cluster.yaml"] for verb in ("up", "exec", "exec", "down")]
    return {"submit": shlex.split(lines[1][3]), "mlflow": shlex.split(lines[2][-1]), "exec": lines[2]}


def mount_point(config: dict[str, Any]) -> tuple[str, str]:
    """The address of the shared file system and the folder it is mounted on."""
    found = re.findall(r"mount -t nfs4 -o \S+ (\S+):/ ([^\s)]+)", " ".join(config["initialization_commands"]))
    ((address, folder),) = found
    return address, folder


def option(words: Sequence[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_head_is_on_demand_and_workers_are_spot_from_zero(config: dict[str, Any]) -> None:
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["max_workers"] == 0
    assert "GPU" not in head["resources"]
    assert types
    for node in types.values():
        assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert node["min_workers"] == 0
        assert 0 < node["max_workers"] <= config["max_workers"]
        assert "trial_driver" not in node["resources"]


def test_costs_of_trials_are_comparable(config: dict[str, Any]) -> None:
    kinds = {
        n["node_config"]["InstanceType"] for n in config["available_node_types"].values() if "GPU" in n["resources"]
    }
    assert len(kinds) == 1


@pytest.mark.parametrize("trials", [1, 8])
def test_waiting_gpu_workers_launch_spot_nodes(ray_launcher: RayLauncher, trials: int) -> None:
    assert ray_launcher.decide([WORKER] * trials) == ({"gpu_spot": trials}, 0, 0)


def test_never_more_nodes_than_max_workers(ray_launcher: RayLauncher, config: dict[str, Any]) -> None:
    most = config["max_workers"]
    assert ray_launcher.decide([WORKER] * 50) == ({"gpu_spot": most}, 50 - most, 0)
    assert ray_launcher.decide([WORKER] * 50, busy_workers=most - 1) == ({"gpu_spot": 1}, 49, 0)
    assert ray_launcher.decide([WORKER] * 50, busy_workers=most) == ({}, 50, 0)


def test_trial_functions_run_on_the_head_or_nowhere(ray_launcher: RayLauncher) -> None:
    assert ray_launcher.decide([TRIAL] * 50) == ({}, 0, 0)
    assert ray_launcher.decide([TRIAL] * 3, head_free={"CPU": 8}) == ({}, 3, 0)


def test_cpu_work_launches_no_gpu_node(ray_launcher: RayLauncher, config: dict[str, Any]) -> None:
    head_cpus = config["available_node_types"]["head"]["resources"]["CPU"]
    assert ray_launcher.decide([{"CPU": 1.0}] * head_cpus) == ({}, 0, 0)
    mixed = [WORKER, {"CPU": 1.0}, TRIAL]
    assert ray_launcher.decide(mixed) == ({"gpu_spot": 1}, 0, 0)


def test_a_node_outlives_the_gap_between_trials_but_not_the_study(ray_launcher: RayLauncher) -> None:
    assert ray_launcher.decide(idle_minutes=[5, 5]) == ({}, 0, 0)
    assert ray_launcher.decide(idle_minutes=[60, 60]) == ({}, 0, 2)


def test_commands_are_valid_shell(commands: list[str]) -> None:
    assert commands
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_every_node_gets_the_same_pinned_environment(config: dict[str, Any]) -> None:
    assert config["head_setup_commands"] == config["worker_setup_commands"]
    get_uv, sync, extras, link = config["setup_commands"]
    assert re.fullmatch(rf"python3 -m venv {UV} && {UV}/bin/pip install -q uv==\d+\.\d+\.\d+", get_uv)
    # Both run in the project folder, where uv finds exclude-newer.
    assert "exclude-newer" in PYPROJECT["tool"]["uv"]
    assert sync.startswith(f"cd {PROJECT} && UV_PROJECT_ENVIRONMENT={VENV} {UV}/bin/uv sync ")
    assert extras.startswith(f"cd {PROJECT} && {UV}/bin/uv pip install -q --python {VENV} ")
    assert f"\"ray[default]==$({VENV}/bin/python -c 'import ray; print(ray.__version__)')\"" in extras
    assert link.split()[-2:] == [f"{VENV}/bin/ray", "/usr/local/bin/ray"]
    python = re.search(r"--python /usr/bin/python(3\.\d+)$", sync)
    assert python
    assert python[1] in SpecifierSet(PYPROJECT["project"]["requires-python"])


def test_the_project_and_only_the_project_is_copied(config: dict[str, Any]) -> None:
    project = PYPROJECT["project"]
    needed = {"pyproject.toml", project["readme"], *project["license-files"]}
    needed |= set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    mounts = {remote: local for remote, local in config["file_mounts"].items() if not local.startswith("~")}
    assert mounts == {f"{PROJECT}/{name}": name for name in needed}
    assert all((ROOT / local).exists() for local in mounts.values())


def test_nothing_is_open_to_the_world(config: dict[str, Any], commands: list[str], usage: dict[str, list[str]]) -> None:
    assert not re.search(r"0\.0\.0\.0|::/0", "\n".join([TEXT, *commands]))
    assert "security_group" not in config["provider"]
    for node in config["available_node_types"].values():
        # A node type without a group of its own gets Ray's, which admits ssh from anywhere.
        assert node["node_config"]["SecurityGroupIds"]
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    (start,) = [c for c in config["head_start_ray_commands"] if " start " in c]
    assert "--dashboard-host=127.0.0.1" in start.split()
    assert "--host" not in usage["mlflow"]


def test_no_secrets_and_no_ids_of_an_account() -> None:
    assert not re.search(r"AKIA|PRIVATE KEY|secret|password|credential", TEXT, re.I)
    assert not re.search(r"[A-Za-z0-9+]{24,}", TEXT)
    assert not re.search(r"\b(ami|sg|fs|subnet|vpc)-[0-9a-f]{8,}|\b\d{12}\b", TEXT)
    assert re.findall(r"\w+-FILL-IN", TEXT) == ["ami-FILL-IN", "sg-FILL-IN", "fs-FILL-IN"]
    assert len(re.findall(r"# FILL-IN: ", TEXT)) == 3


def test_authentication_is_the_same_everywhere(config: dict[str, Any], usage: dict[str, list[str]]) -> None:
    starts = [c for key in ("head", "worker") for c in config[f"{key}_start_ray_commands"] if " start " in c]
    assert len(starts) == 2
    environments = [c.split(f"{VENV}/bin/ray start ")[0].split("; ")[-1].split() for c in starts]
    assert environments == [["RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0"]] * 2
    assert usage["submit"][0] == "RAY_AUTH_MODE=token"
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_programs_are_those_of_the_environment(config: dict[str, Any], usage: dict[str, list[str]]) -> None:
    start = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert re.findall(r"(\S*)\bray (?:start|stop)\b", start) == [f"{VENV}/bin/"] * 4
    assert usage["submit"][1:4] == [f"{VENV}/bin/ray", "job", "submit"]
    driver = usage["submit"][usage["submit"].index("--") + 1 :]
    assert driver[:3] == [f"{VENV}/bin/python", "-m", "study.run"]
    assert usage["mlflow"][:2] == [f"{VENV}/bin/mlflow", "ui"]


def test_studies_are_on_the_shared_file_system(config: dict[str, Any], usage: dict[str, list[str]]) -> None:
    address, mount = mount_point(config)
    assert address.endswith(f".efs.{config['provider']['region']}.amazonaws.com")
    studies, data = option(usage["submit"], "--studies-dir"), option(usage["submit"], "--data.root")
    assert Path(studies).parent == Path(data).parent == Path(mount)
    assert f"sudo install -d -o {config['auth']['ssh_user']} {studies} {data}" in config["initialization_commands"]
    assert f"`ray rsync-up cluster.yaml ./coco/ {data}/`" in TEXT
    study = StudyPaths(Path(studies) / option(usage["submit"], "--preset"))
    assert option(usage["mlflow"], "--backend-store-uri") == f"sqlite:///{study.mlflow_database}"
    assert option(usage["exec"], "--port-forward") == "5000"


def test_the_study_is_told_what_the_cluster_can_grow_to(config: dict[str, Any], usage: dict[str, list[str]]) -> None:
    gpus = sum(n["max_workers"] * n["resources"].get("GPU", 0) for n in config["available_node_types"].values())
    gpus_per_trial = int(option(usage["submit"], "--trial.workers.gpus-per-worker"))
    assert int(option(usage["submit"], "--cluster.concurrency")) == gpus // gpus_per_trial
    assert option(usage["submit"], "--cluster.address") == "auto"


def test_the_submit_line_has_only_flags_of_the_study(usage: dict[str, list[str]]) -> None:
    driver = usage["submit"][usage["submit"].index("study.run") + 1 :]
    assert (PRESETS / f"{option(driver, '--preset')}.yaml").exists()
    for flag in driver[::2]:
        model: type[BaseModel] = StudyConfig
        *path, name = flag.removeprefix("--").replace("-", "_").split(".")
        for part in path:
            model = cast(type[BaseModel], model.model_fields[part].annotation)
        assert name in model.model_fields or flag == "--preset", flag
