"""What all trials of a study share, made once and found again by its content: data, substitutes, base model."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from trainables.attacks.proposals import Proposer
from trainables.attacks.quirks import Quirks
from trainables.attacks.registry import build_attacks
from trainables.attacks.substitutes import Substitutes
from trainables.captions import CaptionText, bare_text, caption_text, refuse_unspaced
from trainables.config import TrialConfig, content_hash
from trainables.data import Dataset, Split, load_dataset
from trainables.data.cache import locked, remembered_array
from trainables.data.depot import bring, give, offered
from trainables.errors import InputError
from trainables.evaluation.robustness import Gallery
from trainables.identity import model_files_digest
from trainables.models import RetrievalModel, check_length
from trainables.models.loading import family_of, load, load_masked_lm
from trainables.training.exchange import alone
from trainables.training.pretraining import Log, make_base, make_masked_lm, make_tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


VERSION = 8
"""Of how tokenizers, masked language models and base models are made: part of their identity."""

SHARD = 4096
"""Captions that a process makes substitutes for before it looks what others have made."""


@dataclass(frozen=True)
class Prepared:
    """Everything a trial starts from.

    Attributes:
        dataset: training and evaluation pairs.
        train: substitutes for the training captions.
        gallery: what is evaluated on.
        base: the model before fine-tuning, on the CPU.
        caption_groups: (training captions,) int64, equal for equal words.
        hashes: see `Workshop.hashes`.
        cache_dir: where more that all trials share is kept, by these hashes; None if they say nothing.
    """

    dataset: Dataset
    train: Substitutes
    gallery: Gallery
    base: RetrievalModel
    caption_groups: np.ndarray
    hashes: dict[str, str]
    cache_dir: Path | None = None


class Workshop:
    """Makes the parts that do not exist yet. Many processes may try at once: one makes, the others wait.

    Args:
        config: of the trial.
        log: for progress.
        family: of the model that reads the captions, where it is at hand; found out from the config if not given.
        beat: called after every part of what takes long.
    """

    def __init__(
        self, config: TrialConfig, log: Log, family: str | None = None, beat: Callable[[], object] = lambda: None
    ) -> None:
        self.config, self.log, self.cache, self._family, self._beat = config, log, config.cache_dir, family, beat
        self.dataset = load_dataset(config.data, self.cache)

    @cached_property
    def pretraining(self) -> Dataset:
        """What small models are trained on."""
        root = self.config.model.pretrain.root
        if root is None:
            return self.dataset
        other = {"root": root, "max_train_images": None, "generated_captions": None, "shards": None}
        return load_dataset(self.config.data.model_copy(update=other), self.cache)

    @cached_property
    def family(self) -> str:
        """Of the base model."""
        model = self.config.model
        if self._family is not None:
            return self._family
        if model.base is not None:
            return family_of(model.base)
        return model.family or ("clip" if model.image_tower is None else "dual")

    @property
    def caption_text(self) -> CaptionText:
        """What the model reads of a caption."""
        return caption_text(self.family, self.config.model.caption_text)

    @property
    def _text(self) -> list[str]:
        return [self.family, self.config.model.caption_text]

    @property
    def _changes_words(self) -> bool:
        point, attacks = self.config.point, build_attacks(self.config.protocol).values()
        in_training = point.words > 0 or point.text_augmentation == "eda"
        return in_training or any("text" in attack.changes and attack.words != 0 for attack in attacks)

    def _texts(self, captions: Sequence[str]) -> list[str]:
        return list(map(self.caption_text, captions))

    def tokenizer(self) -> Path:
        """Folder of the tokenizer trained on the captions."""
        return self._once(
            "tokenizer",
            {"version": VERSION, "data": self.pretraining.train.digest, "text": self._text},
            lambda part: make_tokenizer(part, self._texts(self.pretraining.train.captions)),
        )

    def substitutes(self) -> tuple[Substitutes, Substitutes]:
        """For the training and the evaluation captions."""
        return self._substitutes("train"), self._substitutes("evaluation")

    def _substitutes(self, name: str, quirks: Quirks = frozenset()) -> Substitutes:
        split: Split = getattr(self.dataset, name)
        captions = split.captions
        if self._changes_words:
            refuse_unspaced(captions)
        identity = {
            "version": VERSION,
            "data": split.digest,
            "text": self._text,
            "masked_lm": self._masked_lm_identity,
            "quirks": sorted(quirks),
        }
        path = self.cache / f"substitutes-{content_hash(identity)}"
        if Substitutes.load(path) is None and offered(path):
            with locked(path):
                if Substitutes.load(path) is None:
                    bring(path)
        found = Substitutes.load(path) or self._make_substitutes(path, captions, quirks)
        if self._changes_words and found.empty:
            raise InputError(
                f"model.masked_lm {self.config.model.masked_lm or 'of the captions'} proposes no word for any of "
                f"{len(captions)} captions: its tokenizer has pieces or characters where they have words\n"
                "  give one with whole words, such as google-bert/bert-base-uncased, or leave it empty"
            )
        return found

    def _make_substitutes(self, path: Path, captions: Sequence[str], quirks: Quirks) -> Substitutes:
        """By all processes that ask for them at once, each on its device; one that is killed loses its shard."""
        folder = path.with_name(f"{path.name}.shards")
        shards = {folder / str(start): slice(start, start + SHARD) for start in range(0, len(captions), SHARD)}
        with locked(path, fcntl.LOCK_SH):  # nobody joins and tidies meanwhile
            if Substitutes.load(path) is None:
                folder.mkdir(exist_ok=True)
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                masked_lm, tokenizer = self.masked_lm()
                proposer = Proposer(masked_lm.to(device), tokenizer, quirks)
                texts = self._texts(captions)
                silent = not proposer.reads(texts)
                self.log(f"substitutes for {len(captions)} captions")
                for how in (fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_EX):  # what is free, then what others left
                    for shard, part in shards.items():
                        with locked(shard, how) as held:
                            if held and Substitutes.load(shard) is None:
                                proposer.propose(texts[part], silent).save(shard)
                        self._beat()
        with locked(path):
            found = Substitutes.load(path)
            if found is None:
                parts = [made for shard in shards if (made := Substitutes.load(shard)) is not None]
                if len(parts) < len(shards):
                    raise OSError(f"{folder} does not read back as written; is the file system of the cache sound?")
                found = Substitutes.join(parts)
                found.save(path)
                give(path)
                found = Substitutes.load(path) or found  # of another node, if that was faster
                shutil.rmtree(folder)
        return found

    def groups(self, name: str) -> np.ndarray:
        """(captions of the split,) int64: captions of the same words are the same, however they are punctuated."""
        split: Split = getattr(self.dataset, name)
        identity = {"version": VERSION, "data": split.digest}

        def make() -> np.ndarray:
            numbers: dict[str, int] = {}
            return np.array([numbers.setdefault(bare_text(caption), len(numbers)) for caption in split.captions])

        return remembered_array(self.cache / f"groups-{content_hash(identity)}.npy", make)

    def gallery(self) -> Gallery:
        """What is evaluated on, whole."""
        split = self.dataset.evaluation
        return Gallery(
            split.pixels,
            split.caption_image,
            self.groups("evaluation"),
            self._substitutes("evaluation"),
            cache(lambda quirks: self._substitutes("evaluation", quirks)),
            self.caption_text,
        )

    def base(self) -> RetrievalModel:
        """The model before fine-tuning."""
        model = self.config.model
        if model.base is not None:
            base = load(model.base, self.config.data.image_pixels)
            for guess in base.guesses:
                self.log(f"{model.base}: {guess}")
            if model.family not in (None, base.family):
                raise InputError(f"model.family is {model.family}, but {model.base} is a {base.family}")
            check_length(base, model.max_tokens)
            return base
        tokenizer = self.tokenizer()
        pairs = replace(self.pretraining.train, captions=self._texts(self.pretraining.train.captions))
        folder = self._once(
            "base", self._base_identity, lambda part: make_base(part, pairs, self.config, tokenizer, self.log)
        )
        return load(str(folder))

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Of what is in the data, in the base model and in the substitutes. Where it lies does not matter."""
        return {
            "data": self.dataset.digest,
            "base": content_hash(self._base_identity),
            "substitutes": self.substitutes_hash,
        }

    @cached_property
    def substitutes_hash(self) -> str:
        """Of what proposes words."""
        return content_hash({"text": self._text, "masked_lm": self._masked_lm_identity})

    @cached_property
    def _base_identity(self) -> dict[str, Any]:
        model = self.config.model
        if model.base is not None:
            return {"base": model_files_digest(model.base, self.cache)}
        towers = {
            name: model_files_digest(named, self.cache)
            for name in ("image_tower", "text_tower")
            if (named := getattr(model, name)) is not None
        }
        fields = model.model_dump(mode="json", exclude={"masked_lm": True, "pretrain": {"root", "mlm_epochs"}})
        return {
            "version": VERSION,
            "data": self.pretraining.train.digest,
            "pixels": self.config.data.image_pixels,
            "model": {**fields, **towers},
        }

    @cached_property
    def _masked_lm_identity(self) -> str | dict[str, Any]:
        named = self.config.model.masked_lm
        return self._own_masked_lm if named is None else model_files_digest(named, self.cache)

    @property
    def _own_masked_lm(self) -> dict[str, Any]:
        pretrain = self.config.model.pretrain
        return {
            "version": VERSION,
            "data": self.pretraining.train.digest,
            "text": self._text,
            "epochs": pretrain.mlm_epochs,
            "seed": pretrain.seed,
        }

    def masked_lm(self) -> tuple[Any, Any]:
        """What proposes words, in eval mode, and its tokenizer."""
        return load_masked_lm(self.config.model.masked_lm or str(self._masked_lm_folder()))

    def _masked_lm_folder(self) -> Path:
        tokenizer, pretrain = self.tokenizer(), self.config.model.pretrain
        texts = self._texts(self.pretraining.train.captions)
        return self._once(
            "masked-lm", self._own_masked_lm, lambda part: make_masked_lm(part, texts, tokenizer, pretrain, self.log)
        )

    def _once(self, name: str, identity: dict[str, Any], make: Callable[[Path], None]) -> Path:
        """A folder that appears whole or not at all."""
        folder = self.cache / f"{name}-{content_hash(identity)}"
        if not folder.is_dir():
            with locked(folder):
                if not folder.is_dir() and not bring(folder):
                    part = folder.with_name(f"{folder.name}.part")
                    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
                    part.mkdir(parents=True)
                    with alone():  # another worker's node may have it
                        make(part)
                    os.replace(part, folder)
                    give(folder)
        return folder


def prepare(config: TrialConfig, log: Log = lambda line: None, beat: Callable[[], object] = lambda: None) -> Prepared:
    """Load what the trial starts from; make what does not exist yet, which takes from seconds to minutes.

    Args:
        config: of the trial.
        log: for progress.
        beat: called after every part of what takes long.

    Raises:
        DataError: the data set cannot be used.
        InputError: a named model cannot be loaded.
    """
    workshop = Workshop(config, log, beat=beat)
    train, _ = workshop.substitutes()
    dataset = workshop.dataset
    return Prepared(
        dataset,
        train,
        workshop.gallery().first(config.protocol.gallery_images),
        workshop.base(),
        workshop.groups("train"),
        workshop.hashes,
        config.cache_dir,
    )
