"""The study in a database, made from what is on disk of it: anew, or for other knobs, objectives or constraints."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import optuna
from optuna.study import StudyDirection

from search_spaces.recipes import recipe_point
from search_spaces.space import params_of
from study.config import StudyConfig
from study.front.dominance import measured
from study.ledger.asked import as_trial, asked_before, read_asked
from study.ledger.whereabouts import refuse_older_copy
from study.paths import StudyPaths
from study.records import Asked, Manifest, left_on_disk, read_manifest, study_id
from trainables.errors import InputError, redacted

Storage = optuna.storages.RDBStorage

ID, FINGERPRINT = "paretovl_study", "paretovl_fingerprint"
"""User attributes of the Optuna study: its id, and the hash of the fingerprint that it was last opened with."""

MOVED, UNFINISHED = "paretovl_moved_to", "paretovl_unfinished"
"""User attributes: the database that the study was moved to; and whether it is still being made from its files."""

EARLIER_ID = "paretovl_folder"
"""The name under which earlier versions kept the id."""

CARRIED = ("space", "objectives", "constraints")
"""Fields of the fingerprint that decide how a database holds the trials."""


def id_of(study: optuna.Study) -> str | None:
    """The id in the database."""
    return study.user_attrs.get(ID, study.user_attrs.get(EARLIER_ID))


def cannot_carry(before: Sequence[str], config: StudyConfig, manifests: Sequence[Manifest]) -> list[str]:
    """Why ended trials cannot be trials of a changed study: what they did not measure, and what their accounts deny.

    Args:
        before: metrics that were objectives.
        config: of the study, as it is to be.
        manifests: of all ended trials.
    """
    ended = [manifest for manifest in manifests if manifest.metrics]
    problems = []
    for objective in config.objectives:
        without = [m.key for m in ended if not np.isfinite(measured(m, objective.metric).value)]
        if without and objective.metric not in before:
            shared = set.intersection(*({name for name, metric in m.metrics.items()} for m in ended))
            problems.append(
                f"objectives: {objective.metric} was never measured in {len(without)} of {len(ended)} trials, such as "
                f"{without[0]}; all have measured {', '.join(sorted(shared)) or 'nothing'}"
            )
    for manifest in ended:
        broken = [str(c) for c in config.constraints if c.excess(measured(manifest, c.metric).value) > 0]
        if (manifest.state == "infeasible") != bool(broken):
            now = f"does not keep {', '.join(broken)}" if broken else "would keep all of them"
            problems.append(f"constraints: {manifest.key} ended {manifest.state}, and {now}")
    return problems


def asked_on_disk(paths: StudyPaths) -> dict[int, Asked]:
    """What was asked of every trial of which something is on disk, by number.

    Raises:
        InputError: with all files that are of another study or another trial.
    """
    found: dict[int, Asked] = {}
    mine, mistakes = study_id(paths), []
    for key, folder in left_on_disk(paths).items():
        if key.rpartition("-t")[0] != paths.root.name:
            mistakes.append(f"{folder}: is of a study of another name")
            continue
        try:
            asked, manifest = read_asked(paths, key), read_manifest(paths.manifest(key))
        except InputError as error:
            mistakes.append(str(error))
            continue
        if manifest is not None and (asked is None or asked.state == "waiting"):
            asked = asked_before(manifest)
        if asked is None:
            continue
        if manifest is not None and (manifest.key, manifest.params) != (key, asked.params):
            mistakes.append(f"{paths.manifest(key)}: is the account of another trial than {paths.asked(key)}")
        if asked.key != key or asked.study not in (None, mine) or asked.number in found:
            mistakes.append(f"{paths.asked(key)}: is of another trial or study")
        found[asked.number] = asked
    if mistakes:
        raise InputError("\n".join([*mistakes, "put back what was there, or move them out of the study's folder"]))
    return found


def make_study(config: StudyConfig, storage: Storage, asked: dict[int, Asked]) -> list[int]:
    """Make the study in a database in which it is not, its trials waiting or running.

    Returns:
        Numbers of trials of which nothing is on disk. They are asked anew.

    Args:
        config: of the study.
        storage: where to.
        asked: what was asked of its trials.
    """
    directions = [StudyDirection[objective.direction.upper()] for objective in config.objectives]
    made = optuna.create_study(study_name=config.name, storage=storage, directions=directions)._study_id
    storage.set_study_user_attr(made, UNFINISHED, True)
    storage.set_study_user_attr(made, ID, study_id(config.paths))
    if config.paths.sampler.exists():
        for key, value in json.loads(config.paths.sampler.read_text(encoding="utf-8")).items():
            storage.set_study_system_attr(made, key, value)
    unknown = [number for number in range(max(asked, default=-1) + 1) if number not in asked]
    for number in range(max(asked, default=-1) + 1):
        nothing = Asked(study=None, key="", number=number, state="waiting", attributes={"given": {}})
        storage.create_new_trial(made, as_trial(_fixed(config, asked.get(number, nothing)), config.space))
    storage.set_study_user_attr(made, UNFINISHED, False)
    return unknown


def _fixed(config: StudyConfig, asked: Asked) -> Asked:
    """A recipe that waits is the point that it is in the space now."""
    recipe = asked.attributes.get("recipe")
    if asked.state == "running" or recipe is None or asked.attributes.get("replicate"):
        return asked
    point = recipe_point(recipe, config.protocol.epsilon, config.recipe_temperature)
    fixed = {"fixed_params": params_of(config.space, point) or {}}
    return asked.model_copy(update={"system": {**asked.system, **fixed}})


def make_room(config: StudyConfig, storage: Storage, asked: dict[int, Asked], lost: bool = False) -> None:
    """Remove from a database what it has of the study.

    Args:
        config: of the study.
        storage: its database.
        asked: what was asked of trials, as it is on disk.
        lost: what it has beyond that is given up.

    Raises:
        InputError: it is another study, has trials of which nothing is on disk, or was worked on from another
            folder.
    """
    try:
        study = optuna.load_study(study_name=config.name, storage=storage)
    except KeyError:
        return
    where, trials = redacted(config.storage or str(config.paths.database)), study.get_trials(deepcopy=False)
    if id_of(study) != study_id(config.paths) and (trials or id_of(study) is not None):
        raise InputError(
            f"storage: {where} has another study {config.name!r}; give another --storage, or remove that one: optuna "
            f'delete-study --study-name {config.name} --storage "$STORAGE_URL"'
        )
    if lost:
        storage.delete_study(study._study_id)
        return
    refuse_older_copy(config.paths, study, where, config.paths.rebuild_command(config.storage))
    only = [trial.number for trial in trials if trial.number not in asked]
    if only and not study.user_attrs.get(UNFINISHED) and not study.user_attrs.get(MOVED):
        raise InputError(
            f"storage: the study in {where} has trials of which nothing is in {config.paths.root / 'trials'}: "
            f"{', '.join(map(str, only))} (by number); put these files back"
        )
    storage.delete_study(study._study_id)
