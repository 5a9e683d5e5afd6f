"""Parts (a), (g) and (f): the training step, what was planned for it, and a trial under Ray that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.bench import FAMILIES, TINY, Bench, Row, timed_calls

if TYPE_CHECKING:
    from trainables.config import TrialConfig
    from trainables.results import TrialResult

GALLERY = 4
"""Images of the evaluation that ends a trial, which is not what is timed here."""
RUN_SECONDS = 65
"""The longest that either run of the killed trial may take."""
TRIAL = (sys.executable, "-m", "trainables.trial")


@dataclass(frozen=True)
class Timed:
    """Some training steps of one size.

    Attributes:
        config: of the trial.
        result: what it measured.
        text_attack_share: of a step's attack and training, measured around the text attack.
        compiled: seconds of a step's attack with the image tower compiled, and of the first, which compiles; on GPUs,
            for CLIP.
        syncs: places where the host waited for the device.
    """

    config: TrialConfig
    result: TrialResult
    text_attack_share: float
    compiled: dict[str, float]
    syncs: Counter[str]

    def a_step(self, phase: str) -> float:
        """Its seconds."""
        return self.result.seconds[phase] / self.result.steps


def training_step(bench: Bench) -> Iterator[Row]:
    """MAT's step (text attack, PGD-2, contrastive loss) of every family at every batch size.

    A batch that does not fit is halved until it does, and trained on as a whole by micro-batches of half of that.
    """
    yield Row("a", "peak of matrix products", {"tflops": bench.peak / 1e12})
    for batch in bench.size.batches:
        for family in FAMILIES:
            fits, timed = bench.largest(batch, partial(_steps, bench, family))
            bench.steps[family] = timed.config, timed.result
            yield _row(bench, family, timed, f"batch {fits}" + (f" ({batch} does not fit)" if fits < batch else ""))
            bench.tidy()
            if fits < batch:
                micro = max(1, fits // 2)
                yield _row(bench, family, _steps(bench, family, batch, micro), f"batch {batch} by {micro}")
                bench.tidy()
    family, batch, micro = bench.size.chunked
    yield _row(bench, family, _steps(bench, family, batch, micro), f"batch {batch} by {micro}")
    if bench.device.type != "cuda":
        yield Row("a", "host syncs, compiled tower", note="needs a GPU")


def _row(bench: Bench, family: str, timed: Timed, size: str) -> Row:
    from study.costs.cost_model import pair_flops

    config, shape = timed.config, bench.shape(family)
    candidates = config.training.attack_candidates
    flops = pair_flops(shape.image.flops, shape.text.flops, config.point, candidates, shape.caption_words)
    attack, train, batch = timed.a_step("attack"), timed.a_step("train"), config.training.batch_size

    def speed(attack: float) -> dict[str, float]:
        rate = batch / (attack + train)
        return {"images/s": rate, "share_of_peak": rate * sum(flops.values()) / bench.peak}

    values = {
        **speed(attack),
        "load_s": timed.a_step("load"),
        "attack_s": attack,
        "train_s": train,
        "text_attack_share": timed.text_attack_share,
        "memory_gb": timed.result.peak_memory_gb or 0.0,
        **timed.compiled,
    }
    if timed.compiled:
        values |= {f"{name}_compiled": value for name, value in speed(timed.compiled["attack_s_compiled"]).items()}
    note = ""
    if bench.device.type == "cuda":
        values["host_syncs_a_step"] = timed.syncs.total() / timed.result.steps
        note = "host syncs: " + (", ".join(f"{place} {n}x" for place, n in timed.syncs.most_common(12)) or "none")
    return Row("a", f"{family} MAT step, {size}", values, note)


def _steps(bench: Bench, family: str, batch: int, micro: int | None = None) -> Timed:
    """Trials of some steps and nearly no evaluation.

    Before them comes one of one step, which loads and tunes what is there for all.
    """
    from trainables.config import Protocol, TrainingConfig
    from trainables.measure import host_syncs, run_once
    from trainables.training import attack

    steps = 1 if micro else bench.size.steps
    prepared = bench.prepared(family, batch * steps, GALLERY)
    protocol = Protocol(attacks=(), gallery_images=GALLERY, rung_gallery_images=GALLERY)

    def trial(steps: int, compiled: bool = False) -> TrialConfig:
        training = TrainingConfig(
            epochs=1,
            epoch_images=batch * steps,
            batch_size=batch,
            micro_batch=micro,
            learning_rate=1e-5,
            compile="on" if compiled else "off",
        )
        return bench.trial(family, training, protocol)

    run_once(trial(1), prepared, bench.device)
    config = trial(steps)
    with host_syncs(bench.device) as syncs:
        result = run_once(config, prepared, bench.device)
    with timed_calls(attack, "attack_words", bench.device) as words:
        phases = run_once(config, prepared, bench.device).seconds
    share = sum(words) / (phases["attack"] + phases["train"])
    compiled = {}
    if bench.device.type == "cuda" and family == "clip" and micro is None:
        first = run_once(trial(1, compiled=True), prepared, bench.device).seconds["attack"]
        again = run_once(trial(steps, compiled=True), prepared, bench.device).seconds["attack"] / steps
        compiled = {"attack_s_compiled": again, "first_attack_s_compiled": first}
    return Timed(config, result, share, compiled, syncs)


def planned(bench: Bench) -> Iterator[Row]:
    """Seconds of part a's steps as `study.plan` has them, from the data sheet and from the measured peak."""
    if not bench.steps:
        raise RuntimeError("needs part a before it in the same run")
    from study.costs.cost_model import DEVICES, trial_work
    from trainables.measure import memory_bandwidth

    bandwidth = memory_bandwidth(bench.device)
    name = torch.cuda.get_device_name(bench.device).lower() if bench.device.type == "cuda" else "cpu"
    sheet = next((kind for kind in DEVICES if kind.split("-")[0] in name), "h100")
    found = replace(DEVICES[sheet], flops=bench.peak, bandwidth=bandwidth)
    yield Row("g", "copy in memory", {"gb/s": bandwidth / 1e9})
    for family, (config, result) in bench.steps.items():
        shape = replace(bench.shape(family), train_images=result.steps * config.training.batch_size)
        work = trial_work(shape, config.point, config.training, config.protocol)
        by = {device: work.seconds(device) for device in (DEVICES[sheet], found)}
        values = {}
        for phase in ("attack", "train"):
            values[f"{phase}_planned_s"], values[f"{phase}_from_peak_s"] = (
                seconds[phase] / result.steps for seconds in by.values()
            )
            values[f"{phase}_measured_s"] = result.seconds[phase] / result.steps
        yield Row("g", f"{family} step, planned for {sheet}", values)


@contextmanager
def _trial(path: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A trial in a process of its own, which writes its result and its log; in the end all its processes are killed."""
    import psutil

    with log.open("wb") as told, log.with_suffix(".json").open("wb") as result:
        process = subprocess.Popen([*TRIAL, str(path)], stdout=result, stderr=told, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):  # Ray has workers in their own groups
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def killed_trial(bench: Bench) -> Iterator[Row]:
    """A trial under Ray Train, killed with all its processes after its first checkpoint, goes on from there.

    On a GPU its process group is of NCCL, with one worker.
    """
    import_module("ray")  # where it is missing, that is the answer, before a trial is begun

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trial = {
            "data": {"image_pixels": 32, "shapes": {"train_images": 256, "val_images": 32, "test_images": 32}},
            "model": {"tiny": TINY, "pretrain": {"epochs": 1, "mlm_epochs": 1}},
            "point": {"epsilon": "2/255", "attack_steps": 2, "words": 1},
            "training": {"epochs": 4, "batch_size": 8},
            "protocol": {"gallery_images": 16, "rung_gallery_images": 16},
            "cache_dir": str(folder / "cache"),
            "storage_path": str(folder / "runs"),
        }
        (folder / "trial.json").write_text(json.dumps(trial), encoding="utf-8")
        start, log = time.perf_counter(), folder / "log"
        with _trial(folder / "trial.json", log) as process:
            while not list(folder.glob("runs/**/state.json")):
                if process.poll() is not None or time.perf_counter() - start > RUN_SECONDS:
                    raise RuntimeError(f"no checkpoint after {time.perf_counter() - start:.0f} s: {_end_of(log)}")
                time.sleep(0.05)
        killed = time.perf_counter()
        with _trial(folder / "trial.json", log) as process:
            code = process.wait(RUN_SECONDS)
        written = log.with_suffix(".json").read_text(encoding="utf-8")
        if code not in (0, 1) or not written:
            raise RuntimeError(f"the second run ended with {code}: {_end_of(log)}")
        result = json.loads(written)["result"]
    values = {"killed_after_s": killed - start, "second_run_s": time.perf_counter() - killed}
    went_on = result["resumed_from_steps"]
    yield Row("f", "trial under Ray, SIGKILLed", values, f"went on from step {went_on} of {result['steps']}")


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-500:].strip()
