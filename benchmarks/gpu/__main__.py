"""`python -m benchmarks.gpu`: speed, memory and precision on the GPU at hand, at published sizes.

It takes at most eight minutes and needs no network and no data: weights, pixels and captions are random numbers.
Without a GPU, `--device cpu --tiny` tries whether everything runs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu import attacking, training
from benchmarks.gpu.bench import Bench, Part, Row
from trainables.errors import InputError

PARTS: dict[str, tuple[Part, float]] = {
    "a": (training.training_step, 170),
    "b": (attacking.attacks, 60),
    "c": (attacking.reranking, 40),
    "d": (attacking.substitutes, 20),
    "e": (attacking.precisions, 40),
    "g": (training.planned, 5),
    "f": (training.killed_trial, 2 * training.RUN_SECONDS + 5),
}
"""By letter, with the seconds after which a part is cut short."""

FAILED = "not all was measured"

NEEDED = {
    "numpy": "abcdefg",
    "transformers": "abcdefg",
    "pydantic": "abcdefg",
    "scipy": "abcdefg",
    "ray": "f",
    "psutil": "f",
    "pycocotools": "f",
}
"""Packages beside PyTorch, and the parts that need them."""


def missing(parts: Sequence[str]) -> str:
    """What is not installed here, which parts need it, and how to bring it; empty if nothing is missing."""
    absent = {
        name: sorted(set(needing) & set(parts))
        for name, needing in NEEDED.items()
        if importlib.util.find_spec(name) is None and set(needing) & set(parts)
    }
    if not absent:
        return ""
    names, python = " ".join(absent), f"{sys.version_info.major}.{sys.version_info.minor}"
    needing = "; ".join(f"{name} (parts {', '.join(letters)})" for name, letters in absent.items())
    return (
        f"not installed here: {needing}. Where there is a network:\n"
        f"  pip download --only-binary=:all: --python-version {python} --platform manylinux_2_28_{platform.machine()} "
        f"-d wheels {names}\n"
        f"and here: pip install --no-index --find-links wheels {names}"
    )


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` in what runs within for longer; again every second, in case a library catches it."""

    def late(*_: object) -> None:
        raise TimeoutError(f"cut short after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(bench: Bench, parts: Sequence[str], show: Callable[[Row], None]) -> None:
    """The parts in turn. What goes wrong in one is a row, and the next one runs."""
    for letter in parts:
        part, seconds = PARTS[letter]
        try:
            with at_most(seconds):
                for row in part(bench):
                    show(row)
        except Exception as error:  # whatever a device, a library or a lack of memory or time raises
            text = (str(error).splitlines() or [""])[0]
            show(Row(letter, FAILED, note=f"{type(error).__name__}: {text[:300]}"))
        bench.tidy()


def device_of(wanted: str) -> torch.device:
    """The device, which works.

    Raises:
        InputError: it does not.
    """
    try:
        torch.zeros(1, device=wanted)
    except (AssertionError, RuntimeError) as error:  # built without CUDA; no driver, an old one, no device
        text = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"--device {wanted}: torch {torch.__version__} cannot use it: {text}; "
            "`--device cpu --tiny` tries on a CPU whether everything runs"
        ) from None
    return torch.device(wanted)


def parts_of(text: str) -> list[str]:
    """Letters with commas between.

    Raises:
        InputError: no such part.
    """
    parts = [part.strip() for part in text.split(",")]
    if unknown := sorted(set(parts) - set(PARTS)):
        raise InputError(f"--parts {text!r}: no part {', '.join(map(repr, unknown))}; there are {', '.join(PARTS)}")
    return parts


def about(device: torch.device) -> dict[str, str]:
    """What the numbers belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    found = {"device": name, "date": datetime.date.today().isoformat(), "python": platform.python_version()}
    for package in ("torch", "transformers", "ray", "paretovl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["memory_gb"] = f"{torch.cuda.get_device_properties(device).total_memory / 1e9:.1f}"
    return found


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    told = [f"  {letter}  {line_of(part)}" for letter, (part, _) in sorted(PARTS.items())]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        epilog="\n".join(["parts:", *told]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="file for the numbers as JSON")
    parser.add_argument("--parts", default=",".join(PARTS), help="letters with commas between; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="everything small: to see whether it runs")
    return parser


def line_of(part: Part) -> str:
    """What the part measures, in a line."""
    return (part.__doc__ or "").split("\n")[0]


def main(arguments: Sequence[str]) -> int:
    """Entry point; returns the exit code: 1 if a part was not measured as a whole, 2 if nothing can be measured."""
    options = parser().parse_args(arguments)
    rows: list[Row] = []

    def write() -> None:
        if options.out is not None:
            found = {**header, "tiny": options.tiny, "rows": [vars(row) for row in rows]}
            options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")

    def show(row: Row) -> None:
        print(row, flush=True)
        rows.append(row)
        write()  # after each: the machine may be taken away

    try:
        parts, device = parts_of(options.parts), device_of(options.device)
        header = about(device)
        write()  # before anything is measured: where it cannot be written, nothing needs to be
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --out {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as the workers of trials
    print("  ".join(f"{name} {value}" for name, value in header.items()))
    if told := missing(parts):
        print(told, file=sys.stderr)
    run(Bench(device, options.tiny), parts, show)
    return int(any(row.name == FAILED for row in rows))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is ended
    sys.exit(main(sys.argv[1:]))
