"""Parts (b) to (e): attacks, re-ranking, substitutes, and what bfloat16 changes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.gpu.bench import EPSILON, Bench, Row

if TYPE_CHECKING:
    from trainables.config import Protocol
    from trainables.evaluation.robustness import Evaluation, Gallery
    from trainables.models import RetrievalModel

ATTACKS = {"image": "PGD-10", "both": "joint attack (both)", "sga": "SGA"}
SCALED = 1000
"""Images that seconds are given for."""


def attacks(bench: Bench) -> Iterator[Row]:
    """Seconds for 1,000 images with five captions each, on CLIP, the published SGA last."""
    from trainables.config import AttackConfig, Protocol

    prepared = bench.prepared("clip", bench.size.gallery, bench.size.gallery)
    model, gallery = prepared.base, prepared.gallery
    few = gallery.first(max(2, len(gallery.pixels) // 16))
    for name, title in ATTACKS.items():
        protocol = Protocol(attacks=(AttackConfig(name=name, attack=name),), epsilon=EPSILON, bootstrap_samples=100)
        clean = protocol.model_copy(update={"attacks": ()})
        for given in (clean, protocol):
            _timed(bench, model, few, given)
        seconds = _timed(bench, model, gallery, protocol)[0] - _timed(bench, model, gallery, clean)[0]
        ours = seconds * SCALED / len(gallery.pixels)
        yield Row("b", title, {"s/1000_images": ours}, "substitutes come from the study's cache")
    reference = published_sga(bench, model, gallery.first(bench.size.published_images))
    values = {"s/1000_images": reference, "ratio": reference / ours}
    yield Row("b", "SGA, the published loop", values, f"scaled up from {bench.size.published_images} images")


def _timed(bench: Bench, model: RetrievalModel, gallery: Gallery, protocol: Protocol) -> tuple[float, Evaluation]:
    from trainables.evaluation.robustness import evaluate
    from trainables.measure import synchronise

    synchronise(bench.device)
    start = time.perf_counter()
    tokens = bench.model_config(model.family).max_tokens
    found = evaluate(model, gallery, protocol, max_tokens=tokens, device=bench.device)
    synchronise(bench.device)
    return time.perf_counter() - start, found


def _masked_lm(bench: Bench) -> Any:
    """A BERT of random weights over the made-up language."""
    from transformers import BertConfig, BertForMaskedLM

    with torch.device(bench.device):
        return BertForMaskedLM(BertConfig(vocab_size=len(bench.tokenizer), **bench.size.masked_lm)).eval()


def published_sga(bench: Bench, model: Any, gallery: Gallery) -> float:
    """Its seconds for `SCALED` images, from one batch; the masked language model runs for each caption."""
    from benchmarks.published import Published, numpy_noise
    from benchmarks.setup import Plain
    from trainables.measure import synchronise

    tokens = bench.model_config("clip").max_tokens
    loop = Published(Plain(model).to(bench.device), _masked_lm(bench), bench.tokenizer, tokens)
    pixels = torch.from_numpy(gallery.pixels).to(bench.device) / 255
    owner = gallery.caption_image.tolist()
    loop.attack_captions(gallery.texts[:1], [0], None)
    synchronise(bench.device)
    start = time.perf_counter()
    loop.sga(pixels, gallery.texts, owner, pixels, numpy_noise, epsilon=EPSILON)
    synchronise(bench.device)
    return (time.perf_counter() - start) * SCALED / len(pixels)


def reranking(bench: Bench) -> Iterator[Row]:
    """Pairs a second that a fusion transformer judges; every image is among the candidates of every caption."""
    from trainables.config import Protocol

    count = bench.size.candidates
    for family in ("albef", "blip"):
        prepared = bench.prepared(family, count, count)
        clean = Protocol(attacks=(), gallery_images=count, bootstrap_samples=100)
        again = clean.model_copy(update={"rerank": count})
        _timed(bench, prepared.base, prepared.gallery.first(max(2, count // 16)), again)
        taken = [_timed(bench, prepared.base, prepared.gallery, protocol)[0] for protocol in (clean, again)]
        seconds = taken[1] - taken[0]
        pairs = count * len(prepared.gallery.caption_image)
        title = f"{family} re-ranking, k {count}, {bench.size.pixels[family]} px"
        yield Row("c", title, {"pairs/s": pairs / seconds, "s": seconds}, f"{pairs:,} pairs")
        bench.tidy()


def substitutes(bench: Bench) -> Iterator[Row]:
    """Captions a second that the masked language model proposes words for."""
    from trainables.attacks.proposals import masked_lm_substitutes
    from trainables.measure import synchronise
    from trainables.synthetic import made_up_captions

    captions = made_up_captions(bench.size.captions, bench.words, np.random.default_rng(0))
    masked_lm = _masked_lm(bench)
    masked_lm_substitutes(captions[:8], masked_lm, bench.tokenizer)
    synchronise(bench.device)
    start = time.perf_counter()
    masked_lm_substitutes(captions, masked_lm, bench.tokenizer)
    synchronise(bench.device)
    seconds = time.perf_counter() - start
    layers, width = bench.size.masked_lm["num_hidden_layers"], bench.size.masked_lm["hidden_size"]
    title = f"substitutes, BERT {layers} x {width}"
    yield Row("d", title, {"captions/s": len(captions) / seconds}, f"{len(captions):,} captions")


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
            ranks = _timed(bench, prepared.base, prepared.gallery, protocol)[1].ranks
        found[name] = recall_metrics(ranks, protocol)
    for target in ("clean", "image", "text", "both"):
        values = {name: metrics[f"{target}/mr_r1"].value for name, metrics in found.items()}
        yield Row("e", f"{target} mean recall at 1", {**values, "moved": values["bfloat16"] - values["float32"]})


def _smooth(images: int, side: int) -> np.ndarray:
    """Images of 4 x 4 random colours with soft borders, uint8 (images, 3, side, side)."""
    coarse = torch.rand(images, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return (255 * large).round().byte().numpy()
