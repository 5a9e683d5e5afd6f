"""What an AWS account says of a cluster file: open ports, zones without files, quotas. Reads, and changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from study.clusters.checks.parts import Config, is_spot, types_of, workers_of

QUOTAS = {
    True: ("L-3819A6DF", "All G and VT Spot Instance Requests"),
    False: ("L-DB2E81BA", "Running On-Demand G and VT instances"),
}
"""Of vCPUs, by whether machines are spot; for machines with G in their name."""

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
    """Fewer virtual CPUs than all workers have."""
    machines = {
        name: node["node_config"]["InstanceType"]
        for name, node in workers_of(config).items()
        if str(node["node_config"].get("InstanceType")).startswith("g") and node.get("max_workers", 1)
    }
    if not machines:
        return
    described = client("ec2").describe_instance_types(InstanceTypes=sorted(set(machines.values())))["InstanceTypes"]
    cpus = {each["InstanceType"]: each["VCpuInfo"]["DefaultVCpus"] for each in described}
    for spot, (code, quota) in QUOTAS.items():
        needed = [cpus[machine] for name, machine in machines.items() if is_spot(workers_of(config)[name]) is spot]
        if not needed:
            continue
        found = client("service-quotas").get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]
        most = int(config["max_workers"]) * min(needed)
        if found < most:
            nodes = config["max_workers"]
            yield f"{quota}: the quota {code} is {found:g} vCPUs, {nodes} workers need {most}; ask for more"


CHECKS = {
    "the fields of machines": unknown_settings,
    "whether ports are open to the world": open_ports,
    "whether the file system is reached from all zones": zones_without_files,
    "quotas": quotas,
}
