"""`python -m benchmarks.gpu`: speed, memory and precision on the GPU at hand, at published sizes, in eight minutes.

It needs no network and no data: weights, pixels and captions are random numbers. Without a GPU, `--device cpu --tiny`
tries whether everything runs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu import attacking, training
from benchmarks.gpu.bench import Bench, Part, Row

PARTS: dict[str, tuple[Part, float]] = {
    "a": (training.training_step, 240),
    "b": (attacking.attacks, 60),
    "c": (attacking.reranking, 40),
    "d": (attacking.substitutes, 20),
    "e": (attacking.precisions, 40),
    "g": (training.planned, 5),
    "f": (training.killed_trial, 120),
}
"""By letter, with the seconds after which a part begins nothing further."""

FAILED = "not all was measured"

NEEDED = {
    "transformers": "abcdeg",
    "pydantic": "abcdefg",
    "scipy": "abcdeg",
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


def run(bench: Bench, parts: Sequence[str]) -> Iterator[Row]:
    """The parts in turn. What goes wrong in one is a row, and the next one runs."""
    for letter in parts:
        part, seconds = PARTS[letter]
        start = time.perf_counter()
        try:
            for row in part(bench):
                yield row
                if time.perf_counter() - start > seconds:
                    yield Row(letter, "began nothing further", note=f"after {seconds:g} s")
                    break
        except Exception as error:  # whatever a device, a library or a lack of memory raises
            text = (str(error).splitlines() or [""])[0]
            yield Row(letter, FAILED, note=f"{type(error).__name__}: {text[:300]}")
        bench.tidy()


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="file for the numbers as JSON")
    parser.add_argument("--parts", default=",".join(PARTS), help="letters with commas between; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="everything small: to see whether it runs")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Entry point; returns the exit code, 1 if a part was not measured as a whole."""
    options = parser().parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        print(f"--parts: no part {', '.join(unknown)}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as the workers of trials
    header = about(device)
    print("  ".join(f"{name} {value}" for name, value in header.items()))
    if told := missing(parts):
        print(told, file=sys.stderr)
    rows = []
    for row in run(Bench(device, options.tiny), parts):
        print(row, flush=True)
        rows.append(row)
        if options.out is not None:  # after each: the machine may be taken away
            found = {**header, "tiny": options.tiny, "rows": [vars(row) for row in rows]}
            options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return int(any(row.name == FAILED for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
