"""What machines are and cost, and what a study on them would: for comments that a person reads before paying."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from study.costs.page import Plan
from trainables.errors import InputError

SYSTEM_GB, TRIAL_GB = 4, 0.54
"""What the system and Ray's servers need of a head, and what each running trial holds there; see docs/scale.md."""


@dataclass(frozen=True)
class Machine:
    """A type of machine.

    Attributes:
        name: of the type.
        cpus: virtual ones.
        price: USD an hour, on demand.
        gpus: that it has.
        device: their kind, as `study.plan` names it; empty without GPUs.
    """

    name: str
    cpus: int
    price: float
    gpus: int = 0
    device: str = ""

    @property
    def device_hour(self) -> float:
        """USD an hour of one of its GPUs."""
        return self.price / self.gpus


def of_one_kind(known: Mapping[str, Machine]) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    """A check of names of machines: all are known, and have as many GPUs of the same kind."""

    def checked(names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in known]:
            accepted = ", ".join(known)
            raise ValueError(f"{', '.join(unknown)}: known are {accepted}; for another edit the file that is made")
        if not names:
            raise ValueError("name one at least")
        if len({(known[name].device, known[name].gpus) for name in names}) > 1:
            raise ValueError("one kind and number of GPUs only: cost is in device-seconds, and trials fill whole nodes")
        return names

    return checked


def see_that_it_holds(head: Machine, found: Plan) -> None:
    """See that the head has the memory for the trials at once.

    Args:
        head: with 4 GB a virtual CPU, as those named here have.
        found: the plan of the study.

    Raises:
        InputError: it has not.
    """
    most = int((4 * head.cpus - SYSTEM_GB) / TRIAL_GB)
    if found.trials_at_once > most:
        raise InputError(
            f"head: {head.name} holds {most} trials at once (docs/scale.md), and {found.trials_at_once} would run; "
            "take a larger one, fewer nodes, or a preset whose trials have more GPUs each"
        )


def plan_flags(preset: str, head: Machine, workers: Sequence[Machine], nodes: int) -> list[str]:
    """Of the `study.plan` that says what the preset's study costs at most, on the dearest workers."""
    dearest = max(workers, key=lambda machine: machine.price)
    return [
        *("--preset", preset, "--device", dearest.device, "--devices", str(nodes * dearest.gpus)),
        *("--price.device-hour", f"{dearest.device}={dearest.device_hour:.4g}", "--price.head-hour", f"{head.price}"),
    ]


def cost(preset: str, head: Machine, workers: Sequence[Machine], nodes: int, found: Plan) -> str:
    """What the cluster costs an hour, and what the preset's study costs on it, both at most.

    Args:
        preset: of the study.
        head: that is always there.
        workers: types of one kind of GPU.
        nodes: workers there are at most.
        found: for `plan_flags`.
    """
    most = head.price + nodes * max(machine.price for machine in workers)
    each = " or ".join(f"{machine.price:.2f} ({machine.name})" for machine in workers)
    return f"""\
an hour: the head {head.price:.2f}, each worker that is there {each}; together at most {most:.2f}
the study {preset}: {found.trials} trials on {found.devices} x {found.device} in {found.wall_hours:.1f} hours, \
{found.device_hours:.1f} device-hours: at most {found.money:.0f}
  python -m study.plan {" ".join(plan_flags(preset, head, workers, nodes))}
"""
