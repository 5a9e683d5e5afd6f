"""Each trap of a cluster file is found and told in one message; a file without traps is left alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError

from study import doctor, submit
from study.clusters.checks import aws_account
from study.clusters.checks.cluster_file import problems
from study.clusters.checks.everywhere import EVERYWHERE, _autoscaler_is_the_second, _tools_are_here
from study.clusters.checks.own_machines import OWN
from study.clusters.checks.parts import Surroundings
from study.clusters.checks.rented import RENTED, _gcp_is_closed
from study.clusters.files.common import PROJECT_FILES
from tests.study.clusters.files.variants import VARIANTS, rendered

HERE = Surroundings(
    ray="2.60.0",
    pythons=">=3.11,<3.14",
    files=frozenset(("~/.ray/auth_token", "~/.pgpass", "~/.ssh/id_ed25519", "keys", *PROJECT_FILES)),
    secrets={"keys": "keys/id_rsa"},
    programs=frozenset(["ssh", "rsync"]),
    modules=frozenset(["boto3", "googleapiclient"]),
)


def filled(name: str) -> dict[str, Any]:
    """A file of the project, with everything that is to be filled in."""
    return dict(yaml.safe_load(re.sub(r"(\w+)-FILL-IN", r"\1-0123", rendered(name))))


@pytest.fixture(scope="module")
def aws() -> dict[str, Any]:
    return filled("aws")


@pytest.fixture(scope="module")
def local() -> dict[str, Any]:
    return filled("local")


@pytest.mark.parametrize("name", VARIANTS)
def test_files_of_the_project_have_no_traps_once_they_are_filled_in(name: str) -> None:
    assert problems(filled(name), HERE) == []


def types(config: dict[str, Any]) -> Any:
    return config["available_node_types"]


def workers(config: dict[str, Any]) -> list[Any]:
    return [node for name, node in types(config).items() if name != "head"]


def node(config: dict[str, Any], name: str) -> Any:
    return types(config)[name]["node_config"]


def resources(config: dict[str, Any], **given: int) -> None:
    for each in workers(config):
        each["resources"].update(given)


def initial(config: dict[str, Any]) -> list[str]:
    return list(config["initialization_commands"])


def volumes(*folders: str) -> dict[str, list[str]]:
    return {f"{kind}_run_options": [f"-v {each}:{each}" for each in folders] for kind in ("head", "worker")}


def started(config: dict[str, Any], kind: str, old: str, new: str) -> None:
    commands = config[f"{kind}_start_ray_commands"]
    commands[:] = [re.sub(old, new, command) for command in commands]


def drop(mapping: dict[str, Any], key: str) -> None:
    del mapping[key]


TRAPS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    (r"^provider.tags.max: still FILL-IN", lambda c: c["provider"].update(tags={"max": "ami-FILL-IN"})),
    (r"^file_mounts: ~/.ray/auth_token is not copied", lambda c: drop(c["file_mounts"], "~/.ray/auth_token")),
    (r"^file_mounts./x: the whole project", lambda c: c["file_mounts"].update({"/x": "."})),
    (r"^file_mounts./x: nowhere is not here", lambda c: c["file_mounts"].update({"/x": "nowhere"})),
    (
        r"^worker_start_ray_commands: no RAY_AUTH_MODE",
        lambda c: started(c, "worker", "RAY_AUTH_MODE=token RAY_U", "RAY_U"),
    ),
    (r"^head_start_ray_commands: --dashboard-host is open", lambda c: started(c, "head", r"127\.0\.0\.1", "0.0.0.0")),
    (r"^setup_commands: Python 3.10 on the nodes", lambda c: c["setup_commands"].append("uv sync --python 3.10")),
    (
        r"^setup_commands: Ray 2.50.0 on the nodes",
        lambda c: c["setup_commands"].append("pip install ray[default]==2.50.0"),
    ),
    (r"^head_setup_commands: not given", lambda c: drop(c, "head_setup_commands")),
    (
        r"^head_start_ray_commands: no PARETOVL_STUDIES_DIR",
        lambda c: started(c, "head", r"PARETOVL_STUDIES_DIR=\S+", ""),
    ),
    (
        r"is on no file system that all nodes mount; mounted is /mnt",
        lambda c: started(c, "head", "DIR=/mnt/p", "DIR=/home/p"),
    ),
    (r"need a database server", lambda c: started(c, "head", r"STUDIES_DIR=\S+", "STUDIES_DIR=s3://b/x")),
    (r"^head_start_ray_commands: no PARETOVL_CACHE_DIR", lambda c: started(c, "head", r"PARETOVL_CACHE_DIR=\S+", "")),
    (
        r"^PARETOVL_CACHE_DIR: .* shared",
        lambda c: started(c, "head", r"CACHE_DIR=\S+", "CACHE_DIR=/mnt/paretovl/cache"),
    ),
    (r"^head_node_type: 'boss' is none of head, gpu", lambda c: c.update(head_node_type="boss")),
    (
        r"^the head is a spot machine",
        lambda c: types(c)["head"]["node_config"].update(InstanceMarketOptions={"MarketType": "spot"}),
    ),
    (r"^the head has no trial_driver", lambda c: drop(types(c)["head"]["resources"], "trial_driver")),
    (r"^gpu_spot_2x: has trial_driver", lambda c: types(c)["gpu_spot_2x"]["resources"].update(trial_driver=1)),
    (r"^gpu_spot_2x: min_workers 1", lambda c: types(c)["gpu_spot_2x"].update(min_workers=1)),
    (r"^available_node_types: workers are spot only", lambda c: drop(types(c), "gpu_on_demand")),
    (r"^available_node_types: none but the head", lambda c: [drop(types(c), each) for each in [*types(c)][1:]]),
    (r"^max_workers: 0", lambda c: c.update(max_workers=0)),
    (r"^max_workers: 0", lambda c: [node.update(max_workers=0) for node in workers(c)]),
    (r"^file_mounts./x: brings keys/id_rsa", lambda c: c["file_mounts"].update({"/x": "keys"})),
    (r"^file_mounts: of the project trainables ", lambda c: drop(c["file_mounts"], "/home/ubuntu/paretovl/trainables")),
    (r"^auth.ssh_private_key: /gone is not here", lambda c: c["auth"].update(ssh_private_key="/gone")),
    (r"^auth.ssh_user: me logs in, .* home of ubuntu", lambda c: c["auth"].update(ssh_user="me")),
    (r"^worker_start_ray_commands: port 6380, .* at 6379", lambda c: started(c, "worker", "6379", "6380")),
    (r"^worker_start_ray_commands: no `ulimit", lambda c: started(c, "worker", "ulimit -n 65536; ", "")),
    (r"^setup_commands: Ray 2.9.0", lambda c: c.update(docker={"image": "rayproject/ray:2.9.0", **volumes("/mnt")})),
    (r"^docker.worker_run_options: /mnt/cache", lambda c: c.update(docker={"image": "x", **volumes("/mnt/paretovl")})),
    (
        r"^initialization_commands: nolock",
        lambda c: c.update(initialization_commands=[each.replace("hard", "nolock") for each in initial(c)]),
    ),
    (r"^idle_timeout_minutes: 0.1, so workers end between", lambda c: c.update(idle_timeout_minutes=0.1)),
    (r"^idle_timeout_minutes: 600, so .* are paid", lambda c: c.update(idle_timeout_minutes=600)),
    (r"^provider.cache_stopped_nodes", lambda c: drop(c["provider"], "cache_stopped_nodes")),
    (r"^gpu_on_demand: on demand with priority 9", lambda c: types(c)["gpu_on_demand"].update(priority=9)),
    (r"^gpu_on_demand: on demand with priority 0", lambda c: [drop(node, "priority") for node in workers(c)]),
    (r"^provider.availability_zone: us-east-1a is not", lambda c: c["provider"].update(availability_zone="us-east-1a")),
    (r"^provider.region: not given; say where the zones", lambda c: drop(c["provider"], "region")),
    (
        r"^initialization_commands: the file system is in eu-west-1",
        lambda c: c.update(
            initialization_commands=[each.replace("efs.us-west-2", "efs.eu-west-1") for each in initial(c)]
        ),
    ),
    (r"^gpu_spot_2x: resources.GPU 4, and g6.2xlarge has 1", lambda c: resources(c, GPU=4)),
    (r"^gpu_on_demand: resources.CPU 96, and g6.2xlarge has 8", lambda c: resources(c, CPU=96)),
    (r"^resources: no GPU for any worker", lambda c: resources(c, GPU=0)),
    (r"^resources.GPU differ", lambda c: types(c)["gpu_spot_4x"].update(resources={"CPU": 8, "GPU": 2})),
    (r"^the head has no CPU", lambda c: drop(types(c)["head"]["resources"], "CPU")),
    (r"^head_start_ray_commands: two autoscalers", lambda c: started(c, "head", "--no-monitor", "")),
    (r"^head_start_ray_commands: --no-monitor and no auto", lambda c: started(c, "head", r" -m study\S+", " -m none")),
    (r"no --autoscaling-config at", lambda c: started(c, "head", r"--autoscaling-config=\S+ --no", "--no")),
    (r"^gpu_spot_2x: in no SecurityGroupIds", lambda c: node(c, "gpu_spot_2x").update(SecurityGroupIds=["sg-2"])),
    (
        r"^gpu_spot_2x: has the head's IamInst",
        lambda c: node(c, "gpu_spot_2x").update(IamInstanceProfile=node(c, "head")["IamInstanceProfile"]),
    ),
    (
        r"several kinds of GPU \(gpu_spot_2x",
        lambda c: types(c)["gpu_spot_4x"]["node_config"].update(InstanceType="p4d.24xlarge"),
    ),
    (r"^resources.CPU differ", lambda c: types(c)["gpu_spot_4x"].update(resources={"CPU": 16, "GPU": 1})),
    (r"no RAY_AUTOSCALER_PENDING_NODE_IDLE", lambda c: started(c, "head", r"RAY_AUTOSCALER_PENDING\S+", "")),
    (
        r"no RAY_AUTOSCALER_RECONCILE_ALLOCATE.* 60 minutes",
        lambda c: started(c, "head", r"RAY_AUTOSCALER_RECONCILE_A\S+", ""),
    ),
    (r"^worker_start_ray_commands: nothing reads notices", lambda c: c["worker_start_ray_commands"].pop()),
    (
        r"CONCURRENCY: 9 trials at once, 8 workers have 8 GPUs",
        lambda c: started(c, "head", "PARETOVL_S", "PARETOVL_CLUSTER__CONCURRENCY=9 PARETOVL_S"),
    ),
    (r"^provider.security_group: Ray adds rules", lambda c: c["provider"].update(security_group={"GroupName": "x"})),
    (r"^head: no SecurityGroupIds", lambda c: drop(types(c)["head"]["node_config"], "SecurityGroupIds")),
    (
        r"^head: no ImageId, so Ray takes an image of Ubuntu 18",
        lambda c: drop(types(c)["head"]["node_config"], "ImageId"),
    ),
    (r"^head: MetadataOptions.HttpTokens", lambda c: drop(types(c)["head"]["node_config"], "MetadataOptions")),
    (r"^the head has no IamInstanceProfile", lambda c: drop(types(c)["head"]["node_config"], "IamInstanceProfile")),
    (r"^cluster_name: other, and the role paretovl-head may only", lambda c: c.update(cluster_name="other")),
]


@pytest.mark.parametrize(("message", "trap"), TRAPS, ids=[message for message, _ in TRAPS])
def test_each_trap_is_found_and_told_once(
    message: str, trap: Callable[[dict[str, Any]], Any], aws: dict[str, Any]
) -> None:
    config = json.loads(json.dumps(aws))  # parts that were merged are apart then
    trap(config)
    (found,) = [problem for problem in problems(config, HERE) if re.search(message, problem)]
    assert len(found) < 160


@pytest.mark.parametrize(
    ("message", "trap"),
    [
        (
            r"^provider: 10.0.0.1 is named twice",
            lambda c: c["provider"].update(head_ip="10.0.0.1", worker_ips=["10.0.0.1"]),
        ),
        (r"^provider: localhost is every machine's own", lambda c: c["provider"].update(head_ip="localhost")),
        (r"^max_workers: 0, and worker_ips has 1", lambda c: c.update(max_workers=0)),
        (r"^provider.worker_ips: one is empty", lambda c: c["provider"].update(worker_ips=[""])),
        (r"no RAY_enable_autoscaler_v2=0", lambda c: started(c, "head", "RAY_enable_autoscaler_v2=0", "")),
        (r"no --include-log-monitor=false", lambda c: started(c, "worker", "--include-log-monitor=false", "")),
        (r"no --resources=", lambda c: started(c, "head", "--resources.*", "")),
    ],
)
def test_traps_of_ones_own_machines(message: str, trap: Callable[[dict[str, Any]], Any], local: dict[str, Any]) -> None:
    config = deepcopy(local)
    trap(config)
    (found,) = problems(config, HERE)
    assert re.search(message, found)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("max_workers: is of type str, Ray's launcher takes integer", {"max_workers": "many"}),
        ("available_node_types: is of type list, Ray's launcher takes object", {"available_node_types": [1]}),
        ("file_mounts: is of type list, Ray's launcher takes object", {"file_mounts": ["a"]}),
        ("setup_commands: is of type str, Ray's launcher takes array", {"setup_commands": "true"}),
        ("'type' is a required property", {"provider": {}}),
        ("max_worker: Ray's launcher knows no such field", {"max_worker": 1}),
    ],
)
def test_what_the_launcher_would_not_take_is_all_that_is_told(
    message: str, change: dict[str, Any], aws: dict[str, Any]
) -> None:
    (found,) = problems({**aws, **change}, HERE)
    assert message in found


def test_a_misspelled_field_of_a_node_type(aws: dict[str, Any]) -> None:
    config = deepcopy(aws)
    types(config)["gpu_spot_2x"]["max_worker"] = 1
    (found,) = problems(config, HERE)
    assert found.startswith(
        "available_node_types.gpu_spot_2x.max_worker: Ray's launcher knows no such field; there are"
    )


def test_secrets_are_found_below_a_mount(tmp_path: Path) -> None:
    assert doctor.secret_in(str(tmp_path)) is None
    (tmp_path / "code" / ".git").mkdir(parents=True)
    (tmp_path / "code" / ".git" / "a.pem").touch()
    (tmp_path / "code" / "monkey.py").touch()
    assert doctor.secret_in(str(tmp_path)) is None
    (tmp_path / "code" / ".env").touch()
    assert (
        doctor.secret_in(str(tmp_path)) == doctor.secret_in(str(tmp_path / "code")) == str(tmp_path / "code" / ".env")
    )


def test_traps_of_this_machine(aws: dict[str, Any]) -> None:
    bare = Surroundings(ray="2.60.0", pythons=">=3.11", variables={"RAY_UP_enable_autoscaler_v2": "0"})
    found = "\n".join(problems(aws, bare))
    for message in (
        "ssh and rsync: not found",
        "boto3: not found",
        "~/.ray/auth_token: not here",
        "autoscaler_v2: turned",
    ):
        assert message in found


def test_a_network_of_google_without_rules_of_its_own() -> None:
    config = filled("gcp")
    drop(config["available_node_types"]["head"]["node_config"], "networkInterfaces")
    assert problems(config, HERE) == [
        "head: no networkInterfaces, so it is in a network whose port 22 may be open to the world"
    ]


def test_every_check_has_a_trap(aws: dict[str, Any]) -> None:
    fell: set[Any] = {_tools_are_here, _autoscaler_is_the_second, _gcp_is_closed, *OWN}  # above
    for _, trap in TRAPS:
        config = json.loads(json.dumps(aws))
        trap(config)
        fell |= {check for check in (*EVERYWHERE, *RENTED) if list(check(config, HERE))}
    assert fell == {*EVERYWHERE, *RENTED, *OWN}


class Account:
    """Stands for AWS: open ports, a zone without files, and few virtual CPUs."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.meta = boto3.client(service, region_name="us-west-2").meta

    def describe_security_groups(self, **_: object) -> dict[str, Any]:
        rule = {"FromPort": 22, "IpRanges": [{"CidrIp": "0.0.0.0/0"}], "Ipv6Ranges": []}
        return {"SecurityGroups": [{"GroupId": "sg-1", "IpPermissions": [rule]}]}

    def describe_mount_targets(self, **_: object) -> dict[str, Any]:
        return {"MountTargets": [{"AvailabilityZoneName": f"us-west-2{letter}"} for letter in "ab"]}

    def describe_instance_types(self, **_: object) -> dict[str, Any]:
        sizes = {"g6.2xlarge": 8, "g6.4xlarge": 16, "m6i.2xlarge": 8}
        return {"InstanceTypes": [{"InstanceType": n, "VCpuInfo": {"DefaultVCpus": c}} for n, c in sizes.items()]}

    def get_service_quota(self, QuotaCode: str, **_: object) -> dict[str, Any]:
        return {"Quota": {"Value": {"L-3819A6DF": 64.0, "L-DB2E81BA": 0.0, "L-1216C47A": 5.0}[QuotaCode]}}


def test_misspelled_settings_of_a_machine(aws: dict[str, Any]) -> None:
    config = deepcopy(aws)
    node(config, "gpu_spot_2x").update(InstanceTyp="g6.2xlarge", SecurityGroupIds="sg-1")
    unknown, other = aws_account.unknown_settings(config, Account)
    assert unknown.startswith('gpu_spot_2x: Unknown parameter in input: "InstanceTyp"')
    assert other.startswith("gpu_spot_2x: Invalid type for parameter SecurityGroupIds, value: sg-1")


def test_what_the_account_says(aws: dict[str, Any]) -> None:
    found = [problem for check in aws_account.CHECKS.values() for problem in check(aws, Account)]
    assert found == [
        "sg-1: port 22 is open to the world; allow your address alone",
        "us-west-2c: fs-0123 has no mount target there, so nodes fail to start; make one",
        "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances: the quota L-1216C47A is 5 vCPUs, the head "
        "needs 8; ask for more",
        "Running On-Demand G and VT instances: the quota L-DB2E81BA is 0 vCPUs, 8 workers need 64; ask for more",
    ]


def test_the_command_tells_what_it_could_not_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    file = Path(__file__).resolve().parents[4] / "cluster.yaml"
    assert doctor.main(["--cluster", str(file)]) == 2
    told = capsys.readouterr().out.splitlines()
    assert re.search(r"^wrong: .*ImageId.*SecurityGroupIds.*initialization_commands.*: still FILL-IN", told[0])
    assert "wrong: AWS: there are no keys of an account here, without which nothing starts; `aws configure`" in told
    assert not [line for line in told if line.startswith("not checked: ")]
    assert told[-1].endswith("to mend before `ray up`")
    (tmp_path / "no.yaml").write_text("name: study\n")
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--cluster", str(tmp_path / "no.yaml")])
    assert stopped.value.code == 2
    assert "has no provider, so it is no file for `ray up`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; the command that should have written it failed, so run that again"),
        ("#!/bin/bash\n#SBATCH --nodes=2\n", "is a script, as for Slurm, and no file for `ray up`; sbatch "),
        ("kind: RayJob\n", "is a RayJob, and no file for `ray up`; kubectl replace --force -f "),
        ("provider: aws\n", "has no provider, so it is no file for `ray up`; study.cluster writes one"),
    ],
)
@pytest.mark.parametrize("command", [doctor, submit])
def test_another_kind_of_file_is_told_with_what_to_do(
    command: Any, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--cluster", str(tmp_path / "file")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "nobody", "nothing"),
    [
        ("ExpiredToken", True, False),
        ("AuthFailure", True, False),
        ("UnrecognizedClientException", True, False),
        ("InvalidInstanceType", False, True),
        ("FileSystemNotFound", False, True),
        ("InvalidGroup.NotFound", False, True),
        ("AccessDenied", False, False),
        ("RequestLimitExceeded", False, False),
    ],
)
def test_what_aws_refuses_is_wrong_where_it_would_refuse_the_cluster(code: str, nobody: bool, nothing: bool) -> None:
    error = ClientError({"Error": {"Code": code, "Message": "it says why"}}, "DescribeInstances")
    assert aws_account.knows_nobody(error) is nobody
    assert aws_account.finds_nothing(error) is nothing
