"""This tree beside its state at an earlier revision: a trial's start, the text attack in training, an evaluation.

`python -m benchmarks.before REVISION` unpacks the revision beside, runs each workload in both trees in turn, each in
a process of its own on one thread, and prints medians of processor seconds and their ratios. Only what exists in both
trees is called.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Size:
    """How much is measured: synthetic records; steps on shapes; evaluated images."""

    records: int = 118_000
    steps: int = 8
    batch: int = 128
    gallery: int = 100
    shapes: int = 1024


TINY = Size(records=300, steps=1, batch=16, gallery=10, shapes=32)

ROUNDS = {False: 3, True: 1}
"""Unless others are wanted; if everything is tiny."""


def trial(cache: Path, model: dict[str, Any], **fields: Any) -> Any:
    """A configuration of this process's tree. A base model is trained for one epoch: what it knows takes no time."""
    from trainables.config import TrialConfig

    pretrain = {"epochs": 1, "mlm_epochs": 1, **model.pop("pretrain", {})}
    given = {"model": {**model, "pretrain": pretrain}, "cache_dir": str(cache), **fields}
    return TrialConfig.model_validate(given)


def start(folder: Path, cache: Path, size: Size) -> dict[str, float]:
    """`prepare` where everything is there already; small models are made of a set of their own."""
    from trainables.prepare import prepare

    tiny = {"width": 32, "layers": 1, "heads": 2, "patch_pixels": 8, "embedding": 32}
    model = {"tiny": tiny, "pretrain": {"root": str(folder / "small")}}
    config = trial(cache, model, data={"root": str(folder / "coco"), "image_pixels": 16})
    began = time.process_time()
    prepare(config)
    return {f"start on {size.records:,} records": time.process_time() - began}


def shapes(train: int, measured: int) -> dict[str, dict[str, int]]:
    """Fields of the data for embedded shapes; earlier revisions draw no images for the search alone."""
    from trainables.config import ShapesConfig

    sizes = {"train_images": train, "val_images": measured, "test_images": measured}
    return {"shapes": {name: size for name, size in sizes.items() if name in ShapesConfig.model_fields}}


def training(folder: Path, cache: Path, size: Size) -> dict[str, float]:
    """The phase `attack` of fine-tuning against one changed word, per step: all of it, and beside the encoders."""
    import torch

    from trainables.prepare import prepare
    from trainables.training.finetune import finetune

    time.perf_counter = time.process_time  # what the phases are measured by
    found = {}
    protocol = {"attacks": ["image"], "gallery_images": 4, "image_steps": 1, "bootstrap_samples": 100}
    drawn = shapes(size.shapes, 8)
    steps = {"epochs": 1, "epoch_images": size.steps * size.batch, "batch_size": size.batch}
    for name, model in {"CLIP": {}, "bag of words": {"image_tower": str(folder / "tower")}}.items():
        config = trial(cache, dict(model), data=drawn, point={"words": 1}, training=steps, protocol=protocol)
        prepared = prepare(config)
        encoding = timed_encoders(prepared.base)
        with tempfile.TemporaryDirectory() as scratch:
            finetune(config, prepared, torch.device("cpu"), None, Path(scratch), lambda message, part: None)
            (path,) = Path(scratch).rglob("result.json")
            result = json.loads(path.read_text(encoding="utf-8"))
        attack = result["seconds"]["attack"]
        found[f"text attack, {name}, batch {size.batch}"] = attack / size.steps
        found[f"    beside the encoders of {name}"] = (attack - sum(encoding)) / size.steps
    return found


def timed_encoders(model: Any) -> list[float]:
    """A list that gets the seconds of each encoder pass without gradient, while a batch is attacked."""
    import torch

    seconds: list[float] = []

    def timed(encode: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            counted = attacking() and not torch.is_grad_enabled()
            began = time.process_time()
            found = encode(*given)
            seconds.extend([time.process_time() - began] if counted else [])
            return found

        return call

    model.encode_image, model.encode_text = timed(model.encode_image), timed(model.encode_text)
    return seconds


def attacking() -> bool:
    """Whether a training step's attack is among the callers."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "attack_pairs":
            return True
    return False


def evaluation(folder: Path, cache: Path, size: Size) -> dict[str, float]:
    """Image, text and both attacks on the gallery."""
    import torch

    from trainables.evaluation.robustness import evaluate
    from trainables.prepare import prepare

    found = {}
    drawn = shapes(size.shapes, size.gallery)
    for name, family in {"CLIP": "clip", "ALBEF": "albef"}.items():
        config = trial(cache, {"family": family}, data=drawn, protocol={"gallery_images": size.gallery})
        prepared = prepare(config)
        device, tokens = torch.device("cpu"), config.model.max_tokens
        began = time.process_time()
        evaluate(prepared.base, prepared.gallery, config.protocol, max_tokens=tokens, device=device)
        found[f"evaluation, {name}, {size.gallery} images"] = time.process_time() - began
    return found


WORKLOADS: dict[str, Callable[[Path, Path, Size], dict[str, float]]] = {
    "start": start,
    "training": training,
    "evaluation": evaluation,
}


@contextlib.contextmanager
def unpacked(revision: str) -> Iterator[Path]:
    """The tree at the revision.

    Raises:
        InputError: there is no such revision.
    """
    from trainables.errors import InputError

    with tempfile.TemporaryDirectory() as folder:
        packed, tree = Path(folder) / "tree.tar", Path(folder) / "tree"
        command = ["git", "-C", str(ROOT), "archive", "--output", str(packed), "--end-of-options", revision]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise InputError(f"revision {revision!r}: {done.stderr.strip()}; a commit, branch or tag is wanted")
        with tarfile.open(packed) as archive:
            archive.extractall(tree, filter="data")
        yield tree


def measured(
    tree: Path, workload: str | None, options: argparse.Namespace, folder: Path, cache: str
) -> dict[str, float]:
    """What the workload, or each, takes in a tree, by name; it keeps what it prepares in a cache of that tree."""
    command = [sys.executable, "-P", __file__, "--measure", cache, "--folder", str(folder)]
    command += [*(["--workload", workload] if workload else []), *(["--tiny"] if options.tiny else [])]
    command += ["--", options.revision]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "PYTHONPATH": str(tree), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True, encoding="utf-8")
    return {str(name): float(seconds) for name, seconds in json.loads(done.stdout.splitlines()[-1]).items()}


def make_data(folder: Path, size: Size) -> None:
    """What both trees read; what is there already stays."""
    from benchmarks.synthetic import coco_set, image_tower

    for name, records in (("coco", size.records), ("small", min(size.records, 1000))):
        if not (folder / name / "captions.json").exists():
            coco_set(folder / name, records)
    if not (folder / "tower").exists():
        image_tower(folder / "tower")


def compare(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Lines of the table. In each tree, a first run that is not counted prepares what the others find.

    Where everything is tiny, there is no such run, and all workloads share a process.
    """
    rounds, unmeasured = options.rounds or ROUNDS[options.tiny], 0 if options.tiny else 1
    with unpacked(options.revision) as before:
        make_data(folder, TINY if options.tiny else Size())
        trees = {"before": before, "now": ROOT}
        yield f"{'processor seconds, median of ' + str(rounds):42}{'before':>10}{'now':>10}{'ratio':>8}"
        for workload in [options.workload] if options.workload or options.tiny else list(WORKLOADS):
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
            for turn in range(unmeasured + rounds):
                for name, tree in trees.items():
                    found = measured(tree, workload, options, folder, f"cache-{name}")
                    if turn >= unmeasured:
                        runs[name].append(found)
            for row in runs["now"][0]:
                old, new = (median(found[row] for found in runs[name]) for name in trees)
                yield f"{row:42}{old:10.3f}{new:10.3f}{old / new:7.1f}x"


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before", description=__doc__.split("\n")[0])
    parser.add_argument("revision", help="of git, such as a tag")
    parser.add_argument("--workload", choices=WORKLOADS, help="one instead of all")
    parser.add_argument("--rounds", type=int, help="runs of each tree, in turn; default: 3, or 1 with --tiny")
    parser.add_argument("--folder", type=Path, help="keeps data and caches for the next time; the first takes minutes")
    parser.add_argument("--tiny", action="store_true", help="the same in small, to see that it works")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Entry point."""
    options = parser().parse_args(arguments)
    if options.measure:
        import torch

        torch.set_num_threads(1)
        size = TINY if options.tiny else Size()
        cache, found = options.folder / options.measure, dict[str, float]()
        for workload in [options.workload] if options.workload else WORKLOADS:
            found |= WORKLOADS[workload](options.folder, cache, size)
        print(json.dumps(found))
        return 0
    from trainables.errors import InputError

    try:
        if options.rounds is not None and options.rounds < 1:
            raise InputError(f"--rounds {options.rounds}: at least 1")
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.folder or Path(temporary)).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            for line in compare(options, folder):
                print(line, flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was unpacked is removed
    sys.exit(main(sys.argv[1:]))
