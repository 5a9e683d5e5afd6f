"""What lies in a study's folder under the name of a trial, and is not that trial's."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from study.records import Manifest, StudyPaths, TrialRecord
from trainables.cli.command import read_yaml
from trainables.errors import InputError
from trainables.files import below


def marks(paths: StudyPaths) -> set[str]:
    """The fingerprints that the study has had: the one it has now, and those before changes that were accepted."""
    if not paths.config.exists():
        return set()
    frozen = read_yaml(paths.config)
    return {frozen["hash"], *(change["trials_before"] for change in frozen.get("accepted", []))}


def refuse_strays(
    paths: StudyPaths,
    name: str,
    records: Sequence[TrialRecord],
    manifests: Sequence[Manifest],
    fingerprints: Collection[str],
) -> None:
    """See that what is found by the keys of trials is theirs.

    A trial is in the database before anything of it is on disk. So what the database does not know would be taken for
    a later trial's.

    Args:
        paths: of the study.
        name: of the study.
        records: all trials of the database.
        manifests: of those that have one.
        fingerprints: that the study has had.

    Raises:
        InputError: with everything that is not.
    """
    known, key = {record.key for record in records}, re.compile(re.escape(name) + r"-t\d{5,}-s\d+")
    lost = [
        f"{path}: the database knows no such trial"
        for folder in (paths.root / "trials", paths.runs)
        for path in below(folder, "*")
        if key.fullmatch(path.name) and path.name not in known
    ]
    foreign = [
        f"{paths.manifest(manifest.key)}: was measured under other settings, data or code than this study ever had "
        f"(fingerprint {manifest.fingerprint})"
        for manifest in manifests
        if manifest.fingerprint not in fingerprints
    ]
    if lost or foreign:
        raise InputError(
            "\n".join([*lost, *foreign])
            + "\nput back the database or study.yaml that they belong to; or move them out of the study's folder"
        )
