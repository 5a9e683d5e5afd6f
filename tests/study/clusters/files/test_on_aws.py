"""`ray up` and `ray down` on the AWS file and stack, against moto's AWS; ssh and rsync are programs that write down."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from moto import mock_aws
from moto.ec2.models.instance_types import InstanceTypeBackend

from study import cluster
from study.clusters.files.aws import HEADS, MACHINES

ROOT = Path(__file__).resolve().parents[4]
TEMPLATE = ROOT / "docs" / "aws-stack.yaml"
REGION = "us-west-2"
PUBLIC_IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
"""Moto does not have it."""


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty account, and the folder of somebody who has its keys."""
    folder = tmp_path_factory.mktemp("home")
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text("token")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "HOME": str(folder),
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": REGION,
            "PATH": f"{folder}:{os.environ['PATH']}",
        }.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        # The last argument of ssh is the command; rsync's last two are from where and to where.
        for program, script in {
            "ssh": 'for last; do :; done; printf "%s\\n" "$last" >>"$HOME/commands"',
            "rsync": 'n=$#; eval "from=\\${$((n - 1))} to=\\${$n}"; case $to in *bootstrap_config*) cp "$from" '
            '"$HOME/bootstrap.yaml";; esac; printf "%s\\n" "${to#*:}" >>"$HOME/copied"',
        }.items():
            path = folder / program
            path.write_text(f"#!/bin/bash\n{script}\n")
            path.chmod(path.stat().st_mode | stat.S_IEXEC)
        few = [kind for kind in InstanceTypeBackend.instance_types if kind.name in {**MACHINES, **HEADS}]
        patch.setattr(InstanceTypeBackend, "instance_types", few)  # Ray asks for all, which takes moto long
        patch.chdir(ROOT)
        with mock_aws():
            yield folder


@pytest.fixture(scope="module")
def stack(account: Path) -> dict[str, str]:
    """The outputs of the stack."""
    image = boto3.client("ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    boto3.client("ssm").put_parameter(Name="/test/image", Value=image, Type="String")
    client = boto3.client("cloudformation")
    client.create_stack(
        StackName="paretovl",
        TemplateBody=TEMPLATE.read_text().replace(PUBLIC_IMAGE, "/test/image"),
        Parameters=[
            {"ParameterKey": "Address", "ParameterValue": "203.0.113.7/32"},
            {"ParameterKey": "Zones", "ParameterValue": "us-west-2a,us-west-2b,us-west-2d"},
        ],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    ec2 = boto3.client("ec2")
    subnets = ec2.describe_subnets(Filters=[{"Name": "cidr-block", "Values": ["10.7.*"]}])["Subnets"]
    assert len(subnets) == TEMPLATE.read_text().count("MapPublicIpOnLaunch: true") == 3
    for subnet in subnets:  # moto's stacks leave that out
        ec2.modify_subnet_attribute(SubnetId=subnet["SubnetId"], MapPublicIpOnLaunch={"Value": True})
    (found,) = client.describe_stacks(StackName="paretovl")["Stacks"]
    return {output["OutputKey"]: output["OutputValue"] for output in found["Outputs"]}


@pytest.fixture(scope="module")
def file(account: Path, stack: dict[str, str]) -> Path:
    """The cluster file, from the stack."""
    path = account / "cluster.yaml"
    path.write_text(cluster.text(cluster.parse(["--stack", "paretovl"])))
    return path


def of_cloud(kind: str) -> set[str]:
    """What there is in the account, by id."""
    ec2, iam = boto3.client("ec2"), boto3.client("iam")
    return {
        "security groups": lambda: {group["GroupId"] for group in ec2.describe_security_groups()["SecurityGroups"]},
        "roles": lambda: {role["RoleName"] for role in iam.list_roles()["Roles"]},
        "subnets": lambda: {subnet["SubnetId"] for subnet in ec2.describe_subnets()["Subnets"]},
        "keys": lambda: {key["KeyName"] for key in ec2.describe_key_pairs()["KeyPairs"]},
    }[kind]()


def machines(*states: str) -> list[dict[str, Any]]:
    found = boto3.client("ec2").describe_instances(Filters=[{"Name": "instance-state-name", "Values": list(states)}])
    return [instance for reservation in found["Reservations"] for instance in reservation["Instances"]]


def test_the_template_is_accepted_by_the_linter() -> None:
    from cfnlint.api import lint

    assert [str(match) for match in lint(TEMPLATE.read_text(), regions=[REGION])] == []


def test_the_stack_opens_nothing_but_ssh_to_one_address(stack: dict[str, str]) -> None:
    (group,) = boto3.client("ec2").describe_security_groups(GroupIds=[stack["SecurityGroup"]])["SecurityGroups"]
    outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule["Ipv6Ranges"]]
    inside = [rule for rule in group["IpPermissions"] if rule not in outside]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in outside] == [(22, 22)]
    assert [[each["CidrIp"] for each in rule["IpRanges"]] for rule in outside] == [["203.0.113.7/32"]]
    assert [[pair["GroupId"] for pair in rule["UserIdGroupPairs"]] for rule in inside] == [[stack["SecurityGroup"]]]


def test_the_file_system_is_reached_from_every_zone(stack: dict[str, str]) -> None:
    targets = boto3.client("efs").describe_mount_targets(FileSystemId=stack["FileSystem"])["MountTargets"]
    assert [target["AvailabilityZoneName"] for target in targets] == stack["Zones"].split(",")
    assert len(set(stack["Zones"].split(","))) == 3


def policies(role: str) -> list[dict[str, Any]]:
    """Statements of all policies of a role."""
    iam = boto3.client("iam")
    found = []
    for attached in iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]:
        version = iam.get_policy(PolicyArn=attached["PolicyArn"])["Policy"]["DefaultVersionId"]
        document = iam.get_policy_version(PolicyArn=attached["PolicyArn"], VersionId=version)["PolicyVersion"][
            "Document"
        ]
        found += (json.loads(document) if isinstance(document, str) else document)["Statement"]
    assert iam.list_role_policies(RoleName=role)["PolicyNames"] == []
    return found


def actions(statements: list[dict[str, Any]]) -> set[str]:
    listed = [statement["Action"] for statement in statements]
    return {action for each in listed for action in ([each] if isinstance(each, str) else each)}


STORAGE = {"s3:ListBucket", "s3:GetBucketLocation", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"}
STORAGE |= {"s3:AbortMultipartUpload"}


def test_workers_may_use_the_bucket_and_nothing_else(stack: dict[str, str]) -> None:
    statements = policies("paretovl-worker")
    assert actions(statements) == STORAGE
    bucket = f"arn:aws:s3:::{stack['BucketName']}"
    assert {statement["Resource"] for statement in statements} == {bucket, f"{bucket}/*"}


def test_the_head_may_give_away_the_workers_role_alone(stack: dict[str, str]) -> None:
    statements = policies("paretovl-head")
    (give,) = [statement for statement in statements if statement["Action"] == "iam:PassRole"]
    assert give["Resource"].endswith(":role/paretovl-worker")
    assert give["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    for statement in statements:
        if "ec2:TerminateInstances" in statement["Action"]:
            assert statement["Condition"] == {"StringEquals": {"aws:ResourceTag/ray-cluster-name": "paretovl"}}
    everything = [statement for statement in statements if statement["Resource"] == "*"]
    assert [statement["Action"] for statement in everything] == ["ec2:DescribeInstances"]


@pytest.fixture(scope="module")
def up(account: Path, file: Path) -> dict[str, set[str]]:
    """A cluster that is up, and what there was before."""
    from ray.autoscaler._private.commands import create_or_update_cluster

    before = {kind: of_cloud(kind) for kind in ("security groups", "roles", "subnets")}
    create_or_update_cluster(str(file), None, None, no_restart=True, restart_only=False, yes=True, no_config_cache=True)
    return before


@pytest.fixture(scope="module")
def bootstrapped(account: Path, up: object) -> dict[str, Any]:
    """What `ray up` copied to the head for its autoscaler."""
    return dict(yaml.safe_load((account / "bootstrap.yaml").read_text()))


def test_up_starts_one_head_as_the_file_says(up: dict[str, set[str]], stack: dict[str, str]) -> None:
    (head,) = machines("pending", "running")
    assert head["InstanceType"] == "m6i.2xlarge"
    assert "InstanceLifecycle" not in head, "on demand"
    assert head["ImageId"] == stack["Image"]
    assert head["IamInstanceProfile"]["Arn"].endswith("/paretovl-head")
    assert [group["GroupId"] for group in head["SecurityGroups"]] == [stack["SecurityGroup"]]
    assert head["Placement"]["AvailabilityZone"] == stack["Zones"].split(",")[0]
    assert head["MetadataOptions"]["HttpTokens"] == "required"
    assert head["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    assert {kind: of_cloud(kind) for kind in up} == up, "Ray made none of its own"


def test_the_head_is_set_up_in_order(account: Path, up: object, file: Path) -> None:
    commands = (account / "commands").read_text()
    config = yaml.safe_load(file.read_text())
    order = [*config["initialization_commands"], *config["setup_commands"], *config["head_start_ray_commands"]]
    marks = [
        "nfs-common",
        "mkfs.ext4",
        "chown",
        "mount -t nfs4",
        "install -d",
        "uv==",
        "uv sync",
        "ray[default]",
        "ln -sf",
    ]
    marks += ["--autoscaling-config", "-m study.clusters.nodes.autoscaler"]
    places = [commands.index(mark) for mark in marks]
    assert places == sorted(places)
    assert len(order) == len(marks) + 2, "and what may run from before is ended"
    copied = (account / "copied").read_text()
    assert "/home/ubuntu/paretovl/study/" in copied
    assert ".ray/auth_token" in copied
    assert ".venv" not in copied


def provider_of(config: dict[str, Any]) -> Any:
    """What the autoscaler of the head speaks to the cloud through."""
    from ray.autoscaler._private.providers import _get_node_provider

    return _get_node_provider(config["provider"], config["cluster_name"])


def launch(config: dict[str, Any], kind: str, provider: Any) -> list[str]:
    from ray.autoscaler.tags import (
        TAG_RAY_LAUNCH_CONFIG,
        TAG_RAY_NODE_KIND,
        TAG_RAY_NODE_STATUS,
        TAG_RAY_USER_NODE_TYPE,
    )

    tags = {
        TAG_RAY_NODE_KIND: "worker",
        TAG_RAY_USER_NODE_TYPE: kind,
        TAG_RAY_LAUNCH_CONFIG: "x",
        TAG_RAY_NODE_STATUS: "uninitialized",
    }
    return list(provider.create_node(config["available_node_types"][kind]["node_config"], tags, 1))


def test_workers_are_what_the_file_says_and_the_head_needs_no_right_that_it_lacks(
    bootstrapped: dict[str, Any], stack: dict[str, str]
) -> None:
    provider = provider_of(bootstrapped)
    called = set()
    for resource in (provider.ec2, provider.ec2_fail_fast):
        resource.meta.client.meta.events.register("before-call.ec2", lambda model, **_: called.add(f"ec2:{model.name}"))
    for kind, (machine, spot) in {
        "gpu_spot_2x": ("g6.2xlarge", True),
        "gpu_spot_4x": ("g6.4xlarge", True),
        "gpu_on_demand": ("g6.2xlarge", False),
    }.items():
        (node,) = launch(bootstrapped, kind, provider)
        (found,) = [instance for instance in machines("running") if instance["InstanceId"] == node]
        assert found["InstanceType"] == machine
        assert (found.get("InstanceLifecycle") == "spot") is spot
        assert found["IamInstanceProfile"]["Arn"].endswith("/paretovl-worker")
        assert [group["GroupId"] for group in found["SecurityGroups"]] == [stack["SecurityGroup"]]
    assert node in provider.non_terminated_nodes({})
    provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
    assert {"Key": "ray-cluster-name", "Value": "paretovl"} in found["Tags"], "by which the head's rights go"
    provider.terminate_nodes([node])
    allowed = actions(policies("paretovl-head")) - STORAGE - {"iam:PassRole"}
    assert called == allowed


def test_all_zones_are_tried_before_a_type_is_given_up(bootstrapped: dict[str, Any], stack: dict[str, str]) -> None:
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    provider = provider_of(bootstrapped)
    tried = []

    def no_capacity(params: dict[str, Any], **_: object) -> None:
        tried.append(params["body"]["SubnetId"])
        told = {"Error": {"Code": "InsufficientInstanceCapacity", "Message": "none"}}
        raise ClientError(told, "RunInstances")

    events = provider.ec2_fail_fast.meta.client.meta.events
    events.register("before-call.ec2.RunInstances", no_capacity)
    with pytest.raises(NodeLaunchException) as refused:
        launch(bootstrapped, "gpu_spot_2x", provider)
    events.unregister("before-call.ec2.RunInstances", no_capacity)  # Ray keeps its clients
    assert refused.value.category == "InsufficientInstanceCapacity", "what the autoscaler takes the next type for"
    subnets = boto3.client("ec2").describe_subnets(SubnetIds=sorted(set(tried)))["Subnets"]
    assert sorted(subnet["AvailabilityZone"] for subnet in subnets) == stack["Zones"].split(",")


def test_down_leaves_nothing(file: Path, up: dict[str, set[str]], bootstrapped: dict[str, Any]) -> None:
    from ray.autoscaler._private.commands import teardown_cluster

    launch(bootstrapped, "gpu_spot_2x", provider_of(bootstrapped))
    assert len(machines("running")) >= 2
    teardown_cluster(str(file), True, False, None, False)
    assert machines("pending", "running", "stopping", "stopped") == []
    volumes = boto3.client("ec2").describe_volumes()["Volumes"]
    assert [volume["VolumeId"] for volume in volumes if volume["State"] == "in-use"] == []
    assert {kind: of_cloud(kind) for kind in up} == up
    assert of_cloud("keys") == {f"ray-autoscaler_{REGION}"}, "which the next one uses again"
