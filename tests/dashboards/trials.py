"""Trials of a study, and the page that shows them."""

from __future__ import annotations

from typing import Any

from dashboards.pareto_page import pareto_page
from study.config import Objective
from study.front.estimates import front
from study.front.hypervolume import hypervolume_history
from study.records import Manifest

OBJECTIVES = (
    Objective(metric="both/mr_r5"),
    Objective(metric="clean/mr_r5"),
    Objective(metric="cost/device_seconds", direction="minimize", low=0, high=100),
    Objective(metric="image/mr_r5"),
)
ATTACK = "<script>alert(1)</script><img src=x onerror=\"document.title='owned'\">"
"""A name that would run as code where it is not escaped."""


def manifest(number: int, robust: float, clean: float, **changes: Any) -> Manifest:
    fields = {
        "key": f"s-t{number:05d}-s0",
        "number": number,
        "recipe": None,
        "params": {"temperature": 0.05 * (number + 1)},
        "point": {"temperature": 0.05 * (number + 1), "epsilon": number / 255},
        "state": "complete",
        "metrics": {
            "both/mr_r5": {"value": robust, "low": robust - 0.1, "high": robust + 0.2},
            "clean/mr_r5": {"value": clean, "low": clean - 0.1, "high": clean + 0.1},
            "image/mr_r5": {"value": 0.5, "low": 0.4, "high": 0.6},
        },
        "cost": {"device_seconds": 10.0 + number},
        "fingerprint": "f",
        "ended": float(number),
    }
    return Manifest.model_validate(fields | changes)


def page_of(
    manifests: list[Manifest], objectives: tuple[Objective, ...] = OBJECTIVES[:2], title: str = "A study"
) -> str:
    history = hypervolume_history(manifests, objectives)
    return pareto_page(manifests, front(manifests, objectives), objectives, history, title)


def manifests() -> list[Manifest]:
    return [
        manifest(0, 0.25, 0.75, recipe="tecoa_itr"),
        manifest(1, 0.5, 0.5),
        manifest(2, 0.25, 0.5),
        manifest(3, 0.75, 0.25),
        manifest(4, 0.9, 0.9, state="infeasible"),
    ]
