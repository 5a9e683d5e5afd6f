"""`StudyConfig`: what a study explores, and how; the one schema for presets, files, variables and flags."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from search_spaces.joint import JOINT, SPACES
from search_spaces.recipes import Recipe, trials_of
from search_spaces.space import Knob, check_space, typed, typed_space, wrong_point
from study.mistakes import Where, check_all
from study.paths import StudyPaths
from trainables.config import (
    DIRECTIONS,
    DataConfig,
    Model,
    ModelConfig,
    Point,
    Protocol,
    TrainingConfig,
    TrialConfig,
    WorkersConfig,
    raise_all,
)
from trainables.config.fields import Name, Place, Seed, Separated, Url, parse_epsilon
from trainables.files import PlaceOrUrl, UrlPath

COST = "cost/device_seconds"
COSTS = {COST: "device_seconds", "cost/peak_memory_gb": "peak_memory_gb"}
"""What is measured of a trial beside its evaluation, and its name in reports, results and a manifest's cost."""

RECIPE_TEMPERATURE = 0.05
SamplerName = Literal["tpe", "gp", "nsga2", "nsga3", "qmc", "random", "auto"]

KnobValue = Annotated[bool | int | float | str, BeforeValidator(parse_epsilon)]
"""Of a point; radii may be written 2/255."""

Part = TypeVar("Part")
Points = tuple[dict[str, KnobValue], ...]


def _is_recall(metric: str) -> bool:
    return re.search(r"/.*_r\d+$", metric) is not None


class Objective(Model):
    """One measured number to optimise.

    Hypervolume is taken in the unit box between `low` and `high` with the reference point 10 % of the range beyond
    the worse end (Ishibuchi et al. 2018, "How to specify a reference point").
    """

    metric: str = Field(description="a metric of the evaluation, such as both/mr_r5, or a cost: cost/device_seconds")
    direction: Literal["maximize", "minimize"] = "maximize"
    low: float = 0.0
    high: float = 1.0

    def __str__(self) -> str:
        return self.metric + (" (minimize)" if self.direction == "minimize" else "")

    @model_validator(mode="after")
    def _range(self) -> Objective:
        if self.metric in COSTS and not {"direction", "low", "high"} <= self.model_fields_set:
            raise ValueError(
                f"a cost needs its direction and range, such as {{metric: {self.metric}, direction: minimize, low: 0, "
                "high: 300}, in seconds or GB"
            )
        if not self.low < self.high < math.inf:
            raise ValueError(f"low {self.low} must be below high {self.high}, both finite")
        if self.metric in COSTS and self.direction == "maximize":
            raise ValueError("a cost is to minimize")
        if _is_recall(self.metric) and not 0 <= self.low < self.high <= 1:
            raise ValueError(f"recalls are in [0, 1], which low {self.low} and high {self.high} are not")
        return self


class Constraint(Model):
    """A bound that a usable trial keeps. One beyond it is infeasible: never on the front, and the sampler learns."""

    metric: str = Field(description="a metric of the evaluation, cost/device_seconds, or cost/peak_memory_gb")
    at_least: float | None = Field(None, description="smallest value that is allowed")
    at_most: float | None = Field(None, description="largest value that is allowed")

    @model_validator(mode="after")
    def _one_bound(self) -> Constraint:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a constraint needs at_least or at_most, one of them")
        bound = self.at_least if self.at_least is not None else self.at_most or 0.0
        if self.metric in COSTS and not 0 < bound < math.inf:
            raise ValueError(f"no trial costs {bound}: the bound of a cost is above 0")
        if _is_recall(self.metric) and not 0 <= bound <= 1:
            raise ValueError(f"recalls are in [0, 1], and {bound} is not")
        return self

    def excess(self, value: float) -> float:
        """By how much a value is beyond the bound; 0 or less if it is not, infinite for NaN."""
        if math.isnan(value):
            return math.inf
        return value - self.at_most if self.at_most is not None else (self.at_least or 0.0) - value

    def __str__(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return f"{self.metric} {bound}"


class EarlyStopping(Model):
    """Successive halving: at a rung, only the best `1 / eta` of the trials that reached it go on."""

    enabled: bool = Field(True, description="whether trials are stopped early")
    eta: int = Field(2, ge=2, description="a rung lets 1/eta of the trials go on, and the next rung is eta times later")
    first_epoch: int = Field(1, ge=1, description="epoch after which the first rung is")


class Budget(Model):
    """When a study is done: the first limit that is reached ends it. Trials that run then are finished.

    Empty limits are none. A larger budget goes on with a study that is done.
    """

    trials: int = Field(12, ge=0, le=1_000_000, description="searched trials; recipes come on top")
    wall_hours: float | None = Field(None, gt=0, description="time that drivers worked on the study, all sessions")
    device_hours: float | None = Field(None, gt=0, description="devices x time held, all attempts")
    money: float | None = Field(None, gt=0, description="device-hours and head by their price")
    plateau_trials: int | None = Field(None, ge=1, description="complete trials without growth of the hypervolume")
    plateau_growth: float = Field(0.001, ge=0, lt=1, description="share of the box that is not yet growth")
    trial_hours: float | None = Field(None, gt=0, description="wall time of one trial; above it is infeasible")
    silent_minutes: float = Field(
        30,
        gt=0,
        description="a worker is stuck if neither a step nor a part of an evaluation ends for so long; 5 times as long "
        "before its first step",
    )
    max_failures: int = Field(2, ge=0, description="retries of a trial whose worker or node was lost or stuck")
    alike_failures: int = Field(3, ge=1, description="trials that fail alike before the study stops")


class Price(Model):
    """What devices cost while they are held. Money is in any one currency."""

    currency: str = Field("USD", description="only shown")
    device_hour: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="price of a device-hour by kind, such as l4=0.98"
    )
    head_hour: float = Field(0, ge=0, description="price of an hour of the head node, while a driver works")
    device: str | None = Field(None, max_length=64, description="kind of device trials run on; empty: what Ray finds")


class TrialTemplate(Model):
    """What all trials share."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    workers: WorkersConfig = WorkersConfig()


def wrong_trials(
    drawn: Iterable[tuple[str, Point]], trial: TrialTemplate, protocol: Protocol, data: DataConfig
) -> list[str]:
    """What is wrong with some of the trials, each once, with one of them unless it is wrong with all."""
    found: dict[str, list[str]] = {}
    trials = list(drawn)
    for name, point in trials:
        try:
            TrialConfig(point=point, data=data, protocol=protocol, **dict(trial))
        except ValidationError as error:
            for reason in error.errors()[0]["msg"].removeprefix("Value error, ").split("; "):
                found.setdefault(reason, []).append(name)
    return [reason if len(names) == len(trials) else f"{reason} ({names[0]})" for reason, names in found.items()]


class TrackingConfig(Model):
    """Where MLflow keeps the projection."""

    uri: Url | None = Field(None, description="MLflow tracking URI; empty: a SQLite file in the study's folder")


class ClusterConfig(Model):
    """Where trials run."""

    address: str | None = Field(None, description="Ray cluster (host:port, or auto); empty: this machine")
    concurrency: int | None = Field(None, ge=1, description="trials at once; empty: as many as fit")
    connect_timeout_seconds: float = Field(10, gt=0, description="how long to wait for the cluster's head")


def _named_space(value: object) -> object:
    if isinstance(value, str) and value not in SPACES:
        raise ValueError(f"no space of that name; there are {', '.join(SPACES)}, or give knobs by name")
    return SPACES[value] if isinstance(value, str) else value


METRIC_NAMES: list[Where] = [("protocol", name) for name in ("attacks", "recall_at", "rerank", "eight_bit")]
READ: dict[str, list[Where]] = {
    "recipes": [],
    "objectives": METRIC_NAMES,
    "constraints": METRIC_NAMES,
    "budget": [("price",)],
    "points": [("space",)],
    "warm_start": [("name",)],
}
"""What the rules about a field as a whole read besides it."""


class StudyConfig(Model):
    """A named, resumable exploration."""

    name: Name = Field("quickstart", description="of the study and its folder")
    studies_dir: PlaceOrUrl = Field(
        Path("studies"), description="root of all studies: a path, or s3:// or gs:// with a bucket"
    )
    cache_dir: Place | None = Field(
        None,
        description="prepared data and base models, shared or of each machine; empty: .cache in studies_dir, or "
        "~/.cache/paretovl where that is a URL",
    )
    space: Annotated[dict[str, Knob], BeforeValidator(_named_space)] = Field(
        JOINT, description="knobs by name, in the order they are drawn; in a file also joint or fusion"
    )
    recipes: Annotated[tuple[Recipe, ...], Separated] = Field(
        ("finetune", "tecoa_itr", "fare", "mat"), description="published defences that run first"
    )
    recipe_temperature: float = Field(
        RECIPE_TEMPERATURE, gt=0, le=1, description="of the recipes: that of the base model"
    )
    protocol: Protocol = Protocol()
    objectives: tuple[Objective, ...] = Field(
        (Objective(metric="clean/mr_r1"), Objective(metric="both/mr_r1")),
        description="1 to 4 measured numbers, each with metric, direction, low and high",
        min_length=1,
        max_length=4,
        validate_default=True,
    )
    constraints: tuple[Constraint, ...] = Field((), description="bounds that a usable trial keeps")
    price: Price = Price()
    budget: Budget = Budget()
    early_stopping: EarlyStopping = EarlyStopping()
    sampler: SamplerName = Field("auto", description="how searched points are proposed; auto chooses by the budget")
    points: Points = Field((), description="points to try first, by knob; knobs that are left out are proposed")
    replicates: int = Field(
        0, ge=0, le=20, description="further runs, with fresh seeds, of every trial that may be on the front in the end"
    )
    warm_start: Annotated[tuple[Name, ...], Separated] = Field(
        (), description="earlier studies of the same folder and fingerprint whose trials the sampler learns from"
    )
    seed: Seed = Field(0, description="of the sampler and of every trial")
    data: DataConfig = DataConfig()
    trial: TrialTemplate = TrialTemplate()
    tracking: TrackingConfig = Field(TrackingConfig(), validate_default=True)
    cluster: ClusterConfig = ClusterConfig()
    storage: Url | None = Field(
        None, description="Optuna storage URL; empty: SQLite in the study's folder", validate_default=True
    )

    @model_validator(mode="wrap")
    @classmethod
    def _one_mistake_hides_no_other(cls, given: Any, check: ModelWrapValidatorHandler[StudyConfig]) -> StudyConfig:
        return check_all(given, check, READ)

    @field_validator("space")
    @classmethod
    def _space_can_be_used(cls, space: dict[str, Knob]) -> dict[str, Knob]:
        space = typed_space(space)
        raise_all(check_space(space))
        return space

    @field_validator("recipes", "points", "warm_start")
    @classmethod
    def _each_once(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        raise_all(f"{part!r} is given twice" for place, part in enumerate(parts) if part in parts[:place])
        return parts

    # What depends on other fields is checked if these are right themselves, so that all mistakes are told at once.

    @field_validator("objectives")
    @classmethod
    def _objectives_differ(cls, objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
        metrics = [objective.metric for objective in objectives]
        raise_all(f"{metric} is given twice" for metric in dict.fromkeys(metrics) if metrics.count(metric) > 1)
        return objectives

    @field_validator("objectives", "constraints")
    @classmethod
    def _metrics_exist(
        cls, parts: tuple[Objective | Constraint, ...], info: ValidationInfo
    ) -> tuple[Objective | Constraint, ...]:
        protocol: Protocol | None = info.data.get("protocol")
        if protocol is None:
            return parts
        known = [*protocol.metric_names, *COSTS]
        unknown = [part.metric for part in parts if part.metric not in known]
        if unknown:
            targets, ks = ", ".join(protocol.targets), ", ".join(map(str, protocol.recall_at))
            raise ValueError(
                f"no metric {', '.join(unknown)}; metrics are {', '.join(COSTS)} and TARGET/DIRECTION_rK, where TARGET "
                f"is one of {targets}, DIRECTION of {', '.join(DIRECTIONS)}, and K of {ks}"
            )
        return parts

    @field_validator("budget")
    @classmethod
    def _money_has_a_price(cls, budget: Budget, info: ValidationInfo) -> Budget:
        price = info.data.get("price")
        if budget.money is not None and price is not None and not price.device_hour:
            raise ValueError("money needs price.device_hour, what an hour of a device costs")
        if budget.money is not None and price is not None and price.device not in (None, *price.device_hour):
            known = ", ".join(price.device_hour)
            raise ValueError(f"money needs the price of {price.device}; price.device_hour has {known}")
        return budget

    @field_validator("points")
    @classmethod
    def _points_are_of_the_space(cls, points: Points, info: ValidationInfo) -> Points:
        space: dict[str, Knob] | None = info.data.get("space")
        if space is None:
            return points
        raise_all(problem for point in points for problem in wrong_point(space, point))
        return tuple({name: typed(name, value) for name, value in point.items()} for point in points)

    @field_validator("warm_start")
    @classmethod
    def _others(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if info.data.get("name") in names:
            raise ValueError(f"{info.data['name']} is this study itself")
        return names

    @field_validator("trial")
    @classmethod
    def _every_trial_can_be(cls, trial: TrialTemplate, info: ValidationInfo) -> TrialTemplate:
        data: DataConfig | None = info.data.get("data")
        if data is not None:
            protocol = info.data.get("protocol", Protocol())
            recipes, temperature = info.data.get("recipes", ()), info.data.get("recipe_temperature", RECIPE_TEMPERATURE)
            drawn = trials_of(info.data.get("space", {}), recipes, protocol.epsilon, temperature)
            raise_all(wrong_trials(drawn, trial, protocol, data))
        return trial

    # In a bucket lies what is written whole. What is not has to be elsewhere.

    @field_validator("cache_dir")
    @classmethod
    def _the_cache_is_found_from_any_folder(cls, cache: Path | None, info: ValidationInfo) -> Path | None:
        if isinstance(info.data.get("studies_dir"), UrlPath) and cache is not None and not cache.is_absolute():
            raise ValueError(
                "is relative; where studies_dir is a URL, give a folder that each machine makes on its disk"
            )
        return cache

    @field_validator("tracking")
    @classmethod
    def _a_bucket_holds_no_mlflow(cls, tracking: TrackingConfig, info: ValidationInfo) -> TrackingConfig:
        if isinstance(info.data.get("studies_dir"), UrlPath) and tracking.uri is None:
            raise ValueError("needs uri where studies_dir is a URL: http(s):// of an MLflow server, or a database")
        return tracking

    @field_validator("storage")
    @classmethod
    def _a_bucket_holds_no_ledger(cls, storage: str | None, info: ValidationInfo) -> str | None:
        if isinstance(info.data.get("studies_dir"), UrlPath) and (storage is None or storage.startswith("sqlite")):
            raise ValueError(
                "has to be a database server where studies_dir is a URL, such as postgresql+psycopg://me@db/paretovl: "
                "SQLite keeps its file on a disk, and the database alone keeps a second driver away"
            )
        return storage

    @property
    def paths(self) -> StudyPaths:
        """Where everything of the study is."""
        return StudyPaths(self.studies_dir / self.name)

    @property
    def cache(self) -> Path:
        """Where each machine keeps what it can make again."""
        if self.cache_dir is not None:
            return self.cache_dir
        return (
            Path("~/.cache/paretovl").expanduser()
            if isinstance(self.studies_dir, UrlPath)
            else self.studies_dir / ".cache"
        )

    @property
    def shared_cache(self) -> str | None:
        """Where the machines of a cluster give each other what they made; None where all see one cache."""
        one = self.cache_dir is None and isinstance(self.studies_dir, Path)
        return None if one or self.cluster.address is None else str(self.studies_dir / ".shared")
