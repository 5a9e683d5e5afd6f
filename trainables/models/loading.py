"""One way in: a model by its name, whatever its family and layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from trainables.data.errors import holding
from trainables.errors import InputError, reason
from trainables.hub import located
from trainables.models import RetrievalModel
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.models.clip import Clip
from trainables.models.dual import Dual
from trainables.models.official import State, check_weights, from_directory, read_state
from trainables.models.open_clip import CONFIG
from trainables.models.pixels import prepare_as_said
from trainables.models.siglip import Siglip
from trainables.models.tokenizers import load_tokenizer

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
        InputError: nothing there, a family that is not known, a checkpoint that does not fit its family, or weights or
            a tokenizer that nothing can be computed with.
    """
    with _as_input_errors(name, "config.json, model.safetensors and a tokenizer, or a published file"):
        name = located(name)
        file = _file(name)
        model = _family(name).load(name) if file is None else _from_file(file, image_pixels)
        if not isinstance(model, Dual):  # whose means are among its weights
            prepare_as_said(model, name, None if file is None else file.with_name(CONFIG))
    return model


def load_masked_lm(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked language model from the hub or a directory, in eval mode, and its tokenizer.

    Raises:
        InputError: nothing there, no masked language model, weights that are missing, or a tokenizer that is not its.
    """
    with _as_input_errors(name, "config.json, model.safetensors and a tokenizer"):
        name = located(name)
        masked_lm = from_directory(AutoModelForMaskedLM, name).eval()
        tokenizer = load_tokenizer(name, masked_lm.get_input_embeddings().num_embeddings, first=False)
    return masked_lm, tokenizer


def family_of(name: str) -> str:
    """`clip`, `siglip`, `blip`, `albef` or `dual`, without loading the model.

    Raises:
        InputError: see `load`.
    """
    with _as_input_errors(name, "config.json, model.safetensors and a tokenizer, or a published file"):
        name = located(name)
        file = _file(name)
        family = _family(name) if file is None else _family_in(read_state(file), file)
    return family.family


def _file(name: str) -> Path | None:
    """The published file: the name itself, or what lies in a folder of open_clip that `transformers` cannot read."""
    path = Path(name)
    if (path / CONFIG).is_file() and not (path / "model.safetensors").is_file():
        files = (path / file for file in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"))
        return next((file for file in files if file.is_file()), None)
    return path if path.is_file() else None


@contextmanager
def _as_input_errors(name: str, wanted: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if torn := torn_files(Path(name)):
            raise InputError(f"model {name!r} cannot be loaded: {', '.join(torn)}: torn; copy it again") from error
        raise InputError(
            f"model {name!r} cannot be loaded: {reason(error)}\n  give a hub id or a directory with {wanted}"
            + ("" if Path(name).exists() else "; nothing here has that name, so it was taken for a hub id")
        ) from error


def torn_files(path: Path) -> list[str]:
    """Names of files of weights, the path itself or in it, that are not whole."""
    torn = []
    for file in [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            torn.append(file.name)
    return torn


def _from_file(path: Path, image_pixels: int | None) -> RetrievalModel:
    state = read_state(path)
    family = _family_in(state, path)
    try:
        model = family.from_official(state, path, image_pixels or (None if family is Clip else RETRIEVAL_PIXELS))
    except KeyError as error:
        raise InputError(f"{path} does not fit {family.__name__}: missing is {error}") from error
    check_weights(model, path, state)
    return model


def _family_in(state: State, path: Path) -> type[Albef | Blip | Clip]:
    for sign, family in SIGNS.items():
        if sign in state:
            return family
    raise InputError(f"{path} is no ALBEF, BLIP or CLIP with a ViT: its entries begin with {next(iter(state))}")


def _family(name: str) -> type[Albef | Blip | Clip | Siglip | Dual]:
    if (Path(name) / "image_tower").is_dir():
        return Dual
    kind = PretrainedConfig.get_config_dict(name)[0].get("model_type")
    if kind is None and Path(name).is_dir():
        raise InputError(
            f"{name} has neither a config.json with a model_type nor {CONFIG}; {holding(Path(name), '*')}. A published "
            "file is named itself, with its folder"
        )
    if kind not in FAMILIES:
        raise InputError(f"{name} is a {kind}; accepted are {', '.join(FAMILIES)}")
    return FAMILIES[kind]
