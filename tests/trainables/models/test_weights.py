"""Weights that nothing can be computed with are refused by name; what a file says beside them is kept."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_layouts import HEADS, retrieval, small, small_clip, with_vocabulary
from safetensors.torch import load_file, save_file
from tokenizer_kinds import CAPTIONS
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel, ViTConfig, ViTImageProcessor, ViTModel

from trainables.config import TinyConfig
from trainables.errors import InputError, reason
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.models.clip import Clip
from trainables.models.dual import Dual
from trainables.models.loading import load, load_masked_lm
from trainables.models.siglip import Siglip
from trainables.training.pretraining import train_tokenizer

TINY = TinyConfig(width=32, layers=1, heads=2, patch_pixels=8, embedding=16)
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES: dict[str, Any] = {"clip": Clip, "siglip": Siglip, "blip": Blip, "albef": Albef}


def saved(family: str, folder: Path) -> Any:
    model = FAMILIES[family].tiny(TINY, 32, 16, train_tokenizer(CAPTIONS))
    model.save(folder)
    return model


def changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("value", "told"),
    [(math.nan, "NaN or infinity in"), (math.inf, "NaN or infinity in"), (0.0, "nothing but zeros in")],
)
def test_what_cannot_be_computed_with_is_named(family: str, value: float, told: str, tmp_path: Path) -> None:
    saved(family, tmp_path)
    name = next(key for key in load_file(tmp_path / "model.safetensors") if "vision" in key and "mlp.fc1.weight" in key)
    changed(tmp_path, lambda weights: weights[name].fill_(value))
    with pytest.raises(InputError, match=f"{told}: {re.escape(name)}$"):
        load(str(tmp_path))


def test_a_published_file_is_looked_at_too(tmp_path: Path) -> None:
    state = small_clip(tmp_path, openai=True)
    state["ln_final.bias"][3] = math.nan
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"NaN or infinity in: ln_final\.bias\b"):
        load(str(tmp_path / "a.pt"))
    state["ln_final.bias"] = torch.zeros(64)
    state["visual.transformer.resblocks.0.mlp.c_fc.weight"].zero_()
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"but zeros in: visual\.transformer\.resblocks\.0\.mlp\.c_fc\.weight\b"):
        load(str(tmp_path / "a.pt"))
    state["ln_final.bias"] = torch.zeros(64, dtype=torch.int8)  # as quantised weights are
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"no floating-point numbers: text_model\.final_layer_norm\.bias"):
        load(str(tmp_path / "a.pt"))


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_computed_in_full(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path)
    changed(tmp_path, lambda weights: weights.update({name: value.half() for name, value in weights.items()}))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    found = load(str(tmp_path))
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    torch.testing.assert_close(dict(found.state_dict()), dict(model.state_dict()), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_shape_is_named(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path)
    name = next(key for key in load_file(tmp_path / "model.safetensors") if key.endswith("mlp.fc1.bias"))
    changed(tmp_path, lambda weights: weights.update({name: torch.zeros(3)}))
    with pytest.raises(InputError, match=r"of another shape: .*mlp\.fc1\.bias"):
        load(str(tmp_path))


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    saved("clip", tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="cannot be loaded"):
        load(str(tmp_path))


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("clip", tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(InputError, match=r"neither a config\.json .* has .*model\.safetensors.* named itself"):
        load(str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="nothing here has that name, so it was taken for a hub id"):
        load("modle")


def test_a_masked_language_model_without_its_head_is_refused(tmp_path: Path) -> None:
    """It would propose words at random."""
    tokenizer = train_tokenizer(CAPTIONS)
    config = BertConfig(vocab_size=len(tokenizer), **SIZES)
    tokenizer.save_pretrained(tmp_path)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    load_masked_lm(str(tmp_path))
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"missing: cls\.predictions"):
        load_masked_lm(str(tmp_path))


def test_other_people_s_code_is_not_run_nor_advised(tmp_path: Path) -> None:
    code = {"AutoConfig": "theirs.Config", "AutoModelForMaskedLM": "theirs.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": code}))
    with pytest.raises(InputError, match="would have to run code that comes with it") as caught:
        load_masked_lm(str(tmp_path))
    assert "trust_remote_code" not in str(caught.value)


@pytest.mark.parametrize(
    "advice",
    [
        "Re-running `torch.load` with `weights_only` set to `False` will likely succeed",
        "Weights only load failed. This file can still be loaded",
        "Object arrays cannot be loaded when allow_pickle=False",
        "Please pass the argument `trust_remote_code=True`",
    ],
)
def test_no_advice_to_turn_a_check_off_is_handed_on(advice: str) -> None:
    assert reason(ValueError(f"line\n{advice}")) == reason(ValueError("trust_remote_code"))
    assert "run code" in reason(ValueError(advice))


def towers(folder: Path, *, pooler: bool) -> tuple[str, str]:
    """A ViT and a BERT as their checkpoints for other tasks are, with or without a pooler."""
    image, text, tokenizer = folder / "image", folder / "text", train_tokenizer(CAPTIONS)
    ViTModel(ViTConfig(image_size=96, patch_size=16, **SIZES), add_pooling_layer=pooler).save_pretrained(image)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(image)
    BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES), add_pooling_layer=pooler).save_pretrained(text)
    tokenizer.save_pretrained(text)
    return str(image), str(text)


@pytest.mark.parametrize("pooler", [True, False])
@torch.no_grad()
def test_towers_compute_with_no_random_pooler(pooler: bool, tmp_path: Path) -> None:
    given = towers(tmp_path, pooler=pooler)
    first, again = (Dual.from_towers(*given, train_tokenizer(CAPTIONS)) for _ in range(2))
    pixels = torch.rand(2, 3, 96, 96)
    assert torch.equal(first.pooled(pixels), again.pooled(pixels))
    hidden = first.image_tower((pixels - first.pixel_stats[0]) / first.pixel_stats[1])
    assert torch.equal(first.pooled(pixels), hidden.pooler_output if pooler else hidden.last_hidden_state[:, 0])
    first.save(tmp_path / "saved")
    read: Any = load(str(tmp_path / "saved"))
    assert torch.equal(read.encode_image(pixels), first.encode_image(pixels))
    assert torch.equal(read.pixel_stats.flatten(), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))


def test_pixels_that_are_prepared_in_another_way_are_refused(tmp_path: Path) -> None:
    image, _ = towers(tmp_path, pooler=True)
    file = tmp_path / "image" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_flip_channel_order": True}))
    with pytest.raises(InputError, match="pixels are to be prepared as is not done here"):
        Dual.from_towers(image, None, train_tokenizer(CAPTIONS))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_temperature_is_kept(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "a")
    model.own_temperature = 0.0123
    model.save(tmp_path / "b")
    read = load(str(tmp_path / "b"))
    assert read.own_temperature == pytest.approx(0.0123, rel=1e-6)
    read.save(tmp_path / "c")
    assert load(str(tmp_path / "c")).own_temperature == read.own_temperature


def test_siglip_s_temperature_and_bias_are_its_file_s(tmp_path: Path) -> None:
    saved("siglip", tmp_path)
    changed(
        tmp_path, lambda weights: weights.update(logit_scale=torch.tensor([4.77]), logit_bias=torch.tensor([-16.5]))
    )
    model: Any = load(str(tmp_path))
    assert model.own_temperature == pytest.approx(math.exp(-4.77), rel=1e-6)
    model.save(tmp_path / "again")
    weights = load_file(tmp_path / "again" / "model.safetensors")
    assert (weights["logit_scale"].item(), weights["logit_bias"].item()) == pytest.approx((4.77, -16.5))


@pytest.mark.parametrize("family", ["albef", "blip"])
def test_a_published_temperature_is_read_and_kept(family: str, tmp_path: Path) -> None:
    """`temp`, which similarities are divided by (ALBEF and BLIP, `models/*_retrieval.py`)."""
    path = with_vocabulary(tmp_path)
    crossing, rows = (range(1, 2), 30522) if family == "albef" else (range(2), 30524)
    state = small({**retrieval("", crossing, rows, family == "albef", 2), **HEADS})
    state["temp"] = torch.tensor(0.0173)
    torch.save({"model": state}, path)
    model = load(str(path))
    assert model.own_temperature == pytest.approx(0.0173)
    model.save(tmp_path / "again")
    assert load(str(tmp_path / "again")).own_temperature == model.own_temperature
    torch.save({"model": {**state, "temp": torch.tensor(math.nan)}}, path)
    with pytest.raises(InputError, match="temp is nan"):
        load(str(path))


STATISTICS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.75]}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pixels_are_normalised_as_its_files_say(family: str, tmp_path: Path) -> None:
    """Some of open_clip's weights were trained with other means than OpenAI's."""
    model, pixels = saved(family, tmp_path), torch.rand(2, 3, 32, 32)
    usual = load(str(tmp_path)).encode_image(pixels)
    assert torch.equal(usual, model.encode_image(pixels))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(STATISTICS))
    read = load(str(tmp_path))
    model.mean.copy_(torch.tensor(STATISTICS["image_mean"]).view(3, 1, 1))
    model.std.copy_(torch.tensor(STATISTICS["image_std"]).view(3, 1, 1))
    found = read.encode_image(pixels)
    assert torch.equal(found, model.encode_image(pixels))
    assert (found - usual).abs().max() > 1e-4
    read.save(tmp_path / "again")
    assert torch.equal(load(str(tmp_path / "again")).encode_image(pixels), found)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**STATISTICS, "do_normalize": False}))
    with pytest.raises(InputError, match="in a way that is not done here: do_normalize"):
        load(str(tmp_path))


def test_open_clip_says_how_pixels_are_normalised(tmp_path: Path) -> None:
    said = {"model_cfg": {}, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(said))
    torch.save(small_clip(tmp_path), tmp_path / "a.pt")
    model: Any = load(str(tmp_path / "a.pt"))
    assert model.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert model.std.flatten().tolist() == [0.25, 0.5, 0.5]


SQUARE, CUT = {"height": 64, "width": 64}, {"size": {"shortest_edge": 64}, "do_center_crop": True}


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("said", "resize", "told"),
    [
        ({}, None, ""),
        ({"size": SQUARE, "do_center_crop": False, "resample": 3}, "stretch", ""),
        ({"size": SQUARE}, "stretch", ""),
        ({"size": SQUARE, "resample": 2}, "stretch", "resample 2 (bilinear)"),
        ({**CUT, "crop_size": SQUARE}, "crop", ""),
        ({"size": 64, "crop_size": 64, "do_center_crop": True}, "crop", ""),
        ({"size": 64}, None, ""),
        ({**CUT, "crop_size": {"height": 56, "width": 56}}, None, "'shortest_edge': 64"),
        ({**CUT, "do_center_crop": False}, None, "do_center_crop False"),
        ({"size": {"longest_edge": 64}}, None, "longest_edge"),
        ({"do_resize": False}, None, "do_resize false"),
    ],
)
def test_images_are_resized_as_its_files_say(
    family: str, said: dict[str, Any], resize: str | None, told: str, tmp_path: Path
) -> None:
    model = saved(family, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**STATISTICS, **said}))
    read = load(str(tmp_path))
    assert read.resize == (resize or model.resize)
    assert len(read.guesses) == bool(told)
    assert all("resized in another way than here" in guess and told in guess for guess in read.guesses)
    read.save(tmp_path / "again")
    again = load(str(tmp_path / "again"))
    assert (again.resize, again.guesses) == (read.resize, ())


@pytest.mark.parametrize(
    ("said", "resize", "told"),
    [
        ({"resize_mode": "squash", "interpolation": "bicubic"}, "stretch", ""),
        ({"resize_mode": "shortest"}, "crop", ""),
        ({"resize_mode": "longest"}, "crop", "resize_mode longest"),
        ({"resize_mode": "squash", "interpolation": "bilinear"}, "stretch", "interpolation bilinear"),
    ],
)
def test_open_clip_says_how_images_are_resized(said: dict[str, Any], resize: str, told: str, tmp_path: Path) -> None:
    said = {"model_cfg": {}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, **said}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(said))
    torch.save(small_clip(tmp_path), tmp_path / "a.pt")
    model = load(str(tmp_path / "a.pt"))
    assert model.resize == resize
    assert len(model.guesses) == bool(told)
    assert told in "".join(model.guesses)


def test_what_no_file_says_of_pixels_is_told(tmp_path: Path) -> None:
    model = saved("siglip", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    read = load(str(tmp_path))
    assert read.resize == model.resize == "stretch"
    assert read.guesses == ("no file beside it says how pixels are normalised: as siglip's usually are",)


def test_blip_is_computed_as_it_was_trained(tmp_path: Path) -> None:
    """Converted weights carry `transformers`' defaults, which are not BLIP's."""
    saved("blip", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 1e-5
    (tmp_path / "config.json").write_text(json.dumps(config))
    model: Any = load(str(tmp_path))
    norms = {name: m.eps for name, m in model.network.vision_model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert set(norms.values()) == {1e-6}
    assert any("1e-6" in guess for guess in model.guesses)
    assert len(model.guesses) == 1  # its two heads of 16 are no default
    model.save(tmp_path / "again")
    assert load(str(tmp_path / "again")).guesses == ()


def test_blip_s_text_encoder_has_twelve_heads() -> None:
    from transformers import BlipConfig

    from trainables.models.blip import _as_published

    config = BlipConfig()
    guesses = _as_published(config)
    assert (config.text_config.num_attention_heads, config.vision_config.layer_norm_eps) == (12, 1e-6)
    assert len(guesses) == 2
    assert _as_published(config) == ()
