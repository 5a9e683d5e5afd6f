"""One trial: as a function for Ray Tune that launches a Ray Train job, and alone on one YAML file.

`python -m trainables.trial config.yaml` prints the measurements as JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainables.caveats import evaluation_caveats, foreseen
from trainables.cli.command import config_parser, exit_on_input_error, read_config
from trainables.config import TrialConfig, not_of_the_family
from trainables.errors import InputError
from trainables.execution.checkpoints import KEPT, RESULT, Checkpoint, CheckpointError, RunFolder
from trainables.execution.local_ray import ray_folder
from trainables.execution.places import absolute, family_in, open_named
from trainables.execution.signals import held_back, stopped_by_signals
from trainables.execution.uploads import TRACE
from trainables.execution.worker import WENT_ON_FROM, Patience, take_marker, worker
from trainables.files import ray_storage
from trainables.results import Caveat, Outcome, TrialResult

if TYPE_CHECKING:
    pass

ENVIRONMENT = {
    # How often Ray looks whether workers are done; its default of 2 s costs seconds a trial.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_USAGE_STATS_ENABLED": "0",
    # `uv run` as the driver must not make every worker resolve the environment again.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUTF8": "1",  # what a library opens without an encoding is read alike, whatever the locale
}
"""Set in the driver before Ray starts, and in every process of a trial."""


RESERVED_SHARE = 0.8
"""Of a worker's cores that Ray books. The rest is for the trial's own process and Ray's helpers, which only wait."""


def _free_place(trial: TrialConfig) -> None:
    """Give back the resources that an earlier attempt's workers held.

    Ray Train's own cleaner asks Ray's dashboard whether the controller is alive; there is none in this installation, so
    what a controller that was killed had reserved would stay reserved as long as Ray runs.
    """
    from ray import PlacementGroupID
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup

    place = take_marker(trial, "place")
    if place is not None and place in placement_group_table():
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(place))))


def run_trial(config: TrialConfig, patience: Patience, callbacks: Sequence[Any]) -> Outcome:
    """Run the trial as a Ray Train job, going on from its last checkpoint if it has run before.

    What the trial itself does wrong ends it at once, with the reason. A lost worker or node is tried again from the
    last checkpoint. A checkpoint that cannot be read is passed over: the one before it is taken, and without one the
    trial begins anew.

    Args:
        config: `storage_path` and `key` name the run: the same pair finds the same checkpoints.
        patience: with it.
        callbacks: for Ray Train's run configuration.
    """
    from ray.train import TrainingFailedError, WorkerGroupError

    if "://" not in config.storage_path:
        config = config.model_copy(update={"storage_path": str(Path(config.storage_path).resolve())})
    run, lost = RunFolder(config), 0
    passed_over: dict[str, str] = {}
    while True:
        _free_place(config)
        passed_over |= run.incomplete()
        trainer = _trainer(config, patience, callbacks, run.begin(passed_over), list(passed_over.values()))
        try:
            checkpoint = trainer.fit().checkpoint
        except WorkerGroupError as error:
            stuck = take_marker(config, "stuck") is not None
            if damaged := _damaged(error.worker_failures):
                passed_over |= damaged
                continue
            if (outcome := _own_fault(error.worker_failures)) is not None:
                return outcome
            lost += 1
            if lost > patience.retries:
                why = f"silent for more than {patience.silent_seconds:g} s" if stuck else _last_line(error)
                return Outcome(state="failed", reason=f"workers lost {lost} times, the last time: {why}")
        except TrainingFailedError as error:
            lost += 1
            if lost > patience.retries:
                return Outcome(state="failed", reason=_last_line(error))
        else:
            with checkpoint.as_directory() as folder:
                text = (Path(folder) / RESULT).read_text(encoding="utf-8")
            run.keep(1)
            return Outcome(state="complete", result=TrialResult.model_validate_json(text))


def _trainer(
    config: TrialConfig,
    patience: Patience,
    callbacks: Sequence[Any],
    checkpoint: Checkpoint | None,
    passed_over: Sequence[str],
) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = config.workers
    gpus = workers.gpus_per_worker or 0
    return TorchTrainer(
        worker,
        train_loop_config={
            "trial": config.model_dump(mode="json"),
            "patience": patience.model_dump(),
            "checkpoint": checkpoint and checkpoint.path,
            "passed_over": passed_over,
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=gpus > 0,
            resources_per_worker={
                "CPU": RESERVED_SHARE * workers.cpus_per_worker,
                **({"GPU": gpus} if gpus else {}),
            },
        ),
        run_config=RunConfig(
            name=config.key,
            **ray_storage(config.storage_path),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=2),
            callbacks=list(callbacks),
        ),
    )


def _damaged(failures: dict[int, Exception]) -> dict[str, str]:
    """Names of checkpoints that workers could not read, and why."""
    found = (failure for failure in failures.values() if type(failure).__name__ == CheckpointError.__name__)
    return {name: str(failure) for failure in found if (name := getattr(failure, WENT_ON_FROM, None)) is not None}


def _own_fault(failures: dict[int, Exception]) -> Outcome | None:
    """The outcome if the trial's own code raised; None if a worker was lost, from which others may have failed too."""
    from ray.exceptions import RayError

    if any(isinstance(failure, RayError) or not hasattr(failure, TRACE) for failure in failures.values()):
        return None
    failure = next(iter(failures.values()))
    name = type(failure).__name__
    reason = f"{name}: {failure}"
    if name in ("Diverged", "OutOfMemoryError", "TooLong"):
        return Outcome(state="infeasible", reason=reason)
    return Outcome(state="failed", reason=reason, trace=getattr(failure, TRACE))


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


def tune_trial(config: dict[str, Any]) -> None:
    """The Ray Tune trainable: reports what the workers report, and the `Outcome` last.

    Only this thread reports. Ray's own `TuneReportCallback` reports from a second one, and where the last report of the
    workers meets that of the outcome, each waits for the other for ever.
    """
    from ray import tune
    from ray.util.queue import Queue

    from trainables.execution.stoppable import Forward

    trial, patience = TrialConfig.model_validate(config["trial"]), Patience.model_validate(config["patience"])
    reports = Queue(actor_options={"num_cpus": 0})
    ended: list[Outcome | BaseException] = []

    def run() -> None:
        try:
            ended.append(run_trial(trial, patience, [Forward(reports)]))
        except BaseException as error:  # such as a lost controller: raised below, so that Tune tries again
            ended.append(error)
        reports.put(None)

    threading.Thread(target=run, name="train", daemon=True).start()
    while (report := reports.get()) is not None:
        tune.report(report)
    (end,) = ended
    if isinstance(end, BaseException):
        raise end
    tune.report({"outcome": end.model_dump_json()})


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    return config_parser("python -m trainables.trial", __doc__)


def main(arguments: Sequence[str]) -> int:
    """Entry point; returns the exit code: 1 without a result, or with one from which nothing can be concluded."""
    path = parser().parse_args(arguments).config
    with exit_on_input_error(), stopped_by_signals("stopped; the same command goes on from the last checkpoint"):
        config = absolute(read_config(path))
        os.environ.update(ENVIRONMENT)
        ray_folder()
        import ray

        from trainables.prepare import prepare

        open_named(config)
        problems = not_of_the_family(family_in(config.model), config.point, config.protocol)
        if problems:
            raise InputError("\n".join(problems))
        prepared = prepare(config, log=lambda line: print(line, file=sys.stderr))
        RunFolder(config).refuse_others(config, prepared.hashes)
        images = len(prepared.dataset.train.image_ids), len(prepared.gallery.pixels)
        for caveat in foreseen(config, *images):
            print(f"warning: {caveat.text}", file=sys.stderr)
        with held_back():
            ray.init(address="local", log_to_driver=False, logging_level="ERROR")
        found = ray.cluster_resources()
        cpus, gpus = float(found.get("CPU", 0)), float(found.get("GPU", 0))
        if config.workers.gpus_per_worker is None:
            workers = config.workers.model_copy(update={"gpus_per_worker": float(gpus > 0)})
            config = config.model_copy(update={"workers": workers})
        if lacking := config.workers.lacking(cpus, gpus):
            raise InputError(f"workers: {lacking}")
        outcome = run_trial(config, Patience(), [])
        print(outcome.model_dump_json(indent=1))
        if outcome.result is None:
            return 1
        caveats = evaluation_caveats(outcome.result, config.protocol)
        if outcome.result.untouched:
            caveats.append(Caveat(text=f"the untouched base model: {outcome.result.untouched}"))
        for caveat in caveats:
            print(f"warning: {caveat.text}", file=sys.stderr)
        return int(any(caveat.void for caveat in caveats))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
