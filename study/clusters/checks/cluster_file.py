"""What would go wrong with a cluster file, found before anything is paid: pure checks, one message each."""

from __future__ import annotations

from study.clusters.checks.everywhere import EVERYWHERE, REACHING
from study.clusters.checks.launcher_schema import misshapen
from study.clusters.checks.own_machines import OWN
from study.clusters.checks.parts import Config, Surroundings
from study.clusters.checks.rented import RENTED


def problems(config: Config, here: Surroundings) -> list[str]:
    """Everything that is wrong, in the order of the file; of a file that Ray's launcher would not take, why not.

    Args:
        config: the file, parsed.
        here: where it would be used.
    """
    checks = (*EVERYWHERE, *(RENTED if "available_node_types" in config else OWN))
    return list(misshapen(config)) or [problem for check in checks for problem in check(config, here)]


def unreachable(config: Config, here: Surroundings) -> list[str]:
    """Of what is wrong that for which no machine of the cluster can be asked, however long one tries.

    Args:
        config: the file, parsed.
        here: where it would be used.
    """
    return list(misshapen(config)) or [problem for check in REACHING for problem in check(config, here)]
