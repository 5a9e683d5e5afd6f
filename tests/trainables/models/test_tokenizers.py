"""A tokenizer that is not its model's is refused wherever one is loaded; one that is its own is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_layouts import PUBLISHED, small, small_clip
from tokenizer_kinds import CAPTIONS, KINDS, wrapped
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    CLIPTokenizer,
    MobileNetV2Config,
    MobileNetV2Model,
    PreTrainedTokenizerFast,
)

from trainables.config import TinyConfig
from trainables.errors import InputError
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.models.clip import Clip
from trainables.models.dual import BagOfWords, Dual
from trainables.models.loading import load, load_masked_lm
from trainables.models.siglip import Siglip
from trainables.models.tokenizers import misfits, texts_of, whole_words
from trainables.training.pretraining import train_tokenizer

TINY = TinyConfig(width=32, layers=1, heads=2, patch_pixels=8, embedding=16)
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def tokenizer() -> Any:
    return train_tokenizer(CAPTIONS)


def dual(folder: Path) -> None:
    tower = MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.35, image_size=32))
    Dual(tower, BagOfWords(len(tokenizer())), tokenizer(), torch.tensor([[0.5] * 3, [0.25] * 3])).save(folder)


def masked_lm(folder: Path) -> None:
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer()), **SMALL)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


SAVED: dict[str, Callable[[Path], None]] = {
    "clip": lambda folder: Clip.tiny(TINY, 32, 16, tokenizer()).save(folder),
    "siglip": lambda folder: Siglip.tiny(TINY, 32, 16, tokenizer()).save(folder),
    "blip": lambda folder: Blip.tiny(TINY, 32, 16, tokenizer()).save(folder),
    "albef": lambda folder: Albef.tiny(TINY, 32, 16, tokenizer()).save(folder),
    "dual": dual,
    "masked_lm": masked_lm,
}


@pytest.mark.parametrize("family", SAVED)
def test_a_folder_without_its_vocabulary_is_refused(family: str, tmp_path: Path) -> None:
    """`transformers` makes a tokenizer of special tokens alone, without a word."""
    SAVED[family](tmp_path)
    read: Callable[[str], Any] = load_masked_lm if family == "masked_lm" else load
    read(str(tmp_path))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    with pytest.raises(InputError, match="tokenizer") as caught:
        read(str(tmp_path))
    assert f"looked for in {tmp_path}: tokenizer.json" in str(caught.value)
    assert "there: config.json, model.safetensors" in str(caught.value) or family == "dual"


@pytest.mark.parametrize("family", SAVED)
def test_another_model_s_tokenizer_is_refused(family: str, tmp_path: Path) -> None:
    SAVED[family](tmp_path)
    words = " ".join("".join(chr(97 + int(digit)) for digit in str(number)) for number in range(1000, 2000))
    train_tokenizer([words]).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"it has 1,014 entries \(ids to 1,013\), the model's embeddings have \d\d rows"
    ):
        (load_masked_lm if family == "masked_lm" else load)(str(tmp_path))


@pytest.mark.parametrize("layout", ["clip", "blip-retrieval", "albef-retrieval"])
def test_published_files_without_a_tokenizer_are_refused(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing lies beside the file, and the hub is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    state = small_clip(tmp_path, openai=True) if layout == "clip" else small(PUBLISHED[layout])
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).unlink(missing_ok=True)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="put the tokenizer's files beside it, those of") as caught:
        load(str(tmp_path / "weights.pth"))
    assert "looked for on the hub and in its cache" in str(caught.value)


def test_a_vocabulary_without_its_merges_is_refused(tmp_path: Path, clip_bpe: CLIPTokenizer) -> None:
    """All words then fall into letters, at the right size of the vocabulary."""
    clip_bpe.save_pretrained(tmp_path)
    assert misfits(clip_bpe, 49408) == []
    lost = CLIPTokenizer(vocab=clip_bpe.get_vocab(), merges=[])
    assert len(lost("surfboard")["input_ids"]) == 2 + len("surfboard")
    assert any("cannot read its own words" in mistake for mistake in misfits(lost, 49408))


def test_bert_s_own_fits_bert_and_blip_and_no_other(real_data: Path) -> None:
    bert = BertTokenizer(str(real_data / "text_resources" / "bert_base_uncased_vocab.txt"))
    assert misfits(bert, 30522) == misfits(bert, 30524) == misfits(bert, 30592) == []
    for rows in (28996, 30522 - 1, 49408, 50265):  # cased BERT, one row too few, CLIP, RoBERTa
        assert any("the model's embeddings have" in mistake for mistake in misfits(bert, rows))


def test_captions_end_where_the_model_is_read(tmp_path: Path) -> None:
    SAVED["clip"](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"captions end with \[EOS\] \(4\), the model is read at token 7"):
        load(str(tmp_path))


@pytest.mark.parametrize("family", ["clip", "blip", "albef"])
def test_captions_begin_with_what_the_model_was_trained_with(family: str, tmp_path: Path) -> None:
    SAVED[family](tmp_path)
    bare = tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    bare.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="captions do not begin with a special token"):
        load(str(tmp_path))


def test_padding_needs_a_token(tmp_path: Path) -> None:
    SAVED["blip"](tmp_path)
    backend = tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", bos_token="[BOS]").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="it has no padding token"):
        load(str(tmp_path))


def test_a_broken_tokenizer_is_one_message(tmp_path: Path) -> None:
    SAVED["blip"](tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(str(tmp_path))


MARKED = {"byte-level": "Ġholding", "sentencepiece": "▁holding", "end of word": "holding</w>", "wordpiece": "holding"}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_words_are_found_however_they_are_marked(kind: str) -> None:
    """What is found comes back from the tokens of a sentence; pieces of words do not count."""
    made = wrapped(KINDS[kind]())
    (found,) = whole_words(made, ["holding"])
    assert made.convert_ids_to_tokens(found) == MARKED[kind]
    texts = texts_of(made)
    assert texts[found] == "holding"
    for text, place in zip(texts, whole_words(made, texts), strict=True):
        if place is not None:
            assert place in made(f"cats {text} cats", add_special_tokens=False)["input_ids"]
    assert whole_words(made, ["qqq", "oldin"]) == [None, None]
    if kind == "sentencepiece":  # a piece that does not begin a word
        assert whole_words(made, ["surfbo"]) == [None]
