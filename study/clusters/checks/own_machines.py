"""What would go wrong with a cluster of one's own machines."""

from __future__ import annotations

import re
from collections.abc import Iterator

from study.clusters.checks.parts import Check, Config, Surroundings, starts_of
from study.clusters.files.local import FIRST_AUTOSCALER


def _addresses_are_apart(config: Config, _: Surroundings) -> Iterator[str]:
    provider = config.get("provider") or {}
    addresses = [provider.get("head_ip"), *(provider.get("worker_ips") or ())]
    if twice := sorted({str(each) for each in addresses if addresses.count(each) > 1}):
        yield f"provider: {', '.join(twice)} is named twice; each machine has one address"
    if own := [str(each) for each in addresses if re.match(r"127\.|localhost", str(each))]:
        yield f"provider: {', '.join(own)} is every machine's own; give addresses by which they reach each other"


def _all_machines_join(config: Config, _: Surroundings) -> Iterator[str]:
    workers = (config.get("provider") or {}).get("worker_ips") or ()
    if not all(map(str.strip, map(str, workers))):
        yield "provider.worker_ips: one is empty; give the address of a machine, or take the line out"
    most = config.get("max_workers", len(workers))
    if most < len(workers):
        yield f"max_workers: {most}, and worker_ips has {len(workers)}; the others would never join; take it out"
    for start in starts_of(config, "head"):
        if f"{FIRST_AUTOSCALER}=0" not in start:
            yield f"head_start_ray_commands: no {FIRST_AUTOSCALER}=0, without which the last machine never joins"
    for start in starts_of(config, "worker"):
        if "--include-log-monitor=false" not in start:
            yield "worker_start_ray_commands: no --include-log-monitor=false, and a process stays after `ray down`"


def _head_drives_trials(config: Config, _: Surroundings) -> Iterator[str]:
    for start in starts_of(config, "head"):
        if "trial_driver" not in start:
            yield """head_start_ray_commands: no --resources='{"trial_driver": 64}', so trial processes go anywhere"""


OWN: tuple[Check, ...] = (_addresses_are_apart, _all_machines_join, _head_drives_trials)
