"""What lies in a study's folder under the name of a trial, and is not that trial's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from study.config import StudyConfig
from study.paths import StudyPaths
from study.records import Manifest, TrialRecord, study_id
from trainables.cli.command import read_yaml
from trainables.errors import InputError
from trainables.files import Location

READ = ("data", "base", "substitutes")
"""Of the hashes of a result: what it was made from."""


def marks(paths: StudyPaths) -> set[str]:
    """The fingerprints that the study has had: the one it has now, and those before changes that were accepted."""
    if not paths.config.exists():
        return set()
    frozen = read_yaml(paths.config)
    return {frozen["hash"], *(change["trials_before"] for change in frozen.get("accepted", []))}


def refuse_strays(
    config: StudyConfig,
    left: Mapping[str, Location],
    records: Sequence[TrialRecord],
    manifests: Sequence[Manifest],
    fingerprints: Collection[str],
) -> None:
    """See that what is found by the keys of trials is theirs.

    A trial is in the database before anything of it is on disk. So what the database does not know would be taken for
    a later trial's.

    Args:
        config: of the study.
        left: what was on disk of trials before the database was read, by key.
        records: all trials of the database.
        manifests: of those that have one.
        fingerprints: that the study has had.

    Raises:
        InputError: with everything that is not.
    """
    paths, known = config.paths, {record.key for record in records}
    lost = [f"{folder}: the database knows no such trial" for key, folder in left.items() if key not in known]
    foreign = wrong_origins(paths, manifests, fingerprints)
    advice = "put back the database or study.yaml that they belong to; or move them out of the study's folder"
    if lost:
        advice += f"; or make the study in its database again from its files: {paths.rebuild_command(config.storage)}"
    if lost or foreign:
        raise InputError("\n".join([*lost, *foreign, advice]))


def replaced(hashes: Mapping[str, str], manifests: Iterable[Manifest], fingerprint: str) -> list[str]:
    """What an ended trial was made from other than the trials before it: a session does not see a file replaced.

    Args:
        hashes: of what the trial read, see `TrialResult.hashes`.
        manifests: of the study.
        fingerprint: under which the trial ran; those under others count for nothing.
    """
    before = next((one.hashes for one in manifests if one.fingerprint == fingerprint and one.hashes), {})
    return [name for name in READ if name in before and hashes.get(name) != before[name]]


def wrong_origins(paths: StudyPaths, manifests: Sequence[Manifest], fingerprints: Collection[str]) -> list[str]:
    """Accounts that are of another study, or were measured under what it never was.

    Args:
        paths: of the study.
        manifests: found in its folder.
        fingerprints: that the study has had.
    """
    mine = study_id(paths)
    return [
        f"{paths.manifest(manifest.key)}: is of another study (id {manifest.study}) than this one (id {mine})"
        if manifest.study not in (None, mine)
        else f"{paths.manifest(manifest.key)}: was measured under other settings, data or code than this study ever "
        f"had (fingerprint {manifest.fingerprint})"
        for manifest in manifests
        if manifest.study not in (None, mine) or manifest.fingerprint not in fingerprints
    ]
