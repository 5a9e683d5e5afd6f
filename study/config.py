"""`StudyConfig`: one schema for presets, YAML files, `PARETOVL_...` variables and command-line flags."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from search_spaces.space import Knob
from trainables.config import (
    DataConfig,
    Model,
    ModelConfig,
    Protocol,
    TrainingConfig,
    WorkersConfig,
    content_hash,
    metric_names,
)

PRESETS = Path(__file__).parent / "presets"


class ConfigError(Exception):
    """Input that cannot be used; its text is the whole message for the user. Exit code 2."""


class Objective(Model):
    """One measured number to optimise.

    Hypervolume is taken in the unit box between `low` and `high` with the reference point 10 % of the range beyond
    the worse end (Ishibuchi et al. 2018, "How to specify a reference point").
    """

    metric: str = Field(description="a metric of the evaluation, such as both/mr_r5, or cost/device_seconds")
    direction: Literal["maximize", "minimize"] = "maximize"
    low: float = 0.0
    high: float = 1.0

    @model_validator(mode="after")
    def _range(self) -> Objective:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self


class Budget(Model):
    """When a study is done."""

    trials: int = Field(12, ge=0, le=1_000_000, description="searched trials; recipes come on top")
    max_failures: int = Field(2, ge=0, description="retries of a trial whose worker or node was lost")


class TrialTemplate(Model):
    """What all trials share."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    workers: WorkersConfig = WorkersConfig()


class TrackingConfig(Model):
    """Where MLflow keeps the projection."""

    uri: str | None = Field(None, description="MLflow tracking URI; empty: a SQLite file in the study's folder")


class ClusterConfig(Model):
    """Where trials run."""

    address: str | None = Field(None, description="Ray cluster (host:port, or auto); empty: this machine")
    concurrency: int | None = Field(None, ge=1, description="trials at once; empty: as many as fit")
    launch_timeout_seconds: float = Field(300, gt=0, description="how long to wait for the cluster")


def _name(value: str) -> str:
    if not value or not value[0].isalnum() or not all(c.isalnum() or c in "._-" for c in value):
        raise ValueError("use letters, digits, dot, dash and underscore, starting with a letter or digit")
    return value


class StudyConfig(Model):
    """A named, resumable exploration."""

    name: Annotated[str, AfterValidator(_name)] = Field("quickstart", description="also the folder's name")
    studies_dir: Path = Field(Path("studies"), description="root of all studies")
    space: dict[str, Knob] = Field(description="knobs by name; see search_spaces")
    recipes: tuple[Literal["finetune", "tecoa_itr", "fare", "mat"], ...] = Field(
        ("finetune", "tecoa_itr", "fare", "mat"), description="published defences run first"
    )
    objectives: tuple[Objective, ...] = Field(min_length=1, max_length=4)
    budget: Budget = Budget()
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = Field(0, ge=0)
    data: DataConfig = DataConfig()
    trial: TrialTemplate = TrialTemplate()
    protocol: Protocol = Protocol()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: str | None = Field(None, description="Optuna storage URL; empty: SQLite in the study's folder")
