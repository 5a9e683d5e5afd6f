"""Our attacks beside the published loops, on real captions and images, at equal results.

`python -m benchmarks.attacks` prints one row a comparison, with the ratio of processor seconds on one thread;
`--karpathy` what attacking the whole of COCO's Karpathy test split costs.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import sys
from collections.abc import Callable, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import Row
from benchmarks.as_published import as_published, draws_of, reading_of, victim_of
from benchmarks.published.attacks import Pairs, guided_captions
from benchmarks.published.images import numpy_draws
from benchmarks.setup import IMAGE_PIXELS, MAX_TOKENS, Models, Plain, make_batch, read_captions, read_images, timed
from trainables.attacks.candidates import Candidates, numbered
from trainables.attacks.cmi import CmiAttack
from trainables.attacks.co_attack import CoAttack
from trainables.attacks.contract import Attacked, Batch
from trainables.attacks.encoding import CaptionEncoder
from trainables.attacks.lexicon import lexicon_of
from trainables.attacks.quirks import TEXT_QUIRKS
from trainables.attacks.sga import Dra, Sga
from trainables.attacks.text import attack_words, away_from
from trainables.config import TinyConfig
from trainables.data import Split

SHARED = Path("../shared/data")

BATCH_IMAGES = 8
"""Images that are attacked at once in SGA's published code."""

PEERS: dict[str, Any] = {"SGA": Sga, "DRA": Dra, "CMI-Attack": CmiAttack, "Co-Attack": CoAttack}


def text_rows(captions: list[str], count: int, tiny: TinyConfig) -> list[Row]:
    """BERT-Attack with all quirks of the published code, away from random image features, equal caption by caption."""
    models = Models.make(captions, tiny)
    captions = captions[:count]
    features = F.normalize(torch.randn(count, tiny.embedding, generator=torch.Generator().manual_seed(0)), dim=-1)
    victim = victim_of(Plain(models.clip), MAX_TOKENS)
    reading = reading_of(models.masked_lm, models.tokenizer, TEXT_QUIRKS)

    def published(captions: list[str]) -> list[str]:
        pairs = Pairs(torch.empty(0), captions, range(len(captions)))
        return guided_captions(victim, reading, pairs, [(1.0, features)])

    published(captions[:1])
    reference_seconds, reference = timed(lambda: published(captions))
    table_seconds, table = timed(lambda: models.table(captions, TEXT_QUIRKS))

    def attack() -> list[str]:
        encode, lexicon = CaptionEncoder(models.clip, MAX_TOKENS, features.device), lexicon_of(models.tokenizer)
        candidates = Candidates.of(lexicon, *numbered(table, np.arange(count), lexicon))
        return list(attack_words(encode, candidates, away_from(features), words=1, importance="unknown")[0])

    seconds, attacked = timed(attack)
    equal = attacked == reference
    size = f"{count} captions, text tower {tiny.layers} x {tiny.width}"
    return [
        Row("text attack", reference_seconds, seconds, equal, f"{size}; substitutes come from the study's cache"),
        Row("text attack, substitutes included", reference_seconds, seconds + table_seconds, equal, size),
    ]


def peer_row(name: str, captions: list[str], root: Path, images: int, tiny: TinyConfig) -> Row:
    """A published attack with all its quirks, in the published batches; DRA's are of one image, ours of several.

    The published code runs twice: timed as it is, and untimed with our random numbers, to compare the results.
    """
    kind = PEERS[name]
    attack, models = kind(quirks=kind.known_quirks), Models.make(captions, tiny)
    parts = read_images(root, images, BATCH_IMAGES)
    victim = victim_of(Plain(models.clip), MAX_TOKENS)
    reading = reading_of(models.masked_lm, models.tokenizer, attack.quirks)
    jobs = [(part, *make_batch(models, part, models.table(part.captions, attack.quirks))) for part in parts]

    def published(part: Split, batch: Batch, ours: bool) -> Attacked:
        made, shape = [], tuple(batch.pixels.shape[1:])
        whole = np.arange(len(batch.pixels))
        for own in np.split(whole, len(whole)) if isinstance(attack, Dra) else [whole]:
            rows = np.isin(part.caption_image, own)
            owners = (part.caption_image[rows] - own[0]).tolist()
            pairs = Pairs(batch.pixels[own], list(compress(part.captions, rows)), owners)
            draws = draws_of(batch.keys[own], shape, attack.steps) if ours else numpy_draws(pairs.images)
            made.append(as_published(attack, victim, reading, pairs, draws))
        pixels, texts = zip(*made, strict=True)
        return Attacked(torch.cat(pixels), list(chain.from_iterable(texts)))

    def loops(ours: bool) -> list[Attacked]:
        return [published(part, batch, ours) for part, _, batch in jobs]

    reference_seconds, _ = timed(lambda: loops(ours=False))
    references = loops(ours=True)
    models.clip.requires_grad_(False)  # as in every evaluation; the published code needs them
    seconds, results = timed(lambda: [attack.run(victim, batch) for _, victim, batch in jobs])
    same = all(result.captions == reference.captions for result, reference in zip(results, references, strict=True))
    # Rounding decides signs of gradients near zero, so a few pixels may end elsewhere in the ball.
    moved = [
        (result.pixels - reference.pixels).abs() > 1e-6 for result, reference in zip(results, references, strict=True)
    ]
    share = torch.cat(moved).float().mean().item()
    size = f"{images} images of {IMAGE_PIXELS} pixels, {sum(len(part.captions) for part in parts)} captions"
    note = f"{size}, towers {tiny.layers} x {tiny.width}; {100 * share:.2f} % of the pixels differ"
    return Row(name, reference_seconds, seconds, same and share < 0.01, note)


def table_of(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [f"{'':38}{'reference s':>12}{'ours s':>10}{'ratio':>8}  equal"]
    for row in rows:
        ratio = f"{row.reference_seconds / row.seconds:.1f}x"
        lines.append(f"{row.name:38}{row.reference_seconds:12.2f}{row.seconds:10.2f}{ratio:>8}  {row.equal}")
        lines.append(f"    {row.note}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__.split("\n")[0])
    parser.add_argument("--captions", type=Path, default=SHARED / "coco_karpathy_test_captions.json")
    parser.add_argument("--data", type=Path, default=SHARED / "coco_small", help="folder in COCO format")
    parser.add_argument("--count", type=int, default=1000, help="captions of the text attack")
    parser.add_argument("--images", type=int, default=32, help="of the attacks on both")
    parser.add_argument("--width", type=int, default=64, help="of both towers; the default is the quickstart's")
    parser.add_argument("--layers", type=int, default=2, help="of both towers")
    parser.add_argument("--only", choices=("text", "peers", "re-ranking"), help="one comparison instead of all")
    parser.add_argument("--karpathy", action="store_true", help="cost of attacking the whole test split instead")
    parser.add_argument("--limit", type=int, default=200, help="captions that --karpathy measures")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Entry point; 1 if a result is not equal to its reference."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    captions = read_captions(options.captions)
    if options.karpathy:
        from benchmarks.cost import karpathy

        print(karpathy(captions, options.limit))
        return 0
    tiny = TinyConfig(width=options.width, layers=options.layers)
    comparisons: dict[str, Callable[[], list[Row]]] = {
        "text": lambda: text_rows(captions, options.count, tiny),
        "peers": lambda: [peer_row(name, captions, options.data, options.images, tiny) for name in PEERS],
        "re-ranking": lambda: importlib.import_module("benchmarks.reranking").measure(),
    }
    rows = [row for name, measure in comparisons.items() if options.only in (None, name) for row in measure()]
    print(table_of(rows))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    return 0 if all(row.equal for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
