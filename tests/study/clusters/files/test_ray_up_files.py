"""Files for `ray up`: what Ray's own launcher and autoscaler make of them, and the rules Ray does not check."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from study import cluster
from study.arguments import parse
from study.clusters.files.common import variables_of
from study.config import StudyConfig
from study.paths import StudyPaths
from tests.commands import read_command
from tests.study.clusters.files.ray_launcher import Decision, RayLauncher
from tests.study.clusters.files.variants import DATABASE, VARIANTS, rendered
from trainables.errors import InputError
from trainables.files import UrlPath

ROOT = Path(__file__).resolve().parents[4]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

rented = pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("local")], scope="module")
on_aws = pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("aws")], scope="module")

TRIAL = {"CPU": 0.1, "trial_driver": 0.01}
WORKER = {"CPU": 0.8, "GPU": 1.0}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def text(variant: str) -> str:
    return rendered(variant)


@pytest.fixture(scope="module")
def ray_launcher(text: str) -> RayLauncher:
    return RayLauncher(text)


@pytest.fixture(scope="module")
def config(ray_launcher: RayLauncher) -> dict[str, Any]:
    """The file as `ray up` sees it, with Ray's defaults filled in."""
    return ray_launcher.config


@pytest.fixture(scope="module")
def commands(config: dict[str, Any]) -> list[str]:
    """Every command that any node runs."""
    return [command for key, value in config.items() if key.endswith("_commands") for command in value]


@pytest.fixture(scope="module")
def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Node types but the head's; none where machines are named one by one."""
    return {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}


@pytest.fixture(scope="module")
def usage(text: str) -> dict[str, list[str]]:
    """The command lines of the head comment, as the shell splits them, by what they do."""
    lines = [shlex.split(line) for line in re.findall(r"^#   ((?:ray|python -m study\.submit) .+)$", text, re.M)]
    named = {"submit" if line[0] == "python" else line[1]: line for line in lines}
    assert [name for name in named if name != "rsync-up"] == ["up", "submit", "exec", "down"]
    return {**named, "mlflow": shlex.split(named["exec"][-1])}


@pytest.fixture(scope="module")
def submitted(config: dict[str, Any], usage: dict[str, list[str]]) -> StudyConfig:
    """The study of the submit line, with the variables that it finds on the head."""
    flags = usage["submit"][usage["submit"].index("cluster.yaml") + 1 :]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables_of(config).items():
            patch.setenv(name, value)
        patch.setattr(UrlPath, "exists", lambda _: False)  # the bucket is nobody's: no study was begun there
        return parse(flags)


def spot(node: dict[str, Any]) -> bool:
    config = node["node_config"]
    return (config.get("InstanceMarketOptions"), config.get("scheduling", {}).get("provisioningModel")) in (
        ({"MarketType": "spot"}, None),
        (None, "SPOT"),
    )


def option(words: Sequence[str], name: str) -> str:
    return words[words.index(name) + 1]


def home(config: dict[str, Any]) -> str:
    (project,) = [there for there in config["file_mounts"] if there.endswith("/paretovl/study")]
    return project.removesuffix("/paretovl/study")


def test_the_file_of_the_repository_is_the_one_for_aws() -> None:
    assert (ROOT / "cluster.yaml").read_text() == rendered("aws"), "python -m study.cluster > cluster.yaml"


def test_lines_fit_and_usage_is_read_by_ray(text: str) -> None:
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("#   ")]
    assert not long


def test_head_is_never_taken_away_and_alone_drives_trials(config: dict[str, Any], workers: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    if workers:
        assert not spot(head)
        assert head["max_workers"] == 0
        assert "GPU" not in head["resources"]
        assert head["resources"]["trial_driver"] >= 1
        assert not any("trial_driver" in node["resources"] for node in workers.values())
    else:
        (start,) = [c for c in config["head_start_ray_commands"] if " start " in c]
        assert shlex.split(start)[-1] == '--resources={"trial_driver": 64}'
        assert "trial_driver" not in " ".join(config["worker_start_ray_commands"])


@rented
def test_workers_come_from_zero_and_never_beyond_the_limit(
    ray_launcher: RayLauncher, config: dict[str, Any], workers: dict[str, Any]
) -> None:
    most = config["max_workers"]
    first = max(workers, key=lambda name: workers[name]["priority"])
    gpus = workers[first]["resources"]["GPU"]
    assert all(node["min_workers"] == 0 and node["max_workers"] <= most for node in workers.values())
    assert ray_launcher.decide([WORKER]) == Decision({first: 1})
    assert ray_launcher.decide([WORKER] * gpus * most) == Decision({first: most})
    assert ray_launcher.decide([WORKER] * (gpus * most + 5)) == Decision({first: most}, 5)
    assert ray_launcher.decide([WORKER] * 50, busy=[first] * most) == Decision({}, 50)
    assert ray_launcher.decide([WORKER] * gpus * 2, busy=[*workers][-1:] * (most - 1)) == Decision({first: 1}, gpus)


@rented
def test_what_is_refused_as_spot_comes_on_demand(ray_launcher: RayLauncher, workers: dict[str, Any]) -> None:
    order = list(workers)  # as a person reads them
    assert [workers[name]["priority"] for name in order] == list(range(len(order)))[::-1]
    assert [spot(workers[name]) for name in order] == [True] * (len(order) - 1) + [False]
    for place, expected in enumerate(order):
        refused = dict.fromkeys(order[:place], 0.0)
        assert ray_launcher.decide([WORKER], availability=refused) == Decision({expected: 1})
    assert ray_launcher.decide([WORKER], availability=dict.fromkeys(order, 0.5)) == Decision({order[0]: 1})


@rented
def test_the_autoscaler_is_the_one_that_counts_refusals(config: dict[str, Any]) -> None:
    from ray.scripts.scripts import start as ray_start

    _, start, end_of_the_last, autoscaler = config["head_start_ray_commands"]
    assert "--no-monitor" in start.split(), "Ray's own beside it would rent everything twice"
    assert "--no-monitor" in [flag for option in ray_start.params for flag in option.opts]
    _, _, pattern, *_ = shlex.split(end_of_the_last)
    assert re.search(pattern, autoscaler)
    assert not re.search(pattern, end_of_the_last), "it would end itself"
    assert autoscaler.startswith("RAY_AUTH_MODE=token ")
    assert autoscaler.endswith(" </dev/null")
    for flag in ("--autoscaling-config=~/ray_bootstrap_config.yaml", "--gcs-address=", "--logs-dir="):
        assert flag in autoscaler, "Ray's monitor takes it, and a study looks for it"


@rented
def test_costs_of_trials_are_comparable(workers: dict[str, Any]) -> None:
    types = [node["node_config"].get("InstanceType") or node["node_config"]["machineType"] for node in workers.values()]
    assert len({re.split("[.-]", name)[0] for name in types}) <= 1
    assert len({node["resources"]["GPU"] for node in workers.values()}) <= 1


@rented
def test_trial_functions_run_on_the_head_or_nowhere(ray_launcher: RayLauncher, workers: dict[str, Any]) -> None:
    assert ray_launcher.decide([TRIAL] * 50) == Decision({})
    assert ray_launcher.decide([TRIAL] * 3, head_free={"CPU": 8}) == Decision({}, 3)


@rented
def test_cpu_work_launches_no_gpu_node(
    ray_launcher: RayLauncher, config: dict[str, Any], workers: dict[str, Any]
) -> None:
    head_cpus = config["available_node_types"][config["head_node_type"]]["resources"]["CPU"]
    assert ray_launcher.decide([{"CPU": 1.0}] * head_cpus) == Decision({})
    first = max(workers, key=lambda name: workers[name]["priority"])
    assert ray_launcher.decide([WORKER, {"CPU": 1.0}, TRIAL]) == Decision({first: 1})


@rented
def test_a_node_outlives_the_gap_between_trials_but_not_the_study(
    ray_launcher: RayLauncher, workers: dict[str, Any]
) -> None:
    some = next(iter(workers))
    assert ray_launcher.decide(idle_minutes=[(some, 5), (some, 5)]) == Decision({})
    assert ray_launcher.decide(idle_minutes=[(some, 60), (some, 60)]) == Decision({}, 0, 2)


def test_commands_are_valid_shell_in_the_parentheses_that_ray_puts_them_in(commands: list[str]) -> None:
    assert commands
    for command in commands:
        subprocess.run(["bash", "-n", "-c", f"true && ({command})"], check=True)


def test_every_node_gets_the_same_pinned_environment(config: dict[str, Any]) -> None:
    assert config["head_setup_commands"] == config["worker_setup_commands"] == config["setup_commands"]
    there = home(config)
    get_uv, sync, extras, link = config["setup_commands"]
    assert re.fullmatch(rf"python3 -m venv {there}/uv && {there}/uv/bin/pip install -q uv==\d+\.\d+\.\d+", get_uv)
    # Both run in the project folder, where uv finds exclude-newer.
    assert "exclude-newer" in PYPROJECT["tool"]["uv"]
    assert sync.startswith(f"cd {there}/paretovl && UV_PROJECT_ENVIRONMENT={there}/venv {there}/uv/bin/uv sync ")
    assert extras.startswith(f"cd {there}/paretovl && {there}/uv/bin/uv pip install -q --python {there}/venv ")
    assert f"\"ray[default]==$({there}/venv/bin/python -c 'import ray; print(ray.__version__)')\"" in extras
    assert link.split()[-2] == f"{there}/venv/bin/ray"
    python = re.search(r"--python \S*?(3\.\d+)$", sync)
    assert python
    assert python[1] in SpecifierSet(PYPROJECT["project"]["requires-python"])


def test_the_project_and_only_the_project_is_copied(config: dict[str, Any]) -> None:
    project = PYPROJECT["project"]
    needed = {"pyproject.toml", project["readme"], *project["license-files"]}
    needed |= set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    mounts = {remote: local for remote, local in config["file_mounts"].items() if not local.startswith("~")}
    assert mounts == {f"{home(config)}/paretovl/{name}": name for name in needed}
    assert all((ROOT / local).exists() for local in mounts.values())


def test_nothing_is_open_to_the_world(
    text: str, config: dict[str, Any], commands: list[str], usage: dict[str, list[str]]
) -> None:
    assert not re.search(r"0\.0\.0\.0|::/0", "\n".join([text, *commands]))
    (start,) = [c for c in config["head_start_ray_commands"] if " start " in c]
    assert "--dashboard-host=127.0.0.1" in start.split()
    assert "--host" not in usage["mlflow"]


@on_aws
def test_aws_nodes_have_a_group_of_their_own_few_rights_and_keys_that_stay_on_them(config: dict[str, Any]) -> None:
    assert "security_group" not in config["provider"]
    for name, node in config["available_node_types"].items():
        # A node type without a group of its own gets Ray's, which admits ssh from anywhere.
        assert node["node_config"]["SecurityGroupIds"]
        metadata = node["node_config"]["MetadataOptions"]
        assert (metadata["HttpTokens"], metadata["HttpPutResponseHopLimit"]) == ("required", 1)
        role = "head" if name == "head" else "worker"
        assert node["node_config"]["IamInstanceProfile"] == {"Name": f"paretovl-{role}"}
        assert node["node_config"]["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True


def test_no_secrets_and_no_ids_of_an_account(text: str) -> None:
    assert not re.search(r"AKIA|PRIVATE KEY|secret|credential", text, re.I)
    assert not re.search(r"[A-Za-z0-9+]{28,}", text)
    assert not re.search(r"\b(ami|sg|fs|subnet|vpc)-[0-9a-f]{8,}|\b\d{12}\b", text)
    assert len(re.findall(r"# FILL-IN: ", text)) == len(set(re.findall(r"\w+-FILL-IN", text)))


def test_authentication_is_the_same_everywhere(config: dict[str, Any]) -> None:
    starts = [c for key in ("head", "worker") for c in config[f"{key}_start_ray_commands"] if "ray start " in c]
    assert len(starts) == 2
    for start in starts:
        assert start.startswith("ulimit -n 65536; RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 ")
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@rented
def test_nodes_that_do_not_come_are_given_up(config: dict[str, Any], workers: dict[str, Any]) -> None:
    from ray.autoscaler._private import constants

    given = variables_of(config)
    assert constants.RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S == -1, "still needed"
    assert int(given["RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S"]) > 0
    for state in ("ALLOCATE", "RAY_INSTALL"):
        assert 600 <= int(given[f"RAY_AUTOSCALER_RECONCILE_{state}_STATUS_TIMEOUT_S"]) < 1800


def test_programs_are_those_of_the_environment(config: dict[str, Any], usage: dict[str, list[str]]) -> None:
    there = f"{home(config)}/venv/bin"
    start = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert re.findall(r"(\S*)\bray (?:start|stop)\b", start) == [f"{there}/"] * 4
    assert usage["submit"][:5] == ["python", "-m", "study.submit", "--cluster", "cluster.yaml"], "of this machine"
    assert usage["mlflow"][:2] == [f"{there}/mlflow", "ui"]


def test_a_second_up_does_not_end_a_study(usage: dict[str, list[str]]) -> None:
    assert usage["up"] == ["ray", "up", "--no-restart", "cluster.yaml"]


def test_workers_that_may_be_taken_away_are_watched(config: dict[str, Any], workers: dict[str, Any]) -> None:
    watched = [c for c in config["worker_start_ray_commands"] if "study.clusters.nodes.notices" in c]
    assert len(watched) == any(map(spot, workers.values()))
    for command in watched:
        assert command.startswith("RAY_AUTH_MODE=token setsid -f "), "ssh would wait for it"
        assert command.endswith(" </dev/null")
        assert config["worker_start_ray_commands"][-1] == command, "where Ray has made its folder"


def test_studies_and_data_are_where_all_nodes_find_them(
    variant: str, config: dict[str, Any], submitted: StudyConfig, usage: dict[str, list[str]], text: str
) -> None:
    assert submitted.cache_dir is not None
    database = option(usage["mlflow"], "--backend-store-uri")
    assert option(usage["exec"], "--port-forward") == "5000"
    prepared = " ".join(config["initialization_commands"])
    if variant.endswith("-bucket"):
        scheme, sync = {
            "aws": ("s3", "aws s3 sync --only-show-errors"),
            "gcp": ("gs", "gcloud storage rsync --recursive"),
        }[variant.removesuffix("-bucket")]
        assert str(submitted.studies_dir) == f"{scheme}://my-bucket/studies"
        assert submitted.storage == DATABASE
        assert submitted.tracking.uri == database
        assert config["file_mounts"]["~/.pgpass"] == "~/.pgpass"
        assert f"{sync} {scheme}://my-bucket/data {submitted.data.root}" in prepared
        return
    assert database == f"sqlite:///{StudyPaths(submitted.studies_dir / submitted.name).mlflow_database}"
    assert f" ./coco/ {submitted.data.root}/\n" in text
    if config["provider"]["type"] == "local":
        shared = submitted.studies_dir.parent
        assert prepared.startswith(f"test -d {shared} || {{")
        assert f"mkdir -p {submitted.studies_dir} {submitted.data.root}" in prepared
        assert Path(str(submitted.data.root)).parent == shared
        return
    ((address, mount),) = re.findall(r"mount -t nfs4? -o \S+ (\S+):\S+ ([^\s)]+)", prepared)
    if variant.startswith("aws"):
        assert address.endswith(f".efs.{config['provider']['region']}.amazonaws.com")
    assert submitted.studies_dir.parent == Path(str(submitted.data.root)).parent == Path(mount)
    user = config["auth"]["ssh_user"]
    assert (
        f"sudo install -d -o {user} {submitted.studies_dir} {submitted.data.root}" in config["initialization_commands"]
    )


def test_caches_are_on_the_nodes_own_disk(config: dict[str, Any], submitted: StudyConfig) -> None:
    assert not str(submitted.cache_dir).startswith(str(submitted.studies_dir.parent))
    assert str(submitted.cache_dir) in " ".join(config["initialization_commands"])


def test_the_study_is_told_what_the_cluster_can_grow_to(
    config: dict[str, Any], workers: dict[str, Any], submitted: StudyConfig
) -> None:
    assert submitted.cluster.address == "auto"
    if workers:
        gpus = config["max_workers"] * next(iter(workers.values()))["resources"]["GPU"]
        assert submitted.cluster.concurrency == gpus // submitted.trial.workers.count
    else:
        assert submitted.cluster.concurrency is None, "it counts the machines that are there"


@rented
def test_prices_are_those_that_the_plan_gives(text: str, workers: dict[str, Any]) -> None:
    (line,) = re.findall(r"^#   (python -m study\.plan .+)$", text, re.M)
    read_command(line)
    (told,) = re.findall(r"together at most ([\d.]+)$", text, re.M)
    prices = [float(price) for price in re.findall(r"# (?:at most |less than )?([\d.]+) USD an hour", text)]
    assert float(told) == pytest.approx(
        prices[0] + float(text.split("max_workers: ")[1].split()[0]) * max(prices[1:]), abs=0.1
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--provider", "azure"], r"provider 'azure': there are aws"),
        (["--machines", "g6.2xlarge,g6.48xlarge"], r"machines: one kind and number of GPUs only"),
        (["--machines", "p9.huge", "--nodes", "0"], r"(?s)2 mistakes.*nodes.*machines: p9.huge: known are g6.2xlarge"),
        (["--bucket", "mine"], r"bucket and storage go together"),
        (["--preset", "nonsense"], r"preset: there is none of that name; presets are coco_albef"),
        (["--stack", "nowhere", "--region", "us-west-2"], r"stack 'nowhere' in us-west-2"),
    ],
)
def test_mistakes_are_told_at_once(flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(InputError, match=message):
        cluster.text(cluster.parse(flags))
