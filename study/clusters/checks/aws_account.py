"""What an AWS account says of a cluster file: open ports, zones without files, quotas. Reads, and changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from study.clusters.checks.parts import Config, head_of, is_spot, machine_of, types_of, workers_of

QUOTAS = {
    ("g", True): ("L-3819A6DF", "All G and VT Spot Instance Requests"),
    ("g", False): ("L-DB2E81BA", "Running On-Demand G and VT instances"),
    **dict.fromkeys(
        [(family, False) for family in "acdhimrtz"],
        ("L-1216C47A", "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances"),
    ),
}
"""Of vCPUs, by the first letter of machines' names and whether they are spot."""
KNOWS_NOBODY = ("AuthFailure", "InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch")
"""Codes with which AWS answers to keys that are not, or no longer, somebody's."""

OF_RAY = ("SubnetIds",)
"""Settings of machines that Ray takes for itself."""

Client = Callable[[str], Any]
"""Makes boto3's client of a service."""


def open_ports(config: Config, client: Client) -> Iterator[str]:
    """Ports of the nodes' groups that the whole world may reach."""
    nodes = (config.get("available_node_types") or {}).values()
    groups = sorted({group for node in nodes for group in node["node_config"].get("SecurityGroupIds", ())})
    if not groups:
        return
    for group in client("ec2").describe_security_groups(GroupIds=groups)["SecurityGroups"]:
        for rule in group["IpPermissions"]:
            allowed = {each["CidrIp"] for each in rule["IpRanges"]} | {each["CidrIpv6"] for each in rule["Ipv6Ranges"]}
            if {"0.0.0.0/0", "::/0"} & allowed:
                port = rule.get("FromPort", "any")
                yield f"{group['GroupId']}: port {port} is open to the world; allow your address alone"


def unknown_settings(config: Config, client: Client) -> Iterator[str]:
    """Fields of machines that EC2 does not have, or takes otherwise. Nobody is asked: boto3 knows."""
    from botocore.validate import ParamValidator

    shape = client("ec2").meta.service_model.operation_model("RunInstances").input_shape
    for name, node in types_of(config).items():
        given = {field: value for field, value in node["node_config"].items() if field not in OF_RAY}
        found = ParamValidator().validate({**given, "MinCount": 1, "MaxCount": 1}, shape)
        for mistake in found.generate_report().splitlines():
            yield f"{name}: {mistake}"


def zones_without_files(config: Config, client: Client) -> Iterator[str]:
    """Zones in which nodes may start, and cannot mount the file system."""
    prepared = " ".join(map(str, config.get("initialization_commands") or ()))
    zones = str(config["provider"].get("availability_zone") or "").split(",")
    for system in re.findall(r"\b(fs-\w+)\.efs\.", prepared):
        targets = client("efs").describe_mount_targets(FileSystemId=system)["MountTargets"]
        reached = {target["AvailabilityZoneName"] for target in targets}
        if zones == [""]:
            yield f"provider.availability_zone: none given, and {system} is reached from {', '.join(sorted(reached))}"
        elif lacking := [zone for zone in zones if zone.strip() not in reached]:
            yield f"{', '.join(lacking)}: {system} has no mount target there, so nodes fail to start; make one"


def quotas(config: Config, client: Client) -> Iterator[str]:
    """Fewer virtual CPUs than the head and all workers have."""
    count = int(config.get("max_workers", 0))
    workers = [node for node in workers_of(config).values() if node.get("max_workers", 1)]
    nodes = [(head_of(config), 1, "the head needs"), *((node, count, f"{count} workers need") for node in workers)]
    machines = {machine_of(node) for node, *_ in nodes} - {""}
    if not machines:
        return
    described = client("ec2").describe_instance_types(InstanceTypes=sorted(machines))["InstanceTypes"]
    cpus = {each["InstanceType"]: each["VCpuInfo"]["DefaultVCpus"] for each in described}
    needed: dict[tuple[str, str], tuple[int, str]] = {}
    for node, times, who in nodes:
        if quota := QUOTAS.get((machine_of(node)[:1], is_spot(node))):
            asked = times * cpus[machine_of(node)], who
            needed[quota] = min(needed.get(quota, asked), asked)
    for (code, name), (most, who) in needed.items():
        found = client("service-quotas").get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]
        if found < most:
            yield f"{name}: the quota {code} is {found:g} vCPUs, {who} {most}; ask for more"


def knows_nobody(error: Exception) -> bool:
    """Whether AWS, or boto3 before it, says that nobody is asking whom it knows.

    Args:
        error: of boto3.
    """
    code = _code(error)
    return code in KNOWS_NOBODY or "Expired" in code or "SSO" in type(error).__name__ or "Token" in type(error).__name__


def finds_nothing(error: Exception) -> bool:
    """Whether AWS says that something in the file is not there."""
    return _code(error).startswith("Invalid") or "NotFound" in _code(error)


def _code(error: Exception) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


CHECKS = {
    "the fields of machines": unknown_settings,
    "whether ports are open to the world": open_ports,
    "whether the file system is reached from all zones": zones_without_files,
    "quotas": quotas,
}
