"""`study.yaml`: the configuration a study was begun with, and the fingerprint that later ones are held against."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from study.arguments import Arguments
from study.config import COSTS, StudyConfig
from study.paths import StudyPaths
from study.records import Frozen, left_on_disk, read_frozen, study_id, write_atomically
from trainables.cli.command import all_mistakes
from trainables.cli.yaml_core import dump
from trainables.config import content_hash
from trainables.errors import InputError, without_password
from trainables.execution.places import MODELS
from trainables.identity import NO_MATTER, attack_content, differences, model_files_digest


def fingerprint(config: StudyConfig, data_digest: str, code_digest: str) -> dict[str, Any]:
    """What makes results comparable: the fields of the config that decide them, and hashes of data, models and code.

    How fast a trial is decides nothing but its cost, and counts only where that is an objective or a constraint.
    """
    deciding = (
        "space",
        "recipes",
        "recipe_temperature",
        "objectives",
        "constraints",
        "protocol",
        "data",
        "trial",
        "seed",
    )
    fields = config.model_dump(mode="json", include=set(deciding))
    for place in ("root", "generated_captions", "linked_folders"):  # the digest says what is there, wherever that is
        fields["data"].pop(place)
    for name in MODELS:  # so does theirs
        named = getattr(config.trial.model, name)
        fields["trial"]["model"][name] = None if named is None else model_files_digest(named, config.cache)
    fields["protocol"]["attacks"] = [attack_content(attack) for attack in config.protocol.attacks]
    fields["trial"]["workers"].pop("cpus_per_worker")
    metrics = [objective.metric for objective in config.objectives]
    if COSTS.keys().isdisjoint([*metrics, *(constraint.metric for constraint in config.constraints)]):
        fields["trial"].pop("workers")
        for name in NO_MATTER["training"]:
            fields["trial"]["training"].pop(name)
    if not any(attack.attack.startswith("torchattacks:") for attack in config.protocol.attacks):
        fields["protocol"].pop("batch_images")
    return {**fields, "data_digest": data_digest, "code_digest": code_digest}


def freeze(config: StudyConfig, mark: dict[str, Any], accept_changes: bool, known_id: str | None = None) -> str:
    """Write `study.yaml`, or hold the config against the one that is there. Returns the fingerprint's hash.

    Budget, early stopping, price, sampler, points, replicates, warm start, tracking, cluster and storage may change.

    Args:
        config: of the study.
        mark: its fingerprint.
        accept_changes: go on with another fingerprint than before.
        known_id: of the study, where its folder does not say it; None: a new one.

    Raises:
        InputError: the fingerprint differs and the change is not accepted; with the differences.
    """
    paths = config.paths
    accepted: list[Any] = []
    preset = config.preset if isinstance(config, Arguments) else None
    if paths.config.exists():
        frozen = read_frozen(paths)
        accepted, preset = frozen.accepted, frozen.preset or preset
        changes = differences(frozen.fingerprint, mark)
        if changes and not accept_changes:
            raise InputError(
                f"study {config.name!r} was begun with other settings, so its trials cannot be compared:\n  "
                + "\n  ".join(changes)
                + "\nuse the old settings, another --name, or --accept-changes to go on all the same (it is recorded)"
            )
        if changes:
            accepted.append({"trials_before": frozen.hash, "changes": changes})
    elif left_on_disk(paths):
        accepted.append({"trials_before": None, "changes": [f"{paths.config.name} was not there"]})
    fields = config.model_dump(mode="json", include=set(StudyConfig.model_fields))
    fields = _kept(fields)
    for place, given in (("root", config.data.root), ("generated_captions", config.data.generated_captions)):
        fields["data"][place] = None if given is None else str(given.resolve())  # found from any folder
    fields["data"]["linked_folders"] = [str(folder.resolve()) for folder in config.data.linked_folders]
    for name in MODELS:
        named = getattr(config.trial.model, name)
        fields["trial"]["model"][name] = str(Path(named).resolve()) if named and Path(named).exists() else named
    frozen = Frozen(
        config=fields,
        id=study_id(paths) or known_id or uuid.uuid4().hex,
        preset=preset,
        hash=content_hash(mark),
        fingerprint=mark,
        accepted=accepted,
    )
    write_atomically(paths.config, dump(frozen.model_dump(mode="json")))
    return frozen.hash


def _kept(value: Any) -> Any:
    """A configuration without the passwords of its URLs."""
    if isinstance(value, dict):
        return {name: _kept(part) for name, part in value.items()}
    return without_password(value) if isinstance(value, str) and "://" in value else value


def load_frozen(paths: StudyPaths) -> StudyConfig:
    """The configuration of an existing study, wherever its folder is now.

    Raises:
        InputError: it cannot be read, or is of a study of another name.
    """
    frozen = read_frozen(paths)
    try:
        return StudyConfig.model_validate({**frozen.config, "studies_dir": paths.root.parent})
    except ValidationError as error:
        raise all_mistakes(error, StudyConfig, f"{paths.config}, perhaps of another version") from None
