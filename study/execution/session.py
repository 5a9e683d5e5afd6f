"""One session of a study: a Ray cluster, a Tune run over the ledger, a display and the MLflow projection.

Everything here can be thrown away; what counts is in the ledger, the manifests and the checkpoints.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from study.config import StudyConfig
from study.costs.budget import Limit, Usage, device_kind, ended_by, limits, reached
from study.execution.admission import Admission, at_once, needed
from study.execution.cluster import Growth, growth, shut_down_ray, speaks_grpc
from study.execution.display import Display, front_table
from study.execution.failures import AlikeFailures
from study.execution.fork_server import ForkServer
from study.execution.preparation import prepare_on_cluster
from study.front.caveats import study_caveats
from study.front.estimates import FrontEntry, Members, front
from study.front.hypervolume import History, Row
from study.ledger.lease import Lease
from study.ledger.ledger import Ledger
from study.ledger.trials import point_of
from study.records import Event, Manifest, TrialRecord
from study.search.samplers import reason
from study.tracking.background import Background
from study.tracking.mlflow_store import TrackingError
from study.tracking.projection import Final, Projection, ui_command
from trainables.config import TrialConfig
from trainables.errors import Away, InputError, counted
from trainables.execution.checkpoints import RunFolder
from trainables.execution.local_ray import ray_folder
from trainables.execution.signals import RESUMABLE, held_back, ignore_signals, stopped_code
from trainables.execution.worker import Patience
from trainables.files import ray_storage, remove_tree
from trainables.trial import ENVIRONMENT, tune_trial

DONE, FAILED = 0, 1
"""Exit codes: done; done without a result (no trial is complete, or nothing can be concluded), or stopped by a bug.
(2: unusable input; those of a study that was stopped are in `trainables.execution.signals`.)"""

LOCAL_ENVIRONMENT = {
    "RAY_maximum_startup_concurrency": "16",  # forks are cheap; Ray's default is one start per core
    # The first workers wait for the imports. If they take longer than this, Ray waits for ever; its default is 60 s.
    "RAY_worker_register_timeout_seconds": "900",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started",  # a trial needs a few that only wait
}
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune would return as if nothing had happened
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # its snapshots are not used
    "TUNE_MAX_PENDING_TRIALS_PG": "16",  # a trial is handed out when its devices are held: those that are, at once
    # It would warn that a trial waits, and fails where there is none: before the first devices come.
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "inf",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S_AUTOSCALER": "inf",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of tasks that fail alike, one is told
}
TRIAL_CPUS = 0.01
"""Reserved by a trial's own process, which only waits for its workers."""
TRIAL_DRIVER = 0.01
"""The same, of the nodes that are there for them."""


def told_by_tune_alone(record: logging.LogRecord) -> bool:
    """Whether nobody else tells what Tune logs: a disk or database that fails ends the study with one message."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, OSError | InputError | StorageInternalError | SQLAlchemyError)


class Session:
    """Args:
    config: of the study.
    ledger: opened and reconciled.
    template: what all trials share.
    lease: held while the session lasts.

    Raises:
        InputError: the tracking server cannot be used.
    """

    def __init__(self, config: StudyConfig, ledger: Ledger, template: TrialConfig, lease: Lease) -> None:
        self._config, self._ledger, self._template, self._paths = config, ledger, template, config.paths
        self._lease, self._device = lease, lease.last_device
        try:
            projection = Projection(self._paths, config.tracking.uri, config.name, config.objectives)
        except TrackingError as error:
            raise InputError(f"tracking.uri: {error}") from None
        self._tracking: Background[tuple[Sequence[TrialRecord], Final | None]] = Background(
            "MLflow", lambda asked: projection.sync(*asked)
        )
        records = ledger.records()
        self._display = Display(
            f"study {config.name}",
            config.objectives,
            tuple(config.space),
            lambda record: point_of(config, record).model_dump(mode="json"),
            ledger.planned,
        )
        manifests = ledger.manifests()
        for manifest in manifests:
            self._display.seen(records[manifest.number], manifest)
            self._tidy(manifest)
        self._members = Members(config.objectives, config.protocol.confidence, manifests)
        self._history = History(config.objectives, manifests)
        self._entries: list[FrontEntry] = []
        self._pages = Background("files of the front", self._write_front)
        self._stopped_with: int | None = None
        self._closing = self._moved = False
        self._alike = AlikeFailures(config.budget.alike_failures)

    def left_to_do(self) -> int:
        """Trials that would still be run: interrupted ones, and others while the budget has room."""
        remaining = self._ledger.remaining()
        waiting = sum(record.state == "waiting" for record in self._ledger.records())
        return len(remaining.resume) + (0 if reached(self._limits()) else remaining.fresh + waiting)

    def refuse_others(self, data_digest: str) -> None:
        """See that the checkpoints of interrupted trials are of these trials.

        Args:
            data_digest: of the study's data.

        Raises:
            InputError: some were made from something else; all are told.
        """
        records = self._ledger.records()
        mistakes = []
        for number in self._ledger.remaining().resume:
            trial = self._ledger.trial(self._template, records[number])
            try:
                RunFolder(trial).refuse_others(trial, {"data": data_digest})
            except InputError as error:
                mistakes.append(str(error))
        if mistakes:
            raise InputError("\n".join(mistakes))

    def explore(self, trials: int) -> None:
        """Run so many trials, or until a signal. Ray is started and stopped."""
        self._pages.request(self._so_far())  # what is known from earlier sessions
        os.environ.update({**ENVIRONMENT, **TUNE_ENVIRONMENT, **LOCAL_ENVIRONMENT})  # read where Ray is imported
        warnings.filterwarnings("ignore", module="ray")
        say = self._display.say
        stack = ExitStack()
        try:
            cpus, gpus = self._connect(stack)
            grown = self._growth()
            template = self._sized(cpus, gpus, grown)
            if template.workers.gpus_per_worker and not gpus:  # none has come yet
                self._device = device_kind(self._config.price, self._config.price.device_hour)
            self._lease.use(self._device)
            self._limits()  # tells now if the device has no price
            prepare_on_cluster(template, cpus, gpus, say)
            most = self._most(template, cpus, gpus)
            grows_to = None if grown is None else grown.side_by_side(template.workers)
            say(f"{counted(trials, 'trial')} to do, {at_once(most, grows_to)}")
            if again := self._ledger.reopened:
                say(f"these had ended and are done again: {', '.join(again)}")
            if note := reason(self._config):
                say(note)
            self._tracking.request((self._ledger.records(), None))
            with self._display:
                self._tune(template, most, grows_to)
        except KeyboardInterrupt:  # not kept: its frames may hold the database open
            self._stopped_with = stopped_code()
            say("stopping")
        finally:
            ignore_signals()
            shut_down_ray()
            stack.close()

    def close(self) -> int:
        """Bring MLflow up to date, print the front, and say how the study stands. Returns the exit code."""
        records, manifests = self._ledger.records(), self._ledger.manifests()
        self._pages.finish(self._so_far())
        objectives, protocol = self._config.objectives, self._config.protocol
        entries = front(manifests, objectives, protocol.confidence) if self._pages.last_error else self._entries
        by = None if self._alike.bug else ended_by(self._limits(), records)
        self._tracking.finish((records, "finished" if by else "interrupted"))
        say = self._display.say
        if entries:
            self._display.print(front_table(entries, manifests, objectives, protocol.confidence))
        for manifest in manifests:
            if manifest.state in ("infeasible", "failed"):
                say(f"{manifest.key} {manifest.state}: {manifest.reason}")
        if failed := sum(manifest.state == "failed" for manifest in manifests):
            say(f"{failed} failed; to run them again: {self._paths.retry_command}")
        if self._tracking.last_error:
            say(f"MLflow is behind: {self._tracking.last_error}")
        if self._pages.last_error:
            say(f"the files of the front are behind: {self._pages.last_error}; the same command writes them")
        paths = self._paths
        say(f"files: {paths.front}  {paths.pareto_page}  {paths.root / 'trials'}")
        say(f"to look at it: {ui_command(self._config.tracking.uri, paths)}")
        caveats = study_caveats(manifests, entries, objectives, protocol)
        for caveat in caveats:
            say(f"warning: {caveat.text}")
        if by is not None:
            states = Counter(manifest.state for manifest in manifests)
            others = "".join(f", {count} {state}" for state, count in sorted(states.items()) if state != "complete")
            ended = f"{counted(len(manifests), 'trial')}{others}, {len(entries)} on the front"
            say(f"study {self._config.name} is done: {ended}")
            say(f"ended by {by}")
            void = not entries or any(caveat.void for caveat in caveats)
            return FAILED if void or self._pages.last_error else DONE
        trials_left = counted(self._ledger.planned() - len(manifests), "trial")
        if self._alike.bug is not None:
            say(self._alike.report(self._config.name))
            return FAILED
        if self._stopped_with is None and not self._moved:  # the same command would come to the same end, for ever
            say(f"study {self._config.name} is not done, but nothing could be done for what is left: {trials_left}")
            return FAILED
        say(f"study {self._config.name} is not done, {trials_left} left; to go on: {self._paths.resume_command}")
        return RESUMABLE if self._stopped_with is None else self._stopped_with

    def _connect(self, stack: ExitStack) -> tuple[float, float]:
        """Start Ray, or join the cluster; returns its CPUs and GPUs."""
        import ray

        address = self._config.cluster.address
        if address is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=ray_folder()))
            server = stack.enter_context(ForkServer(folder))
            stack.enter_context(server.as_python())
            os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process a trial; this machine is not taken away
            options: dict[str, Any] = {"address": "local", "include_dashboard": False}
        else:
            if address != "auto" and not speaks_grpc(address, self._config.cluster.connect_timeout_seconds):
                raise InputError(
                    f"cluster.address: no Ray head answers at {address}; give host:port of a running head, or auto, or "
                    "leave it empty for this machine"
                )
            options = {"address": address, "runtime_env": {"env_vars": ENVIRONMENT}}
        try:
            with held_back():
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:  # Ray raises what it likes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if address is None:
                raise Away(f"Ray did not start on this machine: {reason}") from None
            raise InputError(
                f"cluster.address: Ray at {address} cannot be used: {reason}\n"
                "  leave cluster.address empty for this machine, or give host:port of a running head, or auto"
            ) from None
        resources = ray.cluster_resources()
        mark = "accelerator_type:"
        kinds = [name.removeprefix(mark) for name in resources if name.startswith(mark)]
        self._device = device_kind(self._config.price, kinds)
        return float(resources.get("CPU", 0)), float(resources.get("GPU", 0))

    def _growth(self) -> Growth | None:
        import ray

        return growth(ray.get_runtime_context().gcs_address) if self._config.cluster.address is not None else None

    def _sized(self, cpus: float, gpus: float, grown: Growth | None) -> TrialConfig:
        """The template with GPUs per worker decided.

        Args:
            cpus: that there are.
            gpus: that there are.
            grown: what the cluster may become.

        Raises:
            InputError: one trial can never be run here.
        """
        workers = self._template.workers
        if grown is not None:
            cpus, gpus = max(cpus, grown.of("CPU")), max(gpus, grown.of("GPU"))
        per_worker = workers.gpus_per_worker if workers.gpus_per_worker is not None else float(gpus > 0)
        sized = workers.model_copy(update={"gpus_per_worker": per_worker})
        lacking = sized.lacking(cpus, gpus)
        if lacking and self._config.cluster.address is None:
            raise InputError(f"trial.workers: {lacking}, or give cluster.address")
        if grown is not None and not grown.side_by_side(sized):  # another cluster may get nodes that nobody tells of
            raise InputError(
                f"trial.workers: a trial needs {needed(sized)}, for which the nodes that the autoscaler may start "
                "have no room; lower workers.count, cpus_per_worker or gpus_per_worker, or raise max_workers"
            )
        return self._template.model_copy(update={"workers": sized})

    def _most(self, template: TrialConfig, cpus: float, gpus: float) -> int | None:
        """Trials side by side; None: whatever a cluster, which may grow, has devices for."""
        if self._config.cluster.concurrency is not None or self._config.cluster.address is not None:
            return self._config.cluster.concurrency
        workers = template.workers
        fit = cpus / (workers.count * workers.cpus_per_worker)
        if workers.gpus_per_worker:
            fit = min(fit, workers.side_by_side(gpus))
        return max(1, int(fit + 1e-9))

    def _tune(self, template: TrialConfig, most: int | None, grows_to: int | None) -> None:
        import ray
        from ray import tune

        from study.execution.tune_searcher import HalvingScheduler, LedgerSearcher

        make = partial(self._ledger.trial, template)
        places = Admission(
            template.workers,
            most,
            self._display.say,
            lambda found: self._config.price.device or found or self._device,
            grows_to,
        )
        searcher = LedgerSearcher(self._ledger, make, self._patience(), self._may_start, self._changed, places=places)
        # Where there are nodes for them, trials' own processes keep off those that may be taken away.
        safe = "trial_driver" in ray.cluster_resources()
        tuner = tune.Tuner(
            tune.with_resources(tune_trial, {"trial_driver": TRIAL_DRIVER} if safe else {"CPU": TRIAL_CPUS}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=HalvingScheduler(searcher),
                num_samples=-1,  # the searcher says when it is over
            ),
            run_config=tune.RunConfig(
                name=f"session-{time.time_ns()}",
                **ray_storage(self._paths.root / ".tune"),
                failure_config=tune.FailureConfig(max_failures=0),  # another attempt is another trial to Tune
                verbose=0,
            ),
        )
        logging.getLogger("ray.tune.execution.tune_controller").addFilter(told_by_tune_alone)
        try:
            tuner.fit()
        finally:
            searcher.interrupt()
            places.close()

    def _patience(self) -> Patience:
        budget = self._config.budget
        return Patience(
            retries=budget.max_failures,
            silent_seconds=60 * budget.silent_minutes,
            trial_seconds=None if budget.trial_hours is None else 3600 * budget.trial_hours,
        )

    def _limits(self) -> list[Limit]:
        used = Usage(
            trials=len(self._history.rows),
            planned_trials=self._ledger.planned(),
            wall_seconds=self._lease.worked_seconds(),
            held=self._ledger.journal.held(self._device),
            growth=self._history.shares,
        )
        return limits(self._config.budget, self._config.price, used)

    def _may_start(self) -> bool:
        """Whether another trial may start."""
        limit = reached(self._limits())
        if (limit is not None or self._alike.bug is not None) and not self._closing:
            self._closing = True
            reason = limit or f"{self._config.budget.alike_failures} trials failed alike"
            self._display.say(f"no further trial starts: {reason}; those that run are finished")
        return not self._closing

    def _changed(self, record: TrialRecord, what: Event | Manifest) -> None:
        self._display.changed(record, what)
        if isinstance(what, Event) and what.attempt is not None and what.attempt.ended is None:
            self._limits()  # tells now if money is limited and that kind of device has no price
        self._moved |= isinstance(what, Manifest) or what.event == "rung"
        if isinstance(what, Manifest):
            self._alike.add(what)
            self._tidy(what)
            self._history.add(what)
            if self._members.add(what):
                self._pages.request(self._so_far())
        self._tracking.request((self._ledger.records(), None))

    def _tidy(self, manifest: Manifest) -> None:
        """Nothing goes on with the checkpoint of a trial that was stopped early."""
        if manifest.state == "stopped":
            remove_tree(self._paths.runs / manifest.key)

    def _so_far(self) -> tuple[list[Manifest], list[Row]]:
        """What the front is made of."""
        return self._ledger.manifests(), list(self._history.rows)

    def _write_front(self, so_far: tuple[list[Manifest], list[Row]]) -> None:
        from dashboards.pareto_page import write_front_files

        manifests, history = so_far
        objectives, protocol = self._config.objectives, self._config.protocol
        title = f"Pareto front of {self._config.name}"
        self._entries = write_front_files(self._paths, manifests, objectives, title, protocol, history)
        self._display.front(self._entries, history[-1][-1] if history else 0.0)
