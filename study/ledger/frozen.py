"""`study.yaml`: the configuration a study was begun with, and the fingerprint that later ones are held against."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from study.config import StudyConfig
from study.records import StudyPaths, write_atomically
from trainables.command import InputError, all_mistakes, read_yaml, redacted
from trainables.config import content_hash
from trainables.identity import differences
from trainables.yaml_core import dump


def fingerprint(config: StudyConfig, data_digest: str, code_digest: str) -> dict[str, Any]:
    """What makes results comparable: the fields of the config that decide them, and hashes of data and code."""
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
    for place in ("root", "generated_captions"):  # the digest says what is there; where it lies does not matter
        fields["data"].pop(place)
    fields["trial"]["workers"].pop("cpus_per_worker")
    return {**fields, "data_digest": data_digest, "code_digest": code_digest}


def freeze(config: StudyConfig, mark: dict[str, Any], accept_changes: bool) -> str:
    """Write `study.yaml`, or hold the config against the one that is there. Returns the fingerprint's hash.

    Budget, early stopping, price, sampler, points, replicates, warm start, tracking, cluster and storage may change.

    Raises:
        InputError: the fingerprint differs and the change is not accepted; with the differences.
    """
    paths = config.paths
    accepted: list[Any] = []
    if paths.config.exists():
        frozen = read_yaml(paths.config)
        accepted = frozen.get("accepted", [])
        changes = differences(frozen.get("fingerprint"), mark)
        if changes and not accept_changes:
            raise InputError(
                f"study {config.name!r} was begun with other settings, so its trials cannot be compared:\n  "
                + "\n  ".join(changes)
                + "\nuse the old settings, another --name, or --accept-changes to go on all the same (it is recorded)"
            )
        if changes:
            accepted.append({"trials_before": frozen["hash"], "changes": changes})
    digest = content_hash(mark)
    content: dict[str, Any] = {
        "config": config.model_dump(mode="json", include=set(StudyConfig.model_fields)),
        "hash": digest,
        "fingerprint": mark,
        "accepted": accepted,
    }
    content["config"]["storage"] = None if config.storage is None else redacted(config.storage)
    write_atomically(paths.config, dump(content))
    return digest


def load_frozen(paths: StudyPaths) -> StudyConfig:
    """The configuration of an existing study.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return StudyConfig.model_validate(read_yaml(paths.config).get("config", {}))
    except ValidationError as error:
        raise all_mistakes(error, StudyConfig, str(paths.config)) from None
