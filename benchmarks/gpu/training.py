"""Parts (a), (g) and (f): the training step, what was planned for it, and a trial under Ray that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.bench import FAMILIES, TINY, Bench, Row

if TYPE_CHECKING:
    from trainables.config import TrialConfig
    from trainables.results import TrialResult

GALLERY = 4
"""Images of the evaluation that ends a trial, which is not what is timed here."""


def training_step(bench: Bench) -> Iterator[Row]:
    """MAT's step (text attack, PGD-2, contrastive loss) of every family at every batch size."""
    yield Row("a", "peak of matrix products", {"tflops": bench.peak / 1e12})
    from study.costs.cost_model import pair_flops

    for family in FAMILIES:
        for batch in bench.size.batches:
            fits, (config, result, without, places) = bench.largest(batch, partial(_steps, bench, family))
            bench.steps[family] = config, result
            shape, steps = bench.shape(family), result.steps
            flops = sum(
                pair_flops(
                    shape.image.flops,
                    shape.text.flops,
                    config.point,
                    config.training.attack_candidates,
                    shape.caption_words,
                ).values()
            )
            seconds = {phase: result.seconds[phase] / steps for phase in ("load", "attack", "train")}
            speed = fits / (seconds["attack"] + seconds["train"])
            values = {
                "images/s": speed,
                "share_of_peak": speed * flops / bench.peak,
                **{f"{phase}_s": value for phase, value in seconds.items()},
                "text_attack_share": 1 - (without + seconds["train"]) / (seconds["attack"] + seconds["train"]),
                "memory_gb": result.peak_memory_gb or 0.0,
            }
            note = ""
            if bench.device.type == "cuda":
                values["host_syncs_a_step"] = sum(places.values()) / steps
                note = "host syncs: " + (", ".join(f"{place} {n}x" for place, n in places.most_common(12)) or "none")
            yield Row("a", f"{family} MAT step, batch {fits}" + (f" of {batch}" if fits < batch else ""), values, note)
            bench.tidy()
    if bench.device.type != "cuda":
        yield Row("a", "host syncs in a step", note="needs a GPU")


def _steps(bench: Bench, family: str, batch: int) -> tuple[TrialConfig, TrialResult, float, Counter[str]]:
    """A trial of some steps and nearly no evaluation, and the seconds of a step's attack on images alone.

    Before it comes one of one step, which loads and tunes what is there for all.
    """
    from trainables.config import Protocol, TrainingConfig
    from trainables.measure import host_syncs, run_once

    images = batch * bench.size.steps
    prepared = bench.prepared(family, images, GALLERY)
    training = TrainingConfig(epochs=1, epoch_images=batch, batch_size=batch, learning_rate=1e-5)
    protocol = Protocol(attacks=(), gallery_images=GALLERY, rung_gallery_images=GALLERY)
    run_once(bench.trial(family, training, protocol), prepared, bench.device)
    config = bench.trial(family, training.model_copy(update={"epoch_images": images}), protocol)
    with host_syncs(bench.device) as places:
        result = run_once(config, prepared, bench.device)
    no_words = config.model_copy(update={"point": config.point.model_copy(update={"words": 0})})
    images_alone = run_once(no_words, prepared, bench.device)
    return config, result, images_alone.seconds["attack"] / images_alone.steps, places


def planned(bench: Bench) -> Iterator[Row]:
    """Seconds of part (a)'s steps as `study.plan` has them, from the data sheet and from the measured peak."""
    from study.costs.cost_model import DEVICES, trial_work
    from trainables.measure import memory_bandwidth

    if not bench.steps:
        yield Row("g", "planned against measured", note="needs part a in the same run")
        return
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


def killed_trial(bench: Bench) -> Iterator[Row]:
    """A trial under Ray Train, killed with all its processes after its first checkpoint, and run again.

    On a GPU its process group is of NCCL, with one worker.
    """
    import psutil
    import ray  # noqa: F401

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trial = {
            "data": {"image_pixels": 32, "shapes": {"train_images": 256, "test_images": 32}},
            "model": {"tiny": TINY, "pretrain": {"epochs": 1, "mlm_epochs": 1}},
            "point": {"epsilon": "2/255", "attack_steps": 2, "words": 1},
            "training": {"epochs": 8, "batch_size": 8},
            "protocol": {"gallery_images": 16, "rung_gallery_images": 16},
            "cache_dir": str(folder / "cache"),
            "storage_path": str(folder / "runs"),
        }
        (folder / "trial.json").write_text(json.dumps(trial), encoding="utf-8")
        command = [sys.executable, "-m", "trainables.trial", str(folder / "trial.json")]
        start = time.perf_counter()
        with (folder / "first.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
        while process.poll() is None and not list(folder.glob("runs/**/state.json")):
            time.sleep(0.05)
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            victim.kill()
        process.wait()
        first = time.perf_counter() - start
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        if done.returncode not in (0, 1) or not done.stdout.strip():
            raise RuntimeError(f"{done.stderr[-500:]}{(folder / 'first.log').read_text(encoding='utf-8')[-500:]}")
        result = json.loads(done.stdout)["result"]
    values = {"killed_after_s": first, "second_run_s": time.perf_counter() - start - first}
    went_on = result["resumed_from_steps"]
    yield Row("f", "trial under Ray, SIGKILLed", values, f"went on from step {went_on} of {result['steps']}")
