"""What a plan says, and how a person reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from study.costs.calibration import Calibration
from study.costs.cost_model import DEVICES, GRADIENT_BYTES, Device, Fusion, Shape, Tower, ring_bytes
from trainables.config import Model

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

PHASES = ("load", "attack", "train", "evaluate")
SIMULATIONS, SIMULATED_TRIALS = 5, 2500
"""Studies that the growth of the front is the mean of at most, and their trials together, unless one has more."""


def simulations(trials: int) -> int:
    """How many studies of so many trials the growth of the front is the mean of; long ones differ less."""
    return max(1, min(SIMULATIONS, SIMULATED_TRIALS // max(1, trials)))


class Growth(Model):
    """How far a simulated study is after so many ended trials: means over `simulations` seeds.

    `hypervolume` is the share of the objectives' box, in [0, 1]; `front` a number of points. Money is None where the
    device has no price.
    """

    trials: int
    wall_hours: float
    device_hours: float
    money: float | None
    front: float
    hypervolume: float


class Plan(Model):
    """What is foreseen; what `--as-json` prints. Trial numbers are means over the trials that would run.

    With `--measure`, all seconds are those of the data sheet, corrected by what was measured.
    """

    study: str
    device: str
    devices: int
    workers: int
    trials_at_once: int
    trials: int
    ended_by: str
    wall_hours: float
    device_hours: float
    money: float | None
    currency: str
    memory_bytes: float
    device_memory_bytes: float
    image_gflops: float
    text_gflops: float
    fusion_gflops: float
    parameters: float
    pairs: int
    batch_size: int
    phase_gflops: dict[str, float]
    phase_seconds: dict[str, float]
    step_seconds: float
    launch_seconds: float
    sheet_seconds: dict[str, float]
    measured: Calibration | None
    growth: list[Growth]

    @property
    def trial_seconds(self) -> float:
        """Wall time of one trial."""
        return sum(self.phase_seconds.values()) + self.launch_seconds


def page(found: Plan, shape: Shape) -> Group:
    """What a person reads: the answer, then the arithmetic behind it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    device = DEVICES[found.device]
    cost = (
        f"{found.money:.2f} {found.currency}"
        if found.money is not None
        else (f"no price: give --price.device-hour {found.device}=PRICE")
    )
    fits = (
        "fits"
        if found.memory_bytes < found.device_memory_bytes
        else "too much: a micro-batch, gradient checkpointing, a smaller batch, more of a GPU or more GPUs a trial"
    )
    answer = Table(box=None, pad_edge=False, show_header=False)
    for name, text in (
        ("trials", f"{found.trials}, ended by {found.ended_by}"),
        ("wall time", f"{found.wall_hours:.2f} hours, {found.trials_at_once} trials at once"),
        ("device-hours", f"{found.device_hours:.2f}"),
        ("money", cost),
        ("memory", f"{found.memory_bytes / 1e9:.2f} of {found.device_memory_bytes / 1e9:.3g} GB a worker: {fits}"),
    ):
        answer.add_row(name, text)
    columns = {"seconds": found.phase_seconds, **({"by the data sheet": found.sheet_seconds} if found.measured else {})}
    sums = Table(box=None, pad_edge=False, title="Means over these trials", title_justify="left")
    for name in ("phase", "GFLOPs", *columns):
        sums.add_column(name, justify="left" if name == "phase" else "right")
    for phase in PHASES:
        sums.add_row(phase, f"{found.phase_gflops[phase]:.4g}", *(f"{by[phase]:.3g}" for by in columns.values()))
    sums.add_row("launch", "", *(f"{found.launch_seconds:.3g}" for _ in columns))
    trial = (sum(by.values()) + found.launch_seconds for by in columns.values())
    sums.add_row("trial", f"{sum(found.phase_gflops.values()):.4g}", *(f"{seconds:.3g}" for seconds in trial))
    grown = Table(box=None, pad_edge=False, title="The front, on a simulator", title_justify="left")
    for name in ("trials", "hours", "device-hours", "money", "front", "hypervolume"):
        grown.add_column(name, justify="right")
    for row in found.growth:
        spent = "" if row.money is None else f"{row.money:.2f}"
        hours = f"{row.wall_hours:.2f}", f"{row.device_hours:.2f}"
        grown.add_row(str(row.trials), *hours, spent, f"{row.front:.1f}", f"{row.hypervolume:.3f}")
    studies = simulations(found.trials)
    simulated = (
        f"clean recall and recall under both attacks with points at random, simulated {studies} times, on the average: "
        "of a surrogate fitted to tiny models, so the shape of the growth is foreseen, and not its height"
    )
    fusion = f", fusion {found.fusion_gflops:.4g} a pair{_tower(shape.fusion)}" if shape.fusion else ""
    reached_flops = device.flops * device.utilisation
    notes = (
        f"image forward {found.image_gflops:.4g} GFLOPs{_tower(shape.image)}, text {found.text_gflops:.4g}"
        f"{_tower(shape.text)}{fusion}, {found.parameters / 1e6:.1f} M parameters",
        "training takes 3 forward passes a pair (backward is 2), an attack step on an image 2, a try on a caption 1",
        f"{found.pairs} pairs in batches of {found.batch_size}: {1000 * found.step_seconds:.4g} ms a step",
        f"{found.device}: {device.flops / 1e12:.4g} TFLOPS x {device.utilisation:g} = {reached_flops / 1e12:.4g}, "
        f"{device.bandwidth / 1e9:.4g} GB/s; each phase takes the longer of computing and moving",
        *_exchange(found.workers, shape, device),
        "searched points are drawn at random; trials that are stopped early take less",
    )
    measured: list[Text | Table] = [Text(), _short_trial(found.measured, device)] if found.measured else []
    return Group(
        Text(f"study {found.study} on {found.devices} x {found.device}", style="bold"),
        answer,
        Text(),
        sums,
        *measured,
        Text(),
        grown,
        Text(simulated),
        Text(),
        *(Text(note) for note in notes),
    )


def _short_trial(found: Calibration, device: Device) -> Table:
    """The data sheet beside the device at hand."""
    from rich.table import Table

    steps = f"{found.batch_size} pairs"
    table = Table(box=None, pad_edge=False, title=f"A short trial here, steps of {steps}", title_justify="left")
    for name in ("", "data sheet", "measured"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("matrix products, TFLOPS", f"{device.flops / 1e12:.4g}", f"{found.flops / 1e12:.4g}")
    table.add_row("memory, GB/s", f"{device.bandwidth / 1e9:.4g}", f"{found.bandwidth / 1e9:.4g}")
    for phase, seconds in found.measured.items():
        table.add_row(f"{phase}, seconds", f"{found.planned[phase]:.3g}", f"{seconds:.3g}")
    return table


def _exchange(workers: int, shape: Shape, device: Device) -> list[str]:
    if workers == 1:
        return []
    moved = ring_bytes(shape.parameters * GRADIENT_BYTES, workers) / 1e9
    return [f"each of {workers} workers sends {moved:.3g} GB of gradients a step at {device.link / 1e9:.4g} GB/s"]


def _tower(tower: object) -> str:
    if not isinstance(tower, Tower | Fusion):
        return ""
    return f" ({tower.tokens} tokens x {tower.width} x {tower.layers} layers)"
