"""Names of trials, and from the configuration of a study to theirs."""

from __future__ import annotations

from typing import cast

from search_spaces.recipes import Recipe, recipe_point
from study.config import StudyConfig
from study.records import TrialRecord
from trainables.config import Point, TrialConfig
from trainables.config.fields import SEEDS
from trainables.execution.places import absolute


def trial_key(study: str, number: int) -> str:
    """`<study>-t00042-s0`: number and replicate."""
    return f"{study}-t{number:05d}-s0"


def replicate_key(first: str, replicate: int) -> str:
    """The key of a further run of the same point."""
    return f"{first.removesuffix('-s0')}-s{replicate}"


def point_of(config: StudyConfig, record: TrialRecord) -> Point:
    """What the trial trains with."""
    if record.recipe is None:
        return Point.model_validate(record.params)
    return recipe_point(cast(Recipe, record.recipe), config.protocol.epsilon, config.recipe_temperature)


def seed_of(config: StudyConfig, record: TrialRecord) -> int:
    """Of the trial's randomness: the study's, and another one for each replicate."""
    return (config.seed + 1_000_003 * record.replicate) % SEEDS


def trial_of(config: StudyConfig, template: TrialConfig, record: TrialRecord) -> TrialConfig:
    """The configuration that runs the trial."""
    fields = {"key": record.key, "point": point_of(config, record), "seed": seed_of(config, record)}
    return template.model_copy(update=fields)


def trial_template(config: StudyConfig) -> TrialConfig:
    """What all trials of the study share. Its point changes words if any of them does: captions have to allow it."""
    recipes = (recipe_point(recipe, config.protocol.epsilon, config.recipe_temperature) for recipe in config.recipes)
    words = any(point.words or point.text_augmentation != "none" for point in recipes)
    words = words or not {"words", "text_augmentation"}.isdisjoint(config.space)
    return absolute(
        TrialConfig(
            point=Point(words=int(words)),
            data=config.data,
            model=config.trial.model,
            training=config.trial.training,
            protocol=config.protocol,
            workers=config.trial.workers,
            seed=config.seed,
            cache_dir=config.cache,
            shared_cache=config.shared_cache,
            storage_path=str(config.paths.runs),
        )
    )
