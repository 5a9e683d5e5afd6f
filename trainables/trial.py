"""One trial: as a function for Ray Tune that launches a Ray Train job, and alone on one YAML file.

`python -m trainables.trial config.yaml` prints the measurements as JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from trainables.caveats import evaluation_caveats, foreseen
from trainables.cli.command import config_parser, exit_on_input_error, read_config
from trainables.config import TrialConfig, not_of_the_family
from trainables.errors import InputError
from trainables.execution.checkpoints import RunFolder
from trainables.execution.local_ray import ray_folder
from trainables.execution.places import absolute, family_in, open_named
from trainables.execution.signals import held_back, stopped_by_signals
from trainables.execution.worker import Patience
from trainables.results import Attempt, Caveat, Outcome, given_up

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


LOOK_SECONDS = 0.2
"""How often to look whether devices have come."""


def run_trial(config: TrialConfig, patience: Patience) -> Outcome:
    """Run the trial until it ends, going on from its last checkpoint if it has run before.

    What the trial itself does wrong ends it at once, with the reason. A lost worker or node is tried again from the
    last checkpoint; waiting for devices has no limit.

    Args:
        config: `storage_path` and `key` name the run: the same pair finds the same checkpoints.
        patience: with it.
    """
    from trainables.execution.attempt import attempt
    from trainables.execution.reserved import give_back, held_on, reserve

    lost: list[str] = []
    seconds = 0.0
    while True:
        group = reserve(config.workers)
        try:
            while held_on(group) is None:
                time.sleep(LOOK_SECONDS)
            ended, outcome = attempt(config, patience, group, None, [])
        finally:
            give_back(group)
        seconds += ended.device_seconds
        if outcome is not None:
            held = outcome.result and outcome.result.model_copy(update={"device_seconds": seconds})
            return outcome.model_copy(update={"result": held})
        if ended.cause == "infrastructure":
            lost.append(ended.reason)
            if len(lost) > patience.retries:
                return given_up(lost)


def tune_trial(config: dict[str, Any]) -> None:
    """The Ray Tune trainable: one attempt. Reports its nodes, what the workers report, and last how it ended.

    Only this thread reports. Ray's own `TuneReportCallback` reports from a second one, and where the last report of the
    workers meets that of the end, each waits for the other for ever.
    """
    import ray
    from ray import PlacementGroupID, tune
    from ray.util.placement_group import PlacementGroup
    from ray.util.queue import Queue

    from trainables.execution.attempt import attempt
    from trainables.execution.reserved import NODE_LABEL

    trial, patience = TrialConfig.model_validate(config["trial"]), Patience.model_validate(config["patience"])
    group = PlacementGroup(PlacementGroupID(bytes.fromhex(config["place"])))
    here = ray.get_runtime_context().get_node_id()
    reports = Queue(actor_options={"num_cpus": 0, "label_selector": {NODE_LABEL: here}})
    ended: list[tuple[Attempt, Outcome | None] | BaseException] = []
    nodes: list[str] = []

    def run() -> None:
        try:
            ended.append(attempt(trial, patience, group, reports, nodes))
        except BaseException as error:
            ended.append(error)
        reports.put(None)

    threading.Thread(target=run, name="train", daemon=True).start()
    while (report := reports.get()) is not None:
        if "nodes" in report:
            nodes[:] = report["nodes"]
            report["home"] = here
        tune.report(report)
    (end,) = ended
    if isinstance(end, BaseException):
        raise end
    tune.report(closing(*end))


def closing(ended: Attempt, outcome: Outcome | None) -> dict[str, Any]:
    """The last report of an attempt."""
    return {"attempt": ended.model_dump_json(), "outcome": outcome and outcome.model_dump_json()}


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
        outcome = run_trial(config, Patience())
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
