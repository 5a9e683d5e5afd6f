"""ALBEF (Li et al. 2021): a ViT, a BERT cut in two, and cross-attention in the upper half only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertModel,
    BertTokenizer,
    BlipConfig,
    BlipPreTrainedModel,
    BlipVisionModel,
    PreTrainedTokenizerBase,
)
from transformers.models.blip.modeling_blip_text import BlipTextLayer

from trainables.config import TinyConfig
from trainables.models.fusion import DROPPED, VIT_RULES, VitBert, at_size, official_config, tiny_config
from trainables.models.official import State, fill, from_directory, renamed, tokenizer_beside
from trainables.models.tokenizers import load_tokenizer, without_end


class AlbefConfig(BlipConfig):
    """BLIP's, whose text layers are divided: the lower half reads text, the upper half fuses."""

    model_type = "albef"


AutoConfig.register("albef", AlbefConfig)


class AlbefNetwork(BlipPreTrainedModel):
    """The parts of ALBEF, none of which `transformers` has to be taught: ViT and fusion are BLIP's, the text BERT's."""

    config_class = AlbefConfig

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        lower = text.num_hidden_layers // 2
        self.vision_model = BlipVisionModel(vision)
        bert = BertConfig.from_dict({**text.to_dict(), "num_hidden_layers": lower, "is_decoder": False})
        self.text_encoder = BertModel(bert, add_pooling_layer=False)
        self.fusion = nn.ModuleList(BlipTextLayer(text, index) for index in range(lower, text.num_hidden_layers))
        self.vision_proj = nn.Linear(vision.hidden_size, config.image_text_hidden_size)
        self.text_proj = nn.Linear(text.hidden_size, config.image_text_hidden_size)
        self.itm_head = nn.Linear(text.hidden_size, 2)
        self.post_init()


class Albef(VitBert):
    """A caption passes the text half once, however many images it is fused with.

    As in the published evaluation, pairs are ranked by the ITM logit alone. Published captions are cut to 30 tokens,
    and have no end token: see `without_end`.
    """

    family = "albef"
    similarity_weight = 0.0
    published_tokens = 30

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(batch, length) -> (batch, dim)."""
        return self.network.text_proj(self._text_states(tokens, mask, first_only=True)[:, 0])

    def text_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(captions, length) -> last hidden states of the text half, (captions, length, width)."""
        return self._text_states(tokens, mask)

    def _text_states(self, tokens: Tensor, mask: Tensor, *, first_only: bool = False) -> Tensor:
        text = self.network.text_encoder
        return self._through(text.encoder.layer, text.embeddings(tokens), mask, first_only=first_only)

    def fusion_layers(self) -> Iterable[Any]:
        """The upper half of the BERT."""
        return self.network.fusion

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """The lower half of the BERT and its projection."""
        return chain(self.network.text_encoder.parameters(), self.network.text_proj.parameters())

    def fusion_parameters(self) -> Iterator[nn.Parameter]:
        """The upper half of the BERT and the ITM head."""
        return chain(self.network.fusion.parameters(), self.network.itm_head.parameters())

    @classmethod
    def load(cls, name: str) -> Albef:
        """Read what `save` wrote.

        Raises:
            OSError: nothing there, or not an ALBEF.
        """
        network = from_directory(AlbefNetwork, name)
        return cls(network, load_tokenizer(name, network.config.text_config.vocab_size))

    @classmethod
    def from_official(cls, state: State, path: Path, image_pixels: int | None, *, momentum: bool = False) -> Albef:
        """From the entries of a published `.pth` file, pre-trained (4M, 14M) or fine-tuned for retrieval.

        Args:
            state: see `official.read_state`.
            path: for messages and the tokenizer beside it.
            image_pixels: of a side; the position embeddings are resampled to it, as the publication does from 256 to
                384.
            momentum: take the momentum copies of encoders and projections instead of themselves.

        Raises:
            InputError: entries that do not fit.
        """
        if momentum:
            copies = {name.replace("_m.", ".", 1): tensor for name, tensor in state.items() if "_m." in name}
            state = {**state, **copies}
        text = "text_encoder.bert" if any(name.startswith("text_encoder.bert.") for name in state) else "text_encoder"
        network = AlbefNetwork(AlbefConfig(**official_config(state, text, image_pixels)))
        lower = network.config.text_config.num_hidden_layers // 2
        upper = [
            (rf"^text_encoder\.encoder\.layer\.{lower + index}\.", f"fusion.{index}.")
            for index in range(len(network.fusion))
        ]
        rules = [*VIT_RULES, (r"^text_encoder\.bert\.", "text_encoder."), *upper]
        # The masked-LM head of pre-training, and projections that no loss used.
        entries = renamed(state, rules, [*DROPPED, r"text_encoder\.cls\..*", r"combine_.*"])
        fill(network, at_size(entries, network.config), path)
        rows = network.config.text_config.vocab_size
        tokenizer = tokenizer_beside(path, BertTokenizer, "google-bert/bert-base-uncased", rows)
        return cls(network, without_end(tokenizer))

    @classmethod
    def tiny(cls, config: TinyConfig, image_pixels: int, max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> Albef:
        """A small random one over the tokenizer's vocabulary; of `config.layers` a tower, half (at least one) fuse."""
        values = tiny_config(config, image_pixels, max_tokens, len(tokenizer), tokenizer.pad_token_id)
        values["text_config"]["num_hidden_layers"] = max(2, config.layers)
        return cls(AlbefNetwork(AlbefConfig(**values)), without_end(tokenizer))
