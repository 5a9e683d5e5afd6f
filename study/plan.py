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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from study.arguments import Arguments as StudyArguments
from study.arguments import parse
from study.config import COST, Objective, StudyConfig
from study.costs.budget import Limit, Usage, known_money, limits, reached
from study.costs.calibration import calibrate
from study.costs.cost_model import DEVICES, trial_memory, trial_work
from study.costs.page import PHASES, Growth, Plan, page, simulations
from study.costs.shapes import shape_of
from trainables.cli.command import exit_on_input_error
from trainables.cli.passwords import hide_passwords
from trainables.config import Point, TrialConfig
from trainables.errors import InputError

LAUNCH_SECONDS = 3.0
"""Of a trial, outside of loading, attack, training and evaluation; measured on two busy cores."""
GPUS = 8
"""Where nothing else is said: those of `cluster.yaml`."""


class Arguments(StudyArguments):
    """Say what a study will take on a device, with the arithmetic. Nothing is run."""

    model_config = SettingsConfigDict(cli_prog_name="python -m study.plan")
    common_fields = (
        *(
            "preset",
            "device",
            "devices",
            "measure",
            "as_json",
            "config",
            "data.root",
            "trial.model.base",
            "data.image_pixels",
        ),
        *("trial.training.epochs", "trial.training.batch_size", "protocol.gallery_images", "budget.trials"),
        *("budget.wall_hours", "price.device_hour", "trial.workers.count"),
    )
    example_commands = (
        "python -m study.plan --preset coco_clip_b16 --data.root DIR --device a100-80g",
        "python -m study.plan --preset coco_albef --device l4 --price.device-hour l4=1",
        "python -m study.plan --preset coco_clip_b16 --device h100 --measure",
    )

    device: Literal["a100-80g", "h100", "l4", "cpu"] = Field("cpu", description="kind of device trials would run on")
    devices: int | None = Field(None, ge=1, description="how many; empty: 8 GPUs or all cores, or what a trial needs")
    measure: bool = Field(False, description="calibrate by half a minute on the device at hand, with random weights")
    as_json: bool = Field(False, description="for programs")


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


def run_through(
    durations: Sequence[float], slots: int, held_each: float, device: str, limits_at: Callable[[Usage], list[Limit]]
) -> Run:
    """Run the trials on a virtual clock, in order, as many at once as there are slots.

    Args:
        durations: wall seconds of each trial.
        slots: trials at once.
        held_each: devices that a trial holds.
        device: their kind.
        limits_at: the budget's limits at some usage; no trial starts once one is reached.
    """
    running: list[float] = []
    wall = held = 0.0
    ended = 0
    limit = None

    def used() -> Usage:
        return Usage(ended, len(durations), wall, {device: held}, [])

    for seconds in durations:
        if len(running) == slots:
            wall = heapq.heappop(running)
            ended += 1
        limit = reached(limits_at(used()))
        if limit is not None:
            break
        heapq.heappush(running, wall + seconds)
        held += held_each * seconds
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


def loaded_once(trials: Iterable[Mapping[str, float]]) -> list[dict[str, float]]:
    """The trials by phase; the original's embeddings are kept, so the first that needs them makes them for all."""
    found: list[dict[str, float]] = []
    for by_phase in trials:
        made = any(earlier["load"] for earlier in found)
        found.append({**by_phase, "load": 0.0 if made else by_phase["load"]})
    return found


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
    from study.front.dominance import cost_of, front_mask
    from study.front.hypervolume import hypervolume_history
    from study.ledger.ledger import Ledger

    if not trials:
        return []
    workers, k = config.trial.workers.count * config.trial.workers.share, config.protocol.recall_at[0]
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
    for seed in range(simulations(trials)):
        surrogate, clock = Surrogate(seed=seed), Clock()

        def course(trial: TrialConfig, surrogate: Surrogate = surrogate) -> Course:
            drawn = surrogate.course(trial)
            scale = seconds_of(trial.point) * workers / surrogate.seconds(trial.point, trial.training.epochs)[-1]
            reports = [replace(report, device_seconds=scale * report.device_seconds) for report in drawn.reports]
            return replace(drawn, reports=reports, broken_after=scale * drawn.broken_after)

        ledger = Ledger(study, None, "plan", clock, optuna.samplers.RandomSampler(seed=seed))
        ended = list(simulate(ledger, template, course, slots, clock))
        history = hypervolume_history(ended, objectives)
        costs = np.array([cost_of(one, objectives) if one.state == "complete" else [np.nan] * 2 for one in ended])
        fronts = [int(front_mask(costs[:count]).sum()) for count in quarters]
        found = zip((history[count - 1] for count in quarters), fronts, strict=True)
        rows.append([(wall / 3600, held / 3600, size, share) for (wall, _, held, share), size in found])
    return [
        Growth(
            trials=count,
            wall_hours=wall,
            device_hours=held,
            money=known_money(config.price, {config.device: 3600 * held}, 3600 * wall),
            front=size,
            hypervolume=share,
        )
        for count, (wall, held, size, share) in zip(quarters, np.mean(rows, axis=0).tolist(), strict=True)
    ]


def plan(config: Arguments) -> Plan:
    """Foresee a study.

    Raises:
        InputError: the model's shape or the device's price is not known, or no trial fits the devices.
    """
    workers, training, device = config.trial.workers, config.trial.training, DEVICES[config.device]
    usual = os.cpu_count() or 1 if config.device == "cpu" else GPUS
    devices = config.devices or max(usual, workers.count)
    if config.device != "cpu" and workers.gpus_per_worker == 0:
        raise InputError(f"trial.workers.gpus_per_worker 0 computes on CPUs, device is {config.device}; leave one out")
    if not (slots := workers.side_by_side(devices)):
        raise InputError(
            f"devices {devices}: a trial needs {workers.count * workers.share:g}; give as many, or lower "
            "trial.workers.count"
        )
    slots = min(config.cluster.concurrency or sys.maxsize, slots)
    shape = shape_of(config)
    found = calibrate(config, shape, device, config.device != "cpu") if config.measure else None

    def planned(point: Point) -> dict[str, float]:
        return trial_work(shape, point, training, config.protocol, workers.count).seconds(
            device, workers.count, workers.share
        )

    def phases_of(point: Point) -> dict[str, float]:
        return planned(point) if found is None else found.corrected(planned(point))

    def further(point: Point) -> float:
        """Seconds of its trial, once the original's embeddings are there."""
        return sum(seconds for phase, seconds in phases_of(point).items() if phase != "load") + LAUNCH_SECONDS

    drawn = points(config)
    flops = loaded_once(trial_work(shape, point, training, config.protocol, workers.count).flops for point in drawn)
    sheet, seconds = (loaded_once(map(by_phase, drawn)) for by_phase in (planned, phases_of))
    durations = [sum(by_phase.values()) + LAUNCH_SECONDS for by_phase in seconds]
    bounds = partial(limits, config.budget, config.price)
    run = run_through(durations, slots, workers.count * workers.share, config.device, bounds)
    ran = max(1, run.trials)

    def means(trials: list[dict[str, float]]) -> dict[str, float]:
        return {phase: sum(by_phase[phase] for by_phase in trials[:ran]) / ran for phase in PHASES}

    mean_seconds = means(seconds)
    pairs = training.epochs * shape.train_images
    wall, held = run.wall_seconds / 3600, run.device_seconds / 3600
    return Plan(
        study=config.name,
        device=config.device,
        devices=devices,
        workers=workers.count,
        trials_at_once=slots,
        trials=run.trials,
        ended_by=str(run.ended_by),
        wall_hours=wall,
        device_hours=held,
        money=known_money(config.price, {config.device: run.device_seconds}, run.wall_seconds),
        currency=config.price.currency,
        memory_bytes=trial_memory(shape, training, workers.count, workers.sharded),
        device_memory_bytes=device.memory * workers.share,
        image_gflops=shape.image.flops / 1e9,
        text_gflops=shape.text.flops / 1e9,
        fusion_gflops=shape.fusion.flops / 1e9 if shape.fusion else 0.0,
        parameters=shape.parameters,
        pairs=pairs,
        batch_size=training.batch_size,
        phase_gflops={phase: value / 1e9 for phase, value in means(flops).items()},
        phase_seconds=mean_seconds,
        step_seconds=(mean_seconds["attack"] + mean_seconds["train"]) * training.batch_size / pairs,
        launch_seconds=LAUNCH_SECONDS,
        sheet_seconds=means(sheet),
        measured=found,
        growth=growth(config, run.trials, slots, further),
    )


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
    hide_passwords()
    sys.exit(main())
