"""Every family of models keeps the one contract."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MobileNetV2Config, MobileNetV2Model, PreTrainedTokenizerBase
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPEncoderLayer

from benchmarks.setup import Plain
from trainables.config import TinyConfig
from trainables.errors import InputError
from trainables.models import FusionModel, Part, RetrievalModel, parameters_of, tokenize
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.models.clip import Clip
from trainables.models.dual import BagOfWords, Dual
from trainables.models.fusion import FusedAttention
from trainables.models.siglip import Siglip
from trainables.training.pretraining import train_tokenizer

PIXELS, LENGTH = 32, 16
CAPTIONS = [
    "a red circle",
    "a small blue square above something green",
    "two triangles",
    "the red square is left of a circle",
]
TINY = TinyConfig(width=32, layers=2, heads=2, patch_pixels=8, embedding=16)


def dual(tokenizer: PreTrainedTokenizerBase) -> Dual:
    tower = MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.35, image_size=PIXELS))
    return Dual(tower, BagOfWords(len(tokenizer)), tokenizer, torch.tensor([[0.5] * 3, [0.25] * 3]))


FAMILIES: dict[str, Callable[[PreTrainedTokenizerBase], RetrievalModel]] = {
    "clip": lambda tokenizer: Clip.tiny(TINY, PIXELS, LENGTH, tokenizer),
    "siglip": lambda tokenizer: Siglip.tiny(TINY, PIXELS, LENGTH, tokenizer),
    "dual": dual,
    "blip": lambda tokenizer: Blip.tiny(TINY, PIXELS, LENGTH, tokenizer),
    "albef": lambda tokenizer: Albef.tiny(TINY, PIXELS, LENGTH, tokenizer),
}
FUSION = ["blip", "albef"]


def make(name: str) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[name](train_tokenizer(CAPTIONS)).eval()
    with torch.no_grad():  # away from a transformer's initialisation, where biases are 0 and outputs hardly differ
        for parameter in parameters_of(model, "all") if name != "dual" else []:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.fixture(params=FUSION)
def fusion(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(4, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(1))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_rows_do_not_see_each_other(model: RetrievalModel, pixels: Tensor) -> None:
    images = model.encode_image(pixels)
    close(images[1:2], model.encode_image(pixels[1:2]))
    assert (images[0] - images[1]).abs().max() > 1e-3
    tokens, mask = tokenize(model, CAPTIONS, LENGTH)
    texts = model.encode_text(tokens, mask)
    close(texts[1:2], model.encode_text(tokens[1:2], mask[1:2]))
    assert (texts[0] - texts[1]).abs().max() > 1e-3


def test_padding_is_not_seen(model: RetrievalModel) -> None:
    tokens, mask = tokenize(model, CAPTIONS, LENGTH)
    texts = model.encode_text(tokens, mask)
    assert mask.sum(1).min() < mask.shape[1]
    for row, length in enumerate(mask.sum(1)):
        close(texts[row : row + 1], model.encode_text(tokens[row : row + 1, :length], mask[row : row + 1, :length]))


def test_pixels_are_normalised_inside_and_have_gradients(model: RetrievalModel, pixels: Tensor) -> None:
    pixels.requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.encode_image(pixels)[:2].square().sum(), pixels)
    assert (gradient[:2].abs().amax((1, 2, 3)) > 0).all()
    assert (gradient[2:] == 0).all()
    seen: list[Tensor] = []
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    hook = first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.encode_image(torch.stack([torch.zeros(3, PIXELS, PIXELS), torch.ones(3, PIXELS, PIXELS)]))
    hook.remove()
    assert seen[0][0].mean() < -0.9
    assert seen[0][1].mean() > 0.9


def test_saved_is_loaded(model: Any, pixels: Tensor, tmp_path: Path) -> None:
    model.save(tmp_path)
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt"))
    loaded = type(model).load(str(tmp_path)).eval()
    assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels))
    tokens, mask = tokenize(model, CAPTIONS, LENGTH)
    for one, other in zip((tokens, mask), tokenize(loaded, CAPTIONS, LENGTH), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(loaded.encode_text(tokens, mask), model.encode_text(tokens, mask))
    parts: tuple[Part, ...] = ("image", "text")
    for part in parts:
        for one, other in zip(parameters_of(model, part), parameters_of(loaded, part), strict=True):
            assert torch.equal(one, other)


def test_parts_are_a_partition(model: RetrievalModel, pixels: Tensor) -> None:
    parts = [list(model.image_parameters()), list(model.text_parameters()), list(model.fusion_parameters())]
    ids = [id(parameter) for part in parts for parameter in part]
    assert len(set(ids)) == len(ids)
    assert set(ids) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert [id(parameter) for parameter in parameters_of(model, "all")] == ids
    tokens, mask = tokenize(model, CAPTIONS, LENGTH)
    image, text = model.encode_image(pixels), model.encode_text(tokens, mask)
    cases: tuple[tuple[Part, bool, bool], ...] = (("image", False, True), ("text", True, False))
    for part, same_image, same_text in cases:
        before = [parameter.detach().clone() for parameter in parameters_of(model, part)]
        with torch.no_grad():
            for parameter in parameters_of(model, part):
                parameter.mul_(1.1)
            assert torch.equal(model.encode_image(pixels), image) == same_image
            assert torch.equal(model.encode_text(tokens, mask), text) == same_text
            for parameter, value in zip(parameters_of(model, part), before, strict=True):
                parameter.copy_(value)


@pytest.mark.parametrize("end", [None, 2])
def test_clip_computes_what_transformers_does(pixels: Tensor, end: int | None) -> None:
    ours = make("clip")
    tokens, mask = tokenize(ours, CAPTIONS, LENGTH)
    if end is not None:  # the old rule: read at the highest token
        ours.clip.text_model.eos_token_id = end
        tokens[mask == 0] = 0
        tokens[range(len(tokens)), mask.sum(1) - 1] = len(ours.tokenizer) - 1
    theirs = Plain(ours)
    theirs.clip.text_model.eos_token_id = ours.clip.text_model.eos_token_id
    assert type(theirs.clip.vision_model.encoder.layers[-1]) is CLIPEncoderLayer
    assert type(theirs.clip.vision_model.encoder.layers[0].mlp) is CLIPMLP
    found = []
    for model in (theirs, ours):
        given = pixels.clone().requires_grad_(True)
        features = [model.encode_image(given), model.encode_text(tokens, mask)]
        wanted = [given, *model.image_parameters(), *model.text_parameters()]
        loss = sum(part.square().sum() for part in features)
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        found.append([*features, *(gradient for gradient in gradients if gradient is not None)])
    for expected, value in zip(*found, strict=True):
        close(value, expected)


def plain(model: Any) -> Any:
    """Its network as `transformers` computes it."""
    network = copy.deepcopy(model.network)
    network.vision_model.embeddings.patch_embedding.__class__ = nn.Conv2d
    for module in network.modules():
        if isinstance(module, FusedAttention):
            module.__class__ = BlipAttention
    return network


@pytest.mark.parametrize("name", FUSION)
def test_fusion_computes_what_transformers_does(name: str, pixels: Tensor) -> None:
    ours = make(name)
    tokens, mask = tokenize(ours, CAPTIONS, LENGTH)
    theirs = plain(ours)
    fused = tokens.clone()
    fused[:, 0] = ours.network.config.text_config.vocab_size - 1

    def by_transformers(given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = theirs.vision_model((given - ours.mean) / ours.std).last_hidden_state
        if name == "blip":
            text = theirs.text_encoder(tokens, attention_mask=mask).last_hidden_state
            both = theirs.text_encoder(fused, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        else:
            theirs.text_encoder.set_attn_implementation("eager")
            text = both = theirs.text_encoder(tokens, attention_mask=mask).last_hidden_state
            for layer in theirs.fusion:
                both = layer(both, seen, attention_mask=(1.0 - mask[:, None, None]) * torch.finfo(both.dtype).min)
        return theirs.vision_proj(seen[:, 0]), theirs.text_proj(text[:, 0]), theirs.itm_head(both[:, 0])

    def by_us(given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = ours.image_tokens(given)
        itm = ours.itm_logits(image, ours.text_tokens(tokens, mask), mask)
        return ours.image_features(image), ours.encode_text(tokens, mask), itm

    found = []
    for compute, network in ((by_transformers, theirs), (by_us, ours.network)):
        given = pixels.clone().requires_grad_(True)
        outputs = compute(given)
        wanted = [given, *network.parameters()]
        gradients = torch.autograd.grad(sum(part.square().sum() for part in outputs), wanted, allow_unused=True)
        found.append([*outputs, *(gradient for gradient in gradients if gradient is not None)])
    assert len(found[0]) > 40
    for expected, value in zip(*found, strict=True):
        close(value, expected)


@pytest.mark.parametrize("name", ["clip", "siglip", "dual"])
def test_without_fusion_there_is_none_to_train(name: str) -> None:
    with pytest.raises(InputError, match="no fusion parameters"):
        parameters_of(make(name), "fusion")


def test_gradient_checkpointing_needs_transformer_layers() -> None:
    with pytest.raises(InputError, match="Dual here has no transformer layers"):
        make("dual").checkpoint_layers()


def test_image_features_are_those_of_the_first_token(fusion: FusionModel, pixels: Tensor) -> None:
    close(fusion.image_features(fusion.image_tokens(pixels)), fusion.encode_image(pixels))


def test_pairs_do_not_see_each_other_nor_padding(fusion: FusionModel, pixels: Tensor) -> None:
    tokens, mask = tokenize(fusion, CAPTIONS, LENGTH)
    images, texts = fusion.image_tokens(pixels), fusion.text_tokens(tokens, mask)
    logits = fusion.itm_logits(images, texts, mask)
    assert logits.shape == (4, 2)
    for row, length in enumerate(mask.sum(1)):
        own, own_mask = tokens[row : row + 1, :length], mask[row : row + 1, :length]
        alone = fusion.itm_logits(images[row : row + 1], fusion.text_tokens(own, own_mask), own_mask)
        close(logits[row : row + 1], alone)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_captions_of_an_image_share_it(fusion: FusionModel, pixels: Tensor) -> None:
    """Image-major scores, 2 images with 4 captions each, are those of the 8 pairs."""
    tokens, mask = tokenize(fusion, CAPTIONS * 2, LENGTH)
    images, texts = fusion.image_tokens(pixels[:2]), fusion.text_tokens(tokens, mask)
    keyed: list[int] = []
    keys: Any = [module for name, module in fusion.named_modules() if name.endswith("crossattention.self.key")]
    hooks = [key.register_forward_hook(lambda module, inputs, output: keyed.append(len(inputs[0]))) for key in keys]
    shared = fusion.itm_logits(images, texts, mask)
    assert keyed == [2] * len(keys) != []  # keys of two images, not of eight pairs
    for hook in hooks:
        hook.remove()
    close(shared, fusion.itm_logits(images.repeat_interleave(4, 0), texts, mask))
    assert (shared[:4] - shared[4:]).abs().max() > 1e-3


def test_matching_has_gradients_to_the_pixels_of_its_pair(fusion: FusionModel, pixels: Tensor) -> None:
    tokens, mask = tokenize(fusion, CAPTIONS, LENGTH)
    pixels.requires_grad_(True)
    logits = fusion.itm_logits(fusion.image_tokens(pixels), fusion.text_tokens(tokens, mask), mask)
    (gradient,) = torch.autograd.grad(logits[1, 1], pixels)
    assert gradient[1].abs().max() > 0
    assert (gradient[[0, 2, 3]] == 0).all()


def test_fusion_parameters_change_the_matching_only(fusion: FusionModel, pixels: Tensor) -> None:
    tokens, mask = tokenize(fusion, CAPTIONS, LENGTH)
    image, text = fusion.encode_image(pixels), fusion.encode_text(tokens, mask)
    logits = fusion.itm_logits(fusion.image_tokens(pixels), fusion.text_tokens(tokens, mask), mask)
    with torch.no_grad():
        for parameter in parameters_of(fusion, "fusion"):
            parameter.mul_(1.1)
    assert torch.equal(fusion.encode_image(pixels), image)
    assert torch.equal(fusion.encode_text(tokens, mask), text)
    changed = fusion.itm_logits(fusion.image_tokens(pixels), fusion.text_tokens(tokens, mask), mask)
    assert (changed - logits).abs().max() > 1e-4


@pytest.mark.parametrize("name", FUSION)
def test_position_embeddings_follow_the_image_size(name: str) -> None:
    assert make(name).encode_image(torch.rand(1, 3, PIXELS + 16, PIXELS + 16)).shape == (1, 16)


def test_albef_captions_have_no_end_token() -> None:
    albef, blip = make("albef"), make("blip")
    end = blip.tokenizer.eos_token_id
    tokens, mask = tokenize(albef, CAPTIONS, LENGTH)
    assert (tokens[:, 0] == albef.tokenizer.bos_token_id).all()
    assert not (tokens == end).any()
    with_end, with_mask = tokenize(blip, CAPTIONS, LENGTH)
    assert (mask.sum(1) + 1 == with_mask.sum(1)).all()
    assert (with_end == end).any(1).all()
    assert tokenize(albef, CAPTIONS, 4)[0].shape[1] == 4  # cut after the fourth, not to make room for an end


def test_blip_fuses_from_its_encoder_token() -> None:
    """The first token is replaced in what is fused, and in that only."""
    blip = make("blip")
    tokens, mask = tokenize(blip, CAPTIONS, LENGTH)
    other = tokens.clone()
    other[:, 0] = tokens[0, 1]
    assert torch.equal(blip.text_tokens(tokens, mask), blip.text_tokens(other, mask))
    assert not torch.allclose(blip.encode_text(tokens, mask), blip.encode_text(other, mask))
    last = blip.network.config.text_config.vocab_size - 1
    assert last == len(blip.tokenizer) + 1
    assert (tokens[:, 0] == blip.tokenizer.bos_token_id).all()  # the caller's tokens are left as they were


def test_siglip_captions_are_filled_up() -> None:
    """Pooled at the last place, whatever mask and length the batch came with."""
    siglip = make("siglip")
    full = siglip.tokenizer(CAPTIONS, padding="max_length", max_length=LENGTH, return_tensors="pt")["input_ids"]
    assert full.shape[1] == LENGTH > tokenize(siglip, CAPTIONS, LENGTH)[0].shape[1]
    expected = siglip.siglip.get_text_features(full).pooler_output
    assert torch.equal(siglip.encode_text(*tokenize(siglip, CAPTIONS, LENGTH)), expected)
