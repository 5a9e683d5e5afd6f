"""Parts (b) to (e): attacks, re-ranking, substitutes, and what bfloat16 changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from benchmarks.gpu.bench import EPSILON, Bench, Row, timed_calls

if TYPE_CHECKING:
    import numpy as np

    from trainables.config import Protocol
    from trainables.evaluation.robustness import Evaluation, Gallery
    from trainables.models import RetrievalModel

ATTACKS = {"image": "PGD-10", "both": "joint attack (both)", "sga": "SGA"}
SCALED = 1000
"""Images that seconds are given for."""


def attacks(bench: Bench) -> Iterator[Row]:
    """Seconds that PGD-10, the joint attack and SGA take for 1,000 images of CLIP, beside the published SGA."""
    from trainables.attacks.registry import BUILT_IN
    from trainables.config import AttackConfig, Protocol

    prepared = bench.prepared("clip", bench.size.gallery, bench.size.gallery)
    model, gallery = prepared.base, prepared.gallery
    few = gallery.first(max(2, len(gallery.pixels) // 16))
    for name, title in ATTACKS.items():
        protocol = Protocol(attacks=(AttackConfig(name=name, attack=name),), epsilon=EPSILON, bootstrap_samples=100)
        _evaluated(bench, model, few, protocol)
        with timed_calls(BUILT_IN[name], "run", bench.device) as seconds:
            _evaluated(bench, model, gallery, protocol)
        ours = sum(seconds) * SCALED / len(gallery.pixels)
        yield Row("b", title, {"s/1000_images": ours}, "substitutes come from the study's cache")
    reference = published_sga(bench, model, gallery.first(bench.size.published_images))
    values = {"s/1000_images": reference, "ratio": reference / ours}
    yield Row("b", "SGA, the published loop", values, f"scaled up from {bench.size.published_images} images")


def _evaluated(bench: Bench, model: RetrievalModel, gallery: Gallery, protocol: Protocol) -> Evaluation:
    from trainables.evaluation.robustness import evaluate

    tokens = bench.model_config(model.family).max_tokens
    return evaluate(model, gallery, protocol, max_tokens=tokens, device=bench.device)


def _masked_lm(bench: Bench) -> Any:
    """A BERT of random weights over the made-up language."""
    from transformers import BertConfig, BertForMaskedLM

    with torch.device(bench.device):
        return BertForMaskedLM(BertConfig(vocab_size=len(bench.tokenizer), **bench.size.masked_lm)).eval()


def published_sga(bench: Bench, model: Any, gallery: Gallery) -> float:
    """Its seconds for `SCALED` images, from one batch; the masked language model runs for each caption."""
    from benchmarks.as_published import reading_of, victim_of
    from benchmarks.published import attacks
    from benchmarks.published.images import numpy_draws
    from benchmarks.setup import Plain

    tokens = bench.model_config("clip").max_tokens
    victim = victim_of(Plain(model).to(bench.device), tokens)
    reading = reading_of(_masked_lm(bench), bench.tokenizer, frozenset())
    pixels = torch.from_numpy(gallery.pixels).to(bench.device) / 255
    pairs = attacks.Pairs(pixels, gallery.texts, gallery.caption_image.tolist())
    attacks.unguided_captions(victim, reading, gallery.texts[:1])
    with timed_calls(attacks, "sga", bench.device) as seconds:
        attacks.sga(victim, reading, pairs, numpy_draws(pixels), EPSILON, supervision_tokens=tokens)
    return sum(seconds) * SCALED / len(pixels)


def reranking(bench: Bench) -> Iterator[Row]:
    """Pairs a second that the fusion transformers of ALBEF and BLIP judge: each caption with every image."""
    from trainables.config import Protocol
    from trainables.evaluation import robustness

    count = bench.size.candidates
    for family in ("albef", "blip"):
        prepared = bench.prepared(family, count, count)
        protocol = Protocol(attacks=(), gallery_images=count, rerank=count, bootstrap_samples=100)
        _evaluated(bench, prepared.base, prepared.gallery.first(max(2, count // 16)), protocol)
        with timed_calls(robustness, "reranked", bench.device) as taken:
            _evaluated(bench, prepared.base, prepared.gallery, protocol)
        seconds = sum(taken)
        pairs = count * len(prepared.gallery.caption_image)
        title = f"{family} re-ranking, k {count}, {bench.size.pixels[family]} px"
        yield Row("c", title, {"pairs/s": pairs / seconds, "s": seconds}, f"{pairs:,} pairs")
        bench.tidy()


def substitutes(bench: Bench) -> Iterator[Row]:
    """Captions a second that the masked language model proposes words for."""
    import numpy as np

    from trainables.attacks import proposals
    from trainables.synthetic import made_up_captions

    captions = made_up_captions(bench.size.captions, bench.words, np.random.default_rng(0))
    masked_lm = _masked_lm(bench)
    proposals.masked_lm_substitutes(captions[:8], masked_lm, bench.tokenizer)
    with timed_calls(proposals, "masked_lm_substitutes", bench.device) as seconds:
        proposals.masked_lm_substitutes(captions, masked_lm, bench.tokenizer)
    layers, width = bench.size.masked_lm["num_hidden_layers"], bench.size.masked_lm["hidden_size"]
    title = f"substitutes, BERT {layers} x {width}"
    yield Row("d", title, {"captions/s": len(captions) / sum(seconds)}, f"{len(captions):,} captions")


def precisions(bench: Bench) -> Iterator[Row]:
    """Recalls and attacks of one CLIP in float32 and under bfloat16 autocast.

    Random weights retrieve nothing, so it first learns smooth random images with their captions by heart.
    """
    from trainables.config import Protocol, TrainingConfig
    from trainables.evaluation.scores import recall_metrics
    from trainables.measure import run_once
    from trainables.synthetic import synthetic

    images, batch = bench.size.memorised, min(64, bench.size.memorised)
    repeats = batch * bench.size.memorising_steps // images
    pixels = _smooth(images, bench.size.pixels["clip"])
    prepared = synthetic(bench.model("clip"), pixels, images, bench.words, repeats)
    training = TrainingConfig(epochs=1, batch_size=batch, learning_rate=3e-4)
    clean = Protocol(attacks=(), gallery_images=images, bootstrap_samples=100)
    run_once(bench.trial("clip", training, clean, "finetune"), prepared, bench.device)
    protocol = Protocol(gallery_images=images, bootstrap_samples=100)
    found = {}
    for name, precision, products in (
        ("float32", nullcontext, "highest"),
        ("bfloat16", partial(torch.autocast, bench.device.type, torch.bfloat16), "high"),
    ):
        torch.set_float32_matmul_precision(products)
        with patch("trainables.precision.autocast", lambda _, own=precision: own()):
            ranks = _evaluated(bench, prepared.base, prepared.gallery, protocol).ranks
        found[name] = recall_metrics(ranks, protocol)
    for target in ("clean", "image", "text", "both"):
        values = {name: metrics[f"{target}/mr_r1"].value for name, metrics in found.items()}
        yield Row("e", f"{target} mean recall at 1", {**values, "moved": values["bfloat16"] - values["float32"]})


def _smooth(images: int, side: int) -> np.ndarray:
    """Images of 4 x 4 random colours with soft borders, uint8 (images, 3, side, side)."""
    coarse = torch.rand(images, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return (255 * large).round().byte().numpy()
