"""Which tasks prepare a study, and what is said of them; Ray is one that runs tasks at once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from study.execution import preparation
from study.execution.preparation import prepare_on_cluster
from trainables.config import TrialConfig, WorkersConfig
from trainables.data import DataError
from trainables.errors import InputError


class TaskError(Exception):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class AtOnce:
    """As much of Ray as is used. A task is known by its number, and what it returned or raised is kept."""

    exceptions = SimpleNamespace(RayTaskError=TaskError)

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []
        self.ended: list[Any] = []

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        def task(function: Callable[..., Any]) -> Any:
            def start(*given: Any) -> int:
                self.options.append(options)
                try:
                    self.ended.append(function(*given))
                except Exception as error:
                    self.ended.append(TaskError(error))
                return len(self.ended) - 1

            return SimpleNamespace(remote=start)

        return task

    def wait(self, tasks: list[int]) -> tuple[list[int], list[int]]:
        return tasks[:1], tasks[1:]

    def get(self, task: int) -> Any:
        if isinstance(self.ended[task], Exception):
            raise self.ended[task]
        return self.ended[task]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> AtOnce:
    made = AtOnce()
    monkeypatch.setitem(sys.modules, "ray", made)
    return made


@pytest.mark.parametrize(
    ("cpus", "gpus", "booked", "copies"), [(1, 0, 0, 1), (6, 0, 0, 6), (64, 0, 0, 16), (64, 4, 1, 4), (2, 16, 1, 16)]
)
def test_every_device_makes_substitutes(
    ray: AtOnce, monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float, booked: int, copies: int
) -> None:
    parts: list[str] = []

    def make(config: dict[str, Any], part: str) -> list[str]:
        assert TrialConfig.model_validate(config) == TrialConfig()
        parts.append(part)
        return ["a guess"] if part == "base" else []

    monkeypatch.setattr(preparation, "make_part", make)
    said: list[str] = []
    prepare_on_cluster(TrialConfig(), cpus, gpus, said.append)
    assert Counter(parts) == {"base": 1, "substitutes": copies}
    assert {options["num_gpus"] for options in ray.options} == {booked}
    assert [line.split(" after")[0] for line in said[1:]] == ["a guess", "base ready", "substitutes ready"]


@pytest.mark.parametrize(
    ("gpus_per_worker", "cpus", "gpus", "told"),
    [
        (None, 0, 0, "{CPU: 0.8, GPU: 0}"),
        (1, 8, 0, "{CPU: 0.8, GPU: 1}"),
        (1, 8, 1, None),
        (0, 8, 0, None),
    ],
)
def test_where_there_is_nothing_yet_it_is_waited_for(
    ray: AtOnce,
    monkeypatch: pytest.MonkeyPatch,
    gpus_per_worker: float | None,
    cpus: float,
    gpus: float,
    told: str | None,
) -> None:
    parts: list[str] = []

    def make(config: dict[str, Any], part: str) -> list[str]:
        parts.append(part)
        return []

    monkeypatch.setattr(preparation, "make_part", make)
    said: list[str] = []
    workers = WorkersConfig(gpus_per_worker=gpus_per_worker)
    prepare_on_cluster(TrialConfig(workers=workers), cpus, gpus, said.append)
    assert [line for line in said if "waiting" in line] == ([f"waiting for devices: {told}"] if told else [])
    assert {options["num_gpus"] for options in ray.options} == {gpus_per_worker or 0}
    assert set(parts) == {"base", "substitutes"}, "by the first node that comes"


def test_what_cannot_be_used_is_refused(ray: AtOnce, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: dict[str, Any], part: str) -> list[str]:
        raise DataError("no such captions")

    monkeypatch.setattr(preparation, "make_part", refuse)
    with pytest.raises(InputError, match="no such captions"):
        prepare_on_cluster(TrialConfig(), 2, 0, lambda line: None)
