"""What trials share is made once, and can be named by others."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM

from trainables.command import InputError
from trainables.config import DataConfig, ModelConfig, PretrainConfig, ShapesConfig, TrialConfig
from trainables.prepare import Workshop

DATA = DataConfig(image_pixels=32, shapes=ShapesConfig(train_images=8, test_images=8))
PRETRAIN = PretrainConfig(mlm_epochs=1)


def workshop(cache: Path, masked_lm: Path | None) -> Workshop:
    model = ModelConfig(masked_lm=None if masked_lm is None else str(masked_lm), pretrain=PRETRAIN)
    return Workshop(TrialConfig(data=DATA, model=model, cache_dir=cache), print)


def test_a_masked_language_model_that_was_made_here_can_be_named(tmp_path: Path) -> None:
    made, tokenizer = workshop(tmp_path, None).masked_lm()
    (folder,) = tmp_path.glob("masked-lm-????????????????")
    named, beside = workshop(tmp_path, folder).masked_lm()
    assert (named.get_output_embeddings().bias == made.get_output_embeddings().bias).all()
    assert beside.get_vocab() == tokenizer.get_vocab()


def test_a_masked_language_model_needs_its_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=20, **sizes)).save_pretrained(folder)
    with pytest.raises(InputError, match="its vocabulary was not found"):
        workshop(tmp_path, folder).masked_lm()
