"""What a device does beside what its data sheet promises: half a minute of a trial of the very shape on it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from search_spaces.recipes import recipe_point
from study.config import StudyConfig
from study.costs.cost_model import Device, Shape, trial_work
from study.costs.shapes import architecture_of
from trainables.config import Model, TrialConfig
from trainables.errors import InputError

if TYPE_CHECKING:
    import torch

    from trainables.models import RetrievalModel

STEPS = 2
"""Of training, that are timed."""
LEAST, MOST = 4, 64
"""Images of the evaluation that is timed, in between as many as of the batch."""
IMAGE_STEPS = 2
"""Of its attacks."""
WORDS = 2000
"""Of the made-up language."""


class Calibration(Model):
    """A short trial on the device at hand. Where it tells nothing of a phase, the data sheet's seconds stay.

    Attributes:
        flops: of products of matrices, per second.
        bandwidth: of its memory, bytes per second.
        batch_size: of the timed steps.
        planned: seconds of the short trial by phase, as the data sheet has them.
        measured: seconds it took.
    """

    flops: float
    bandwidth: float
    batch_size: int
    planned: dict[str, float]
    measured: dict[str, float]

    def corrected(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Planned seconds by phase, as much longer or shorter as the short trial was.

        What is loaded are embeddings, which take as long a FLOP as an evaluation's.
        """
        ratios = {phase: self.measured[phase] / self.planned[phase] for phase in self.measured}
        return {
            phase: value * ratios.get("evaluate" if phase == "load" else phase, 1.0) for phase, value in seconds.items()
        }


def calibrate(config: StudyConfig, shape: Shape, sheet: Device, on_gpu: bool, seconds: float = 30.0) -> Calibration:
    """Measure the device at hand with random weights and pixels, no data and no network.

    A worker's batch is doubled from two on, as far as time and memory allow, up to its size in the study.

    Args:
        config: of the study.
        shape: of its trials.
        sheet: what the device promises.
        on_gpu: whether the device is this machine's GPU, or one of its cores.
        seconds: to take, about; one step at a batch of two may be more on a core.

    Raises:
        InputError: there is no GPU here, or no such model can be made.
    """
    import torch

    from trainables import measure
    from trainables.execution.worker import set_up

    if on_gpu and not torch.cuda.is_available():
        raise InputError("--measure: this machine has no GPU that PyTorch sees; give --device cpu, or run it on one")
    device, threads = torch.device("cuda" if on_gpu else "cpu"), torch.get_num_threads()
    set_up(config.trial.workers, device)
    try:
        end = time.perf_counter() + seconds
        flops, bandwidth = measure.matmul_flops(device), measure.memory_bandwidth(device)
        _short_trial(config, shape, sheet, device, 2)  # loads and tunes what is there for all
        batch, most = 2, config.trial.training.batch_size // config.trial.workers.count
        found, took = None, 0.0
        while found is None or (2 * batch <= most and time.perf_counter() + 3 * took < end):
            batch = batch if found is None else 2 * batch
            start = time.perf_counter()
            try:
                found = batch, *_short_trial(config, shape, sheet, device, batch)
            except torch.OutOfMemoryError:
                if found is None:
                    raise
                break
            took = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    batch, planned, measured = found
    return Calibration(flops=flops, bandwidth=bandwidth, batch_size=batch, planned=planned, measured=measured)


def _short_trial(
    config: StudyConfig, shape: Shape, sheet: Device, device: torch.device, batch: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Planned and measured seconds by phase: MAT's attack, its training, and the study's evaluation.

    Nothing is compiled, which takes longer than all that is timed.
    """
    import numpy as np

    from trainables import measure
    from trainables.synthetic import made_up_words, synthetic

    words, side = made_up_words(WORDS), config.data.image_pixels
    images, gallery = STEPS * batch, min(max(batch, LEAST), MOST)
    pixels = np.random.default_rng(0).integers(0, 256, (max(images, gallery), 3, side, side), dtype=np.uint8)
    training = config.trial.training.model_copy(
        update={"epochs": 1, "epoch_images": images, "batch_size": batch, "compile": "off"}
    )
    protocol = config.protocol.model_copy(
        update={"image_steps": IMAGE_STEPS, "gallery_images": gallery, "audit": False}
    )
    trial = TrialConfig(
        point=recipe_point("mat", config.protocol.epsilon, config.recipe_temperature),
        data=config.data,
        model=config.trial.model,
        training=training,
        protocol=protocol,
    )
    prepared = synthetic(_model(config, words, device), pixels, gallery, words)
    measured = measure.run_once(trial, prepared, device).seconds
    own = replace(shape, train_images=images, gallery_images=gallery)
    planned = trial_work(own, trial.point, training, protocol).seconds(sheet)
    phases = [phase for phase in ("attack", "train", "evaluate") if planned[phase] > 0 and measured[phase] > 0]
    return {phase: planned[phase] for phase in phases}, {phase: measured[phase] for phase in phases}


def _model(config: StudyConfig, words: list[str], device: torch.device) -> RetrievalModel:
    """Of the study's architecture, with random weights; a dual encoder is made of its towers' files."""
    from trainables.models.dual import Dual
    from trainables.synthetic import random_model, tokenizer_of

    model, tokenizer = config.trial.model, tokenizer_of(words)
    if model.image_tower is not None:
        return Dual.from_towers(model.image_tower, model.text_tower, tokenizer).to(device)
    towers = architecture_of(model)
    return random_model(*towers, config.data.image_pixels, model.max_tokens, tokenizer, device)
