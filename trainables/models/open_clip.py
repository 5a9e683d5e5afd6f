"""What decides how weights under OpenAI's names compute, and which they do not hold: where it is said."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.errors import InputError
from trainables.models.official import State

CONFIG = "open_clip_config.json"
"""Beside the weights in open_clip's folders of the hub."""

UNDERSTOOD = {
    "": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name"},
}
"""Fields of `model_cfg` by their place. Others change the computation in ways that no weight shows."""

QUICK_NAMES = re.compile(r"openai|metaclip(?!2|.*altogether|.*worldwide)|dfn(?!.*39b)")
PLAIN_NAMES = re.compile(r"laion|datacomp|commonpool|altogether|39b")
"""Of files, by the data their weights were trained on (open_clip's `pretrained.py`). MetaCLIP 2 is of both kinds."""


@dataclass(frozen=True)
class Computation:
    """How a CLIP computes.

    Attributes:
        activation: `quick_gelu` or `gelu`.
        vision_heads: of a layer; None where it is not said.
        text_heads: the same.
        guess: what nothing but a name says, in words.
    """

    activation: str
    vision_heads: int | None = None
    text_heads: int | None = None
    guess: str | None = None


def computation(state: State, path: Path) -> Computation:
    """What is said about the entries of a CLIP with a ViT, by themselves, beside them or in their file's name.

    OpenAI's weights were trained with QuickGELU, `x sigmoid(1.702 x)`, and so were MetaCLIP's, most of DFN's and some
    of open_clip's; the others with GELU. It leaves no trace in the weights.

    Raises:
        InputError: nothing says which, or the configuration has what is not computed here.
    """
    beside = path.with_name(CONFIG)
    if beside.exists():
        return _configured(beside, "quick_gelu" if "input_resolution" in state else "gelu")
    if "input_resolution" in state:
        return Computation("quick_gelu")
    name = path.name.lower()
    # The one of LAION-400M with patches of 32 was trained with QuickGELU, those with 16 and 14 with GELU.
    quick_laion = "laion400m" in name and state["visual.conv1.weight"].shape[-1] == 32
    named = quick_laion or bool(re.search(r"quick_?gelu", name))
    quick, plain = named or bool(QUICK_NAMES.search(name)), not named and bool(PLAIN_NAMES.search(name))
    if quick != plain:
        activation = "quick_gelu" if quick else "gelu"
        return Computation(activation, guess=f"only the file's name says that it was trained with {activation}")
    raise InputError(
        f"{path}: nothing says whether it was trained with QuickGELU or GELU, and its entries look the same\n"
        "  OpenAI, MetaCLIP, most of DFN, ViT-B-32 of LAION-400M and what is fine-tuned from them: QuickGELU;\n"
        "  other LAION, DataComp: GELU; MetaCLIP 2: some are, some are not\n"
        f'  put a file {CONFIG} beside it with {{"model_cfg": {{"quick_gelu": true}}}}, or false'
    )


def _configured(file: Path, activation: str) -> Computation:
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["model_cfg"]
        parts = {place: config.get(place, {}) if place else config for place in UNDERSTOOD}
        vision, text = parts["vision_cfg"], parts["text_cfg"]
        odd = [
            f"{place}{'.' if place else ''}{field}"
            for place, fields in parts.items()
            for field in fields.keys() - UNDERSTOOD[place]
            if fields[field] and fields[field] not in ("tok", "argmax")
        ]
        heads = vision["width"] // vision.get("head_width", 64) if "width" in vision else None
        quick = config.get("quick_gelu", activation == "quick_gelu")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{file} is no configuration of open_clip: {{"model_cfg": {{...}}}}') from error
    if odd:
        raise InputError(f"{file} has what is not computed here: {', '.join(sorted(odd))}")
    return Computation("quick_gelu" if quick else "gelu", heads, text.get("heads"))
