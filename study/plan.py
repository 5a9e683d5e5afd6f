"""`python -m study.plan`: what a study will take, before anything is spent. Takes every flag of `study.run`.

FLOPs and bytes are counted from the model's shapes, seconds follow from the device's data sheet, and the study is run
through on a virtual clock: recipes, then points drawn at random from the space, until the budget ends it. How the front
grows is read from the simulator (`study.execution.simulator`), whose recalls are those of a formula and not of the
study's model.
"""

from __future__ import annotations

import heapq
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from study.arguments import Arguments as StudyArguments
from study.arguments import parse
from study.config import COST, Objective, StudyConfig
from study.costs.budget import Limit, Usage, limits, money, reached
from study.costs.cost_model import DEVICES, Fusion, Shape, Tower, trial_memory, trial_work
from study.costs.shapes import shape_of
from trainables.cli.command import exit_on_input_error
from trainables.config import Model, Point, TrialConfig

if TYPE_CHECKING:
    from rich.console import Group

LAUNCH_SECONDS = 3.0
"""Of a trial, outside of loading, attack, training and evaluation; measured on two busy cores."""
GPUS = 8
"""Where nothing else is said: those of `cluster.yaml`."""
PHASES = ("load", "attack", "train", "evaluate")
SIMULATIONS = 5
"""Studies that the growth of the front is the mean of."""


class Arguments(StudyArguments):
    """Say what a study will take on a device, with the arithmetic. Nothing is run."""

    model_config = SettingsConfigDict(cli_prog_name="python -m study.plan")
    common_fields = (
        *("preset", "device", "devices", "as_json", "config", "data.root", "trial.model.base", "data.image_pixels"),
        *("trial.training.epochs", "trial.training.batch_size", "protocol.gallery_images", "budget.trials"),
        *("budget.wall_hours", "price.device_hour", "trial.workers.count"),
    )
    example_commands = (
        "python -m study.plan --preset coco_clip_b16 --data.root DIR --device a100-80g",
        "python -m study.plan --preset coco_albef --device l4 --price.device-hour l4=1",
    )

    device: Literal["a100-80g", "h100", "l4", "cpu"] = Field("cpu", description="kind of device trials would run on")
    devices: int | None = Field(None, ge=1, description="how many; empty: 8 GPUs, or the cores of this machine")
    as_json: bool = Field(False, description="for programs")


class Growth(Model):
    """How far a simulated study is after so many ended trials: means over `SIMULATIONS` seeds.

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
    """What is foreseen; what `--as-json` prints. Trial numbers are means over the trials that would run."""

    study: str
    device: str
    devices: int
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
    growth: list[Growth]

    @property
    def trial_seconds(self) -> float:
        """Wall time of one trial."""
        return sum(self.phase_seconds.values()) + self.launch_seconds


@dataclass(frozen=True)
class Run:
    """What the virtual clock showed.

    Attributes:
        trials: that ended.
        wall_seconds: of the driver.
        device_seconds: held by all.
        ended_by: the limit that was reached.
    """

    trials: int
    wall_seconds: float
    device_seconds: float
    ended_by: Limit | None


def run_through(durations: Sequence[float], slots: int, workers: int, limits_at: Callable[[Usage], list[Limit]]) -> Run:
    """Run the trials on a virtual clock, in order, as many at once as there are slots.

    Args:
        durations: wall seconds of each trial.
        slots: trials at once.
        workers: devices each of them holds.
        limits_at: the budget's limits at some usage; no trial starts once one is reached.
    """
    running: list[float] = []
    wall = held = 0.0
    ended = 0
    limit = None

    def used() -> Usage:
        return Usage(ended, len(durations), wall, held, [])

    for seconds in durations:
        if len(running) == slots:
            wall = heapq.heappop(running)
            ended += 1
        limit = reached(limits_at(used()))
        if limit is not None:
            break
        heapq.heappush(running, wall + seconds)
        held += workers * seconds
    wall = max(running, default=wall)
    ended += len(running)
    return Run(ended, wall, held, limit or reached(limits_at(used())))


def points(config: StudyConfig) -> list[Point]:
    """Recipes, then points drawn at random from the space: what an uninformed search would run."""
    import optuna

    from search_spaces.recipes import recipe_point
    from search_spaces.space import suggest

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=config.seed))
    recipes = [recipe_point(name, config.protocol.epsilon, config.recipe_temperature) for name in config.recipes]
    return recipes + [Point.model_validate(suggest(config.space, study.ask())) for _ in range(config.budget.trials)]


def growth(config: Arguments, trials: int, slots: int, seconds_of: Callable[[Point], float]) -> list[Growth]:
    """How the front grows on the simulator, at each quarter of the trials, with the study's early stopping.

    It is the front of what the simulator knows: clean recall, and recall under attacks on images and captions. Points
    are drawn at random; a sampler that learns should do better.

    Args:
        config: of the study.
        trials: that end, recipes among them.
        slots: trials at once.
        seconds_of: wall seconds of a point's trial.
    """
    import numpy as np
    import optuna

    from study.execution.simulator import Clock, Course, Surrogate, simulate
    from study.front.dominance import complete_costs, front_mask
    from study.front.hypervolume import hypervolume_history
    from study.ledger.ledger import Ledger

    if not trials:
        return []
    workers, k = config.trial.workers.count, config.protocol.recall_at[0]
    objectives = tuple(Objective(metric=f"{target}/mr_r{k}") for target in ("clean", "both"))
    known = {f"{target}/mr_r{k}" for target in ("clean", "both") for k in config.protocol.recall_at} | {COST}
    searched = config.budget.model_copy(update={"trials": max(0, trials - len(config.recipes))})
    bounds = tuple(constraint for constraint in config.constraints if constraint.metric in known)
    study = config.model_copy(
        update={"budget": searched, "objectives": objectives, "constraints": bounds, "replicates": 0, "points": ()}
    )
    template = TrialConfig(protocol=config.protocol, data=config.data, **dict(config.trial))
    quarters = sorted({math.ceil(trials * share) for share in (0.25, 0.5, 0.75, 1)})
    rows = []
    for seed in range(SIMULATIONS):
        surrogate, clock = Surrogate(seed=seed), Clock()

        def course(trial: TrialConfig, surrogate: Surrogate = surrogate) -> Course:
            drawn = surrogate.course(trial)
            scale = seconds_of(trial.point) * workers / surrogate.seconds(trial.point, trial.training.epochs)[-1]
            reports = [replace(report, device_seconds=scale * report.device_seconds) for report in drawn.reports]
            return replace(drawn, reports=reports, broken_after=scale * drawn.broken_after)

        ledger = Ledger(study, None, "plan", clock, optuna.samplers.RandomSampler(seed=seed))
        ended = list(simulate(ledger, template, course, slots, clock))
        history = hypervolume_history(ended, objectives)
        fronts = [int(front_mask(complete_costs(ended[:count], objectives)).sum()) for count in quarters]
        found = zip((history[count - 1] for count in quarters), fronts, strict=True)
        # A slot of the simulator is one device; a trial holds `workers` of them for a share of that time.
        rows.append([(wall / workers / 3600, held / 3600, size, share) for (wall, _, held, share), size in found])
    priced = config.device in config.price.device_hour
    return [
        Growth(
            trials=count,
            wall_hours=wall,
            device_hours=held,
            money=money(config.price, config.device, held, wall) if priced else None,
            front=size,
            hypervolume=share,
        )
        for count, (wall, held, size, share) in zip(quarters, np.mean(rows, axis=0).tolist(), strict=True)
    ]


def plan(config: Arguments) -> Plan:
    """Foresee a study.

    Raises:
        InputError: the model's shape or the device's price is not known.
    """
    workers, training, device = config.trial.workers.count, config.trial.training, DEVICES[config.device]
    devices = config.devices or (os.cpu_count() or 1 if config.device == "cpu" else GPUS)
    slots = min(config.cluster.concurrency or sys.maxsize, max(1, devices // workers))
    shape = shape_of(config)

    def phases_of(point: Point) -> dict[str, float]:
        work = trial_work(shape, point, training, config.protocol)
        return {phase: value / workers for phase, value in work.seconds(device).items()}

    drawn = points(config)
    works = [trial_work(shape, point, training, config.protocol) for point in drawn]
    seconds = [phases_of(point) for point in drawn]
    durations = [sum(by_phase.values()) + LAUNCH_SECONDS for by_phase in seconds]
    run = run_through(durations, slots, workers, partial(limits, config.budget, config.price, config.device))
    ran = max(1, run.trials)
    mean_seconds = {phase: sum(by_phase[phase] for by_phase in seconds[:ran]) / ran for phase in PHASES}
    pairs = training.epochs * shape.train_images
    wall, held = run.wall_seconds / 3600, run.device_seconds / 3600
    priced = config.device in config.price.device_hour
    return Plan(
        study=config.name,
        device=config.device,
        devices=devices,
        trials_at_once=slots,
        trials=run.trials,
        ended_by=str(run.ended_by),
        wall_hours=wall,
        device_hours=held,
        money=money(config.price, config.device, held, wall) if priced else None,
        currency=config.price.currency,
        memory_bytes=trial_memory(shape, training, workers, config.trial.workers.sharded),
        device_memory_bytes=device.memory,
        image_gflops=shape.image.flops / 1e9,
        text_gflops=shape.text.flops / 1e9,
        fusion_gflops=shape.fusion.flops / 1e9 if shape.fusion else 0.0,
        parameters=shape.parameters,
        pairs=pairs,
        batch_size=training.batch_size,
        phase_gflops={phase: sum(work.flops[phase] for work in works[:ran]) / ran / 1e9 for phase in PHASES},
        phase_seconds=mean_seconds,
        step_seconds=(mean_seconds["attack"] + mean_seconds["train"]) * training.batch_size / pairs,
        launch_seconds=LAUNCH_SECONDS,
        growth=growth(config, run.trials, slots, lambda point: sum(phases_of(point).values()) + LAUNCH_SECONDS),
    )


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
        if found.memory_bytes < device.memory
        else "too much: gradient checkpointing, a smaller batch, more workers"
    )
    answer = Table(box=None, pad_edge=False, show_header=False)
    for name, text in (
        ("trials", f"{found.trials}, ended by {found.ended_by}"),
        ("wall time", f"{found.wall_hours:.2f} hours, {found.trials_at_once} trials at once"),
        ("device-hours", f"{found.device_hours:.2f}"),
        ("money", cost),
        ("memory", f"{found.memory_bytes / 1e9:.2f} of {device.memory / 1e9:.0f} GB a worker: {fits}"),
    ):
        answer.add_row(name, text)
    sums = Table(box=None, pad_edge=False, title="Means over these trials", title_justify="left")
    for name in ("phase", "GFLOPs", "seconds"):
        sums.add_column(name, justify="left" if name == "phase" else "right")
    for phase in PHASES:
        sums.add_row(phase, f"{found.phase_gflops[phase]:.4g}", f"{found.phase_seconds[phase]:.3g}")
    sums.add_row("launch", "", f"{found.launch_seconds:.3g}")
    sums.add_row("trial", f"{sum(found.phase_gflops.values()):.4g}", f"{found.trial_seconds:.3g}")
    grown = Table(box=None, pad_edge=False, title="The front, on a simulator", title_justify="left")
    for name in ("trials", "hours", "device-hours", "money", "front", "hypervolume"):
        grown.add_column(name, justify="right")
    for row in found.growth:
        spent = "" if row.money is None else f"{row.money:.2f}"
        hours = f"{row.wall_hours:.2f}", f"{row.device_hours:.2f}"
        grown.add_row(str(row.trials), *hours, spent, f"{row.front:.1f}", f"{row.hypervolume:.3f}")
    simulated = (
        f"clean recall and recall under both attacks, means of {SIMULATIONS} simulated studies with points at random: "
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
        "searched points are drawn at random; trials that are stopped early take less",
    )
    return Group(
        Text(f"study {found.study} on {found.devices} x {found.device}", style="bold"),
        answer,
        Text(),
        sums,
        Text(),
        grown,
        Text(simulated),
        Text(),
        *(Text(note) for note in notes),
    )


def _tower(tower: object) -> str:
    if not isinstance(tower, Tower | Fusion):
        return ""
    return f" ({tower.tokens} tokens x {tower.width} x {tower.layers} layers)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    with exit_on_input_error():
        config = parse(arguments, Arguments)
        found = plan(config)
        if config.as_json:
            print(found.model_dump_json(indent=1))
            return 0
        from study.execution.display import terminal

        terminal().print(page(found, shape_of(config)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
