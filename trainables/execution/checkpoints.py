"""The checkpoints in a trial's run folder: whether they are what was written, and which one to go on from.

Ray Train keeps an account of its own, `checkpoint_manager_snapshot.json`. It is written in place, so a kill may tear
it, and a run that cannot read it never starts again. So nothing goes on by it: it is removed before every attempt, and
the checkpoints themselves say what they are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.config import TrialConfig
from trainables.errors import InputError
from trainables.execution.shelf import FOLDER
from trainables.files import opened
from trainables.identity import differences, file_digest, made_from

KEPT = 2
"""Checkpoints of a trial that has not ended: should the last one be damaged, there is one before it."""

STATE, RESULT = "state.json", "result.json"
"""In a checkpoint: position and origin, and in the last one what was measured."""

SNAPSHOT = "checkpoint_manager_snapshot.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be read: torn, incomplete, or not what was written."""


def seal(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint's state, with the size and the hash of all other files in the folder."""
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, file_digest(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / STATE
    }
    (folder / STATE).write_text(json.dumps({**state, "files": files}), encoding="utf-8")


def read_sealed(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, all of whose files are what they were when it was sealed.

    Raises:
        CheckpointError: they are not.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        changed = [name for name, (_, digest) in state["files"].items() if file_digest(folder / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read ({type(error).__name__}: {error})") from error
    if changed:
        raise CheckpointError(f"checkpoint {folder} cannot be read: not what was written: {', '.join(changed)}")
    return state


@dataclass(frozen=True)
class Checkpoint:
    """One that is all there, by the sizes of its files.

    Attributes:
        name: of its folder in the run folder.
        path: a path, or a URL.
        state: see `seal`.
    """

    name: str
    path: str
    state: dict[str, Any]


class RunFolder:
    """Where Ray Train keeps a trial's checkpoints: the folder of its key at `storage_path`."""

    def __init__(self, config: TrialConfig) -> None:
        self.path = f"{config.storage_path}/{config.key}"
        self._files, root = opened(config.storage_path)
        self._folder = f"{root}/{config.key}"

    def checkpoints(self) -> list[Checkpoint]:
        """Those that are all there, newest first."""
        found = []
        for name in self._names():
            state = self._state(name)
            if state is not None:
                found.append(Checkpoint(name, f"{self.path}/{name}", state))
        return sorted(found, key=_progress, reverse=True)

    def incomplete(self) -> dict[str, str]:
        """Names of those that are not, with a sentence that says so."""
        whole = {found.name for found in self.checkpoints()}
        return {name: f"checkpoint {self.path}/{name} is not all there" for name in self._names() if name not in whole}

    def begin(self, passed_over: Collection[str]) -> Checkpoint | None:
        """Make ready for another attempt, and say what it goes on from; None if it begins anew.

        Args:
            passed_over: names of checkpoints that turned out to be damaged.
        """
        if self._files.get_file_info(f"{self._folder}/{SNAPSHOT}").is_file:
            self._files.delete_file(f"{self._folder}/{SNAPSHOT}")
        self.keep(KEPT, passed_over)
        return next((found for found in self.checkpoints() if found.name not in passed_over), None)

    def keep(self, count: int, passed_over: Collection[str] = ()) -> None:
        """Remove all but the newest ones that are whole; and, once the trial is complete, what it kept until then."""
        good = [found.name for found in self.checkpoints() if found.name not in passed_over]
        for name in set(self._names()) - set(good[:count]) - set(passed_over):
            self._files.delete_dir(f"{self._folder}/{name}")
        if any(found.state.get("report", {}).get("last") for found in self.checkpoints()[:1]):
            for name in self._names(FOLDER):
                self._files.delete_dir(f"{self._folder}/{name}")

    def refuse_others(self, config: TrialConfig, hashes: Mapping[str, str]) -> None:
        """See that what is here belongs to this trial.

        Raises:
            InputError: it was made from something else.
        """
        for found in self.checkpoints():
            if other := other_origin(found.state, config, hashes):
                raise InputError(
                    f"{self.path} holds a trial that was made from something else:\n  "
                    + "\n  ".join(other)
                    + "\ngive this trial another key or storage_path (in a study, another --name), or move that folder "
                    "away to begin anew"
                )

    def _names(self, beginning: str = "checkpoint_") -> list[str]:
        from pyarrow.fs import FileSelector, FileType

        found = self._files.get_file_info(FileSelector(self._folder, allow_not_found=True))
        return [
            one.base_name for one in found if one.type is FileType.Directory and one.base_name.startswith(beginning)
        ]

    def _state(self, name: str) -> dict[str, Any] | None:
        folder = f"{self._folder}/{name}"
        try:
            with self._files.open_input_stream(f"{folder}/{STATE}") as stream:
                state: dict[str, Any] = json.loads(bytes(stream.read()))
            sizes = {file: size for file, (size, _) in state["files"].items()}
            state["step"] + 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        there = self._files.get_file_info([f"{folder}/{file}" for file in sizes])
        return state if [one.size for one in there] == list(sizes.values()) else None


def _progress(found: Checkpoint) -> tuple[int, bool, str]:
    """There are two of a step that ends an epoch: one before its evaluation, and one after."""
    return found.state["step"], found.state.get("measured", True), found.name


def other_origin(state: Mapping[str, Any], config: TrialConfig, hashes: Mapping[str, str]) -> list[str]:
    """How the trial of a checkpoint differs from this one, `field: there -> here`; what is not told is not compared.

    Args:
        state: of the checkpoint.
        config: of this trial.
        hashes: those that are known, see `made_from`.
    """
    mine = made_from(config, hashes)
    theirs = state.get("made_from") or {}
    if "owner" not in theirs:  # of an earlier version
        mine.pop("owner")
    return differences({name: theirs.get(name) for name in mine}, mine)
