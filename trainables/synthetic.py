"""Everything a trial starts from, made of random numbers: at any size, without data and without weights.

For measuring speed. Of accuracy it says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, product

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase, SiglipConfig, SiglipModel
from transformers.models.blip.configuration_blip import BlipConfig
from transformers.models.blip.modeling_blip import BlipForImageTextRetrieval

from trainables.attacks.substitutes import STOP_WORDS, SUBSTITUTES, Substitutes
from trainables.captions import bare_text
from trainables.config import TinyConfig
from trainables.data import Dataset, Split
from trainables.errors import InputError
from trainables.evaluation.robustness import Gallery
from trainables.models import RetrievalModel
from trainables.models.albef import Albef, AlbefConfig, AlbefNetwork
from trainables.models.blip import Blip
from trainables.models.clip import Clip, tiny_towers
from trainables.models.fusion import tiny_config
from trainables.models.siglip import Siglip
from trainables.models.tokenizers import without_end
from trainables.prepare import Prepared
from trainables.training.pretraining import train_tokenizer

CAPTIONS = 5
"""Of an image, as in COCO and Flickr30k."""
LENGTHS = (8, 14)
"""Words of a caption are drawn from this range, the second excluded: COCO's mean is 10.5."""
FUNCTION_WORDS = 0.35
"""Share of words that no attack changes."""


def made_up_words(count: int) -> list[str]:
    """So many different words, none of them a stop word.

    Example:
        >>> made_up_words(3)
        ['bababa', 'babada', 'babafa']
    """
    syllables = [consonant + vowel for vowel in "aeiou" for consonant in "bdfgklmnprstvz"]
    words = map("".join, product(syllables, repeat=3))
    return list(islice((word for word in words if word not in STOP_WORDS), count))


def tokenizer_of(words: Sequence[str]) -> PreTrainedTokenizerBase:
    """Knows each of the words, and the stop words."""
    known = [*words, *sorted(STOP_WORDS)]
    return train_tokenizer([" ".join(known)], 2 * len(known) + 100)


def made_up_captions(count: int, words: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Captions of `LENGTHS`; frequent words come first in `words`, and every rank's share falls as its inverse."""
    function = sorted(STOP_WORDS)
    lengths = rng.integers(*LENGTHS, count)
    draws = rng.random((int(lengths.sum()), 2))
    chosen = iter(
        function[int(rank * len(function))] if kind < FUNCTION_WORDS else words[int(len(words) ** rank) - 1]
        for kind, rank in draws.tolist()
    )
    return [" ".join(islice(chosen, length)) for length in lengths.tolist()]


def made_up_substitutes(captions: Sequence[str], words: Sequence[str], rng: np.random.Generator) -> Substitutes:
    """`SUBSTITUTES` random words for every word that is no stop word."""
    split = [caption.split() for caption in captions]
    options = [
        [
            [] if word in STOP_WORDS else [words[i] for i in rng.integers(len(words), size=SUBSTITUTES).tolist()]
            for word in caption
        ]
        for caption in split
    ]
    return Substitutes.build(split, options)


def random_model(
    family: str,
    image: TinyConfig,
    text: TinyConfig,
    image_pixels: int,
    max_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> RetrievalModel:
    """A model of these towers with random weights, on the device.

    Args:
        family: `clip`, `siglip`, `albef` or `blip`.
        image: the image tower, and the space that both share.
        text: the text tower; of ALBEF's, the upper half fuses.
        image_pixels: of a side.
        max_tokens: of a caption.
        tokenizer: over whose vocabulary.
        device: where it is made.

    Raises:
        InputError: another family.
    """
    with torch.device(device):
        if family in ("clip", "siglip"):
            words, _ = tiny_towers(text, image_pixels, max_tokens, tokenizer)
            _, vision = tiny_towers(image, image_pixels, max_tokens, tokenizer)
            if family == "siglip":
                return Siglip(SiglipModel(SiglipConfig(text_config=words, vision_config=vision)), tokenizer)
            config = CLIPConfig(text_config=words, vision_config=vision, projection_dim=image.embedding)
            return Clip(CLIPModel(config), tokenizer)
        if family not in ("albef", "blip"):
            raise InputError(f"a {family} is not made of random numbers; clip, siglip, albef and blip are")
        entries = len(tokenizer) + 2 * (family == "blip")
        values, words = (
            tiny_config(tower, image_pixels, max_tokens, entries, tokenizer.pad_token_id) for tower in (image, text)
        )
        values["text_config"] = words["text_config"]
        if family == "blip":
            return Blip(BlipForImageTextRetrieval(BlipConfig(**values)), tokenizer)
        values["text_config"]["num_hidden_layers"] = max(2, text.layers)
        return Albef(AlbefNetwork(AlbefConfig(**values)), without_end(tokenizer))


def synthetic(
    model: RetrievalModel, pixels: np.ndarray, gallery_images: int, words: Sequence[str], repeats: int = 1
) -> Prepared:
    """What `prepare` gives, of made-up captions for given pixels. The gallery is the first of the training images.

    Args:
        model: to begin with.
        pixels: uint8 (images, 3, height, width).
        gallery_images: of the gallery.
        words: that captions are made of, most frequent first.
        repeats: how often the same images come again in training, with the same captions.
    """
    rng, images = np.random.default_rng(0), len(pixels)
    captions = made_up_captions(CAPTIONS * images, words, rng)
    rows, places = np.arange(len(captions)), np.arange(images)
    proposals = made_up_substitutes(captions, words, rng)
    split = Split(places, captions, rows, np.repeat(places, CAPTIONS), pixels)
    groups = np.unique(captions, return_inverse=True)[1]
    gallery = Gallery(pixels, split.caption_image, groups, proposals, lambda quirks: proposals, bare_text)
    if repeats > 1:
        every = np.arange(repeats * images)
        owner, tiled = np.repeat(every, CAPTIONS), np.tile(pixels, (repeats, 1, 1, 1))
        split = Split(every, repeats * captions, np.arange(len(owner)), owner, tiled)
        groups = np.tile(groups, repeats)
    split = replace(split, digest=f"synthetic-{len(split.pixels)}-{pixels.shape[-1]}")
    dataset = Dataset(split, split)
    hashes = {"data": dataset.digest, "base": "random", "substitutes": "random"}
    train = proposals.take(np.tile(rows, repeats))
    return Prepared(dataset, train, gallery.first(gallery_images), model, groups, hashes)
