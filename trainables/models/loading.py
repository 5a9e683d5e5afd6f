"""One way in: a model by its name, whatever its family and layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PretrainedConfig

from trainables.command import InputError
from trainables.models import RetrievalModel
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.models.clip import Clip
from trainables.models.dual import Dual
from trainables.models.official import State, read_state
from trainables.models.siglip import Siglip

FAMILIES: dict[str, type[Albef | Blip | Clip | Siglip]] = {
    "clip": Clip,
    "siglip": Siglip,
    "blip": Blip,
    "albef": Albef,
}
"""By `model_type` in `config.json`."""

RETRIEVAL_PIXELS = 384
"""ALBEF's and BLIP's `image_res` in their configurations for retrieval."""

SIGNS: dict[str, type[Albef | Blip | Clip]] = {
    "visual.transformer.resblocks.0.attn.in_proj_weight": Clip,
    "text_encoder.encoder.layer.0.crossattention.self.query.weight": Blip,  # in ALBEF the lower layers have none
    "visual_encoder.blocks.0.attn.qkv.weight": Albef,
}
"""By an entry that is in the published file; the first that is found decides."""


def load(name: str, image_pixels: int | None = None) -> RetrievalModel:
    """A model from the hub, from a directory, or from a file of OpenAI, open_clip, BLIP or ALBEF.

    Args:
        name: a directory, a checkpoint file, or a hub id.
        image_pixels: of a side of the images to come; a file's position embeddings are resampled to it, as the
            publications do. Other models interpolate while they run. If it is not given, CLIP's own, and 384 for
            ALBEF and BLIP, whose retrieval is published at that size also where the file was pre-trained at less.

    Raises:
        InputError: nothing there, a family that is not known, or a checkpoint that does not fit its family.
    """
    with _told(name):
        return _from_file(Path(name), image_pixels) if Path(name).is_file() else _family(name).load(name)


def family_of(name: str) -> str:
    """`clip`, `siglip`, `blip`, `albef` or `dual`, without loading the model.

    Raises:
        InputError: see `load`.
    """
    with _told(name):
        family = _family_in(read_state(Path(name)), Path(name)) if Path(name).is_file() else _family(name)
    return family.family


@contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {name!r} cannot be loaded: {str(error).splitlines()[0]}\n"
            "  give a hub id, a directory with config.json, model.safetensors and a tokenizer, or a published file"
        ) from error


def _from_file(path: Path, image_pixels: int | None) -> RetrievalModel:
    state = read_state(path)
    family = _family_in(state, path)
    try:
        return family.from_official(state, path, image_pixels or (None if family is Clip else RETRIEVAL_PIXELS))
    except KeyError as error:
        raise InputError(f"{path} does not fit {family.__name__}: missing is {error}") from error


def _family_in(state: State, path: Path) -> type[Albef | Blip | Clip]:
    for sign, family in SIGNS.items():
        if sign in state:
            return family
    raise InputError(f"{path} is no ALBEF, BLIP or CLIP with a ViT: its entries begin with {next(iter(state))}")


def _family(name: str) -> type[Albef | Blip | Clip | Siglip | Dual]:
    if (Path(name) / "image_tower").is_dir():
        return Dual
    kind = PretrainedConfig.get_config_dict(name)[0].get("model_type")
    if kind not in FAMILIES:
        raise InputError(f"{name} is a {kind}; accepted are {', '.join(FAMILIES)}")
    return FAMILIES[kind]
