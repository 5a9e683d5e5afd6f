"""What is done of a trial's full evaluation, beside its checkpoints, until the trial has ended."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from trainables.config import TrialConfig
from trainables.files import opened

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "evaluation-"
"""What the names of folders begin with; they end with what an evaluation is of."""


class Shelf:
    """Keeps pieces of an evaluation, see `trainables.evaluation.parts.Kept`; each worker those of its images.

    A piece's name says what is in it, so one that was torn is not there.

    Args:
        config: `storage_path` and `key` name the run.
        seconds: between pieces.
        hurry: whether to keep everything at once.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: TrialConfig,
        seconds: float,
        hurry: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files, root = opened(config.storage_path)
        self._run, self._folder = f"{root}/{config.key}", ""
        self._seconds, self._hurry, self._clock = seconds, hurry, clock
        self._last = clock()

    def of(self, identity: str) -> Shelf:
        """The pieces of one evaluation.

        Args:
            identity: hash of all that decides what it finds: the weights, and what they are measured on.
        """
        self._folder, self._last = f"{self._run}/{FOLDER}{identity}", self._clock()
        return self

    def load(self) -> Iterator[dict[str, Tensor]]:
        """All pieces that are whole."""
        from pyarrow.fs import FileSelector
        from safetensors.torch import load

        there = self._files.get_file_info(FileSelector(self._folder, allow_not_found=True))
        for name in sorted(found.base_name for found in there):
            with self._files.open_input_stream(f"{self._folder}/{name}") as stream:
                content = bytes(stream.read())
            if name == _digest(content):
                yield load(content)

    def due(self) -> bool:
        """Whether it is time for another piece."""
        return self._hurry() or self._clock() - self._last >= self._seconds

    def save(self, piece: dict[str, Tensor]) -> None:
        """Write a piece."""
        from safetensors.torch import save

        content = save({name: tensor.contiguous() for name, tensor in piece.items()})
        self._files.create_dir(self._folder, recursive=True)
        with self._files.open_output_stream(f"{self._folder}/{_digest(content)}") as stream:
            stream.write(content)
        self._last = self._clock()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
