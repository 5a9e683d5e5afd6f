"""What all trials of a study share, made once and found again by its content: data, candidates, base model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import transformers

from trainables.attacks.text import Substitutes, masked_lm_substitutes
from trainables.config import TrialConfig, content_hash
from trainables.data import Dataset, load_dataset
from trainables.data.cache import locked
from trainables.evaluation.robustness import Gallery
from trainables.models import RetrievalModel
from trainables.models.clip import Clip
from trainables.models.dual import Dual
from trainables.pretrain import load_tiny_masked_lm, make_base, make_language

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SUBSTITUTES = 10
"""Candidates kept per word; attacks may use fewer."""


class ModelError(ValueError):
    """A model that cannot be loaded; says which and what is accepted."""


@dataclass(frozen=True)
class Prepared:
    """Attributes:
    dataset: training and evaluation pairs.
    train: candidates for the training captions.
    gallery: what is evaluated on.
    base: the model before fine-tuning, on the CPU.
    caption_groups: (training captions,) int64, equal for equal texts.
    hashes: of data and base.
    """

    dataset: Dataset
    train: Substitutes
    gallery: Gallery
    base: RetrievalModel
    caption_groups: np.ndarray
    hashes: dict[str, str]


def prepare(config: TrialConfig, log: Callable[[str], None] = lambda line: None) -> Prepared:
    """Load what the trial needs; make what does not exist yet, which takes from seconds to minutes.

    Safe to call from many processes at once: one makes, the others wait.

    Raises:
        DataError: the data set cannot be used.
        ModelError: a named model cannot be loaded.
    """
    cache = config.cache_dir
    dataset = load_dataset(config.data, cache)
    model = config.model
    pretraining = dataset
    if model.pretrain.root is not None:
        pretraining = load_dataset(
            config.data.model_copy(update={"root": model.pretrain.root, "max_train_images": None}), cache
        )
    language_hash = content_hash(
        {"data": pretraining.digest, "epochs": model.pretrain.mlm_epochs, "seed": model.pretrain.seed}
    )
    language = cache / f"language-{language_hash}"
    captions = pretraining.train.captions
    _once(language, lambda folder: make_language(folder, captions, model.pretrain, log))

    substitutes = []
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        lm = model.masked_lm or language_hash
        path = cache / f"substitutes-{content_hash({'data': dataset.digest, 'split': name, 'lm': lm})}.npz"
        if not path.exists():
            with locked(path):
                if not path.exists():
                    log(f"substitutes for {len(split.captions)} captions")
                    masked_lm, tokenizer = _masked_lm(model.masked_lm, language)
                    masked_lm_substitutes(split.captions, masked_lm, tokenizer, SUBSTITUTES).save(path)
        substitutes.append(Substitutes.load(path))
    train, test = substitutes

    if model.base is not None:
        base_hash = content_hash({"base": model.base})
        base: RetrievalModel = _named(model.base, Clip.load)
    else:
        spec = model.model_dump(mode="json", exclude={"masked_lm", "base"})
        base_hash = content_hash({"data": pretraining.digest, "language": language_hash, "model": spec})
        folder = cache / f"base-{base_hash}"
        _once(folder, lambda part: make_base(part, pretraining.train, config, language, log))
        base = Clip.load(str(folder)) if model.image_tower is None else Dual.load(folder)
    gallery = Gallery(dataset.test.pixels, dataset.test.caption_image, _groups(test), test)
    return Prepared(
        dataset,
        train,
        gallery.first(config.protocol.gallery_images),
        base,
        _groups(train),
        {"data": dataset.digest, "base": base_hash, "protocol": content_hash(config.protocol)},
    )


def _groups(substitutes: Substitutes) -> np.ndarray:
    return np.unique(substitutes.texts(), return_inverse=True)[1]


def _once(folder: Path, make: Callable[[Path], None]) -> None:
    """Have `make` fill a folder that appears whole or not at all."""
    if folder.is_dir():
        return
    with locked(folder):
        if not folder.is_dir():
            part = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            make(part)
            os.replace(part, folder)


def _masked_lm(name: str | None, language: Path):  # type: ignore[no-untyped-def]
    if name is None:
        return load_tiny_masked_lm(language)
    return _named(
        name,
        lambda where: (
            transformers.AutoModelForMaskedLM.from_pretrained(where, use_safetensors=True).eval(),
            transformers.AutoTokenizer.from_pretrained(where),
        ),
    )


def _named(name: str, load):  # type: ignore[no-untyped-def]
    try:
        return load(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {name!r} cannot be loaded: {str(error).splitlines()[0]}\n"
            "  give a hub id or a directory with config.json, model.safetensors and a tokenizer"
        ) from error
