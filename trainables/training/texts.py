"""A step's captions as word numbers: drawn on the host, augmented there, and copied to the device in one piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainables.attacks.candidates import Candidates, numbered
from trainables.attacks.lexicon import NONE, Lexicon
from trainables.attacks.noise import sample_keys, step_keys, uniform
from trainables.attacks.substitutes import Substitutes
from trainables.config import TrialConfig
from trainables.training.batches import Drawn

EDA_SHARE = 0.1
"""Of a caption's words that each operation of EDA touches, at least one (Wei and Zou 2019, section 3.2)."""

EDA_STEP = 11
"""Sets EDA's randomness apart from what else belongs to a caption."""


@dataclass(frozen=True, eq=False)
class Texts:
    """A worker's captions.

    Attributes:
        candidates: the captions in order of length, and what may replace their words.
        order: int64 (captions,), which caption of the batch each of `candidates` is.
        back: int64 (captions,), where in `candidates` each caption of the batch is.
        longest: tokens at most, of all workers' captions, attacked or not.
    """

    candidates: Candidates
    order: Tensor
    back: Tensor
    longest: int

    def moved(self, move: Callable[[Tensor], Tensor]) -> Texts:
        """With other tensors of the same values."""
        return replace(self, candidates=self.candidates.moved(move), order=move(self.order), back=move(self.back))


def draw_texts(config: TrialConfig, substitutes: Substitutes, lexicon: Lexicon, parts: list[Drawn], rank: int) -> Texts:
    """The captions of one worker, on the host.

    Args:
        config: of the trial.
        substitutes: of the training captions.
        lexicon: of the model's tokenizer.
        parts: every worker's share of the global batch.
        rank: of this worker.
    """
    point, rows = config.point, np.concatenate([part.captions.flatten() for part in parts])
    augmented = point.text_augmentation == "eda"
    count = config.training.attack_candidates if point.words or augmented else 0
    words, options = numbered(substitutes, rows, lexicon, count)
    if augmented:
        words, options = eda(words, options, sample_keys(config.seed, parts[rank].epoch, torch.from_numpy(rows)))
    everyone = Candidates.of(lexicon, words, options)
    own = np.arange(len(rows)).reshape(len(parts), -1)[rank]
    order = everyone.lengths[own].argsort(kind="stable")
    return Texts(
        Candidates.of(lexicon, words[own[order]], options[own[order]]),
        torch.from_numpy(order),
        torch.from_numpy(order.argsort()),
        int(everyone.longest(point.words).max()),
    )


def eda(words: np.ndarray, options: np.ndarray, keys: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """One of EDA's four operations a caption (Wei and Zou 2019): words replaced, put in, exchanged or left out.

    Args:
        words: int64 (captions, places), see `numbered`.
        options: int64 (captions, places, candidates): what may replace each word, also used for what is put in; none
            for words that stay.
        keys: int64 (captions,), the source of each caption's randomness.

    Returns:
        The new words, and for each what may replace it: none for words that were put in.
    """
    lengths, row = (words != NONE).sum(1), np.arange(len(words))
    touched = np.maximum(1, (EDA_SHARE * lengths).astype(int))
    most = touched.max(initial=0)
    words = np.pad(words, ((0, 0), (0, most)), constant_values=NONE)
    options = np.pad(options, ((0, 0), (0, most), (0, 0)), constant_values=NONE)
    draws = uniform(step_keys(keys, EDA_STEP), (1 + 4 * most,)).double().numpy()
    operation, place = (4 * draws[:, 0]).astype(int), np.arange(words.shape[1])
    done = np.zeros_like(words, dtype=bool)
    for turn in range(most):
        first, second, third, fourth = draws[:, 1 + 4 * turn : 5 + 4 * turn].T
        replaceable = (options != NONE).any(2) & ~done
        source = _drawn(replaceable, first)
        option = options[row, source, _drawn(options[row, source] != NONE, second)]
        acts = (turn < touched) & np.where(operation < 2, replaceable.any(1), lengths > 1)
        at = (third * np.where(operation == 1, lengths + 1, lengths)).astype(int)
        other = (fourth * (lengths - 1)).astype(int)
        other += other >= at
        replaced, put_in, exchanged, left_out = (acts & (operation == kind) for kind in range(4))
        moved = np.tile(place, (len(words), 1))
        moved -= put_in[:, None] & (place > at[:, None])
        moved += left_out[:, None] & (place >= at[:, None])
        moved[exchanged, at[exchanged]], moved[exchanged, other[exchanged]] = other[exchanged], at[exchanged]
        moved = np.minimum(moved, place[-1])  # behind the last word there is none
        words, options = np.take_along_axis(words, moved, 1), np.take_along_axis(options, moved[:, :, None], 1)
        words[replaced, source[replaced]], done[replaced, source[replaced]] = option[replaced], True
        words[put_in, at[put_in]], options[put_in, at[put_in]] = option[put_in], NONE
        lengths = lengths + put_in - left_out
    kept = lengths.max(initial=1)
    return words[:, :kept], options[:, :kept]


def _drawn(possible: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """One of each row's possible places, drawn equally by numbers in [0, 1); 0 where there is none."""
    wanted = (draws * possible.sum(1)).astype(int)
    return (possible.cumsum(1) > wanted[:, None]).argmax(1)
