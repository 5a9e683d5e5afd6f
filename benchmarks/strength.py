"""How strong the protocol `strong` is: recalls of defended models under every attack alone, under all, and under an
expensive reference.

`python -m benchmarks.strength --root PHOTOS --image-tower TOWER` fine-tunes a pretrained image tower on a COCO-format
folder by four recipes, and prints tables in Markdown: recalls by attack, what each attack breaks that no other does,
and the processor seconds it takes. What is trained and measured is kept in `--out`, and not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from search_spaces.recipes import RECIPES, Recipe, recipe_point
from trainables.config import CLEAN, AttackConfig, Protocol, TrialConfig
from trainables.evaluation.protocols import named_protocol
from trainables.evaluation.retrieval import Ranks
from trainables.evaluation.robustness import evaluate
from trainables.models import RetrievalModel
from trainables.models.loading import load
from trainables.prepare import Prepared, prepare

COMPARED: tuple[Recipe, ...] = ("finetune", "tecoa_itr", "fare", "mat")
DEVICE = torch.device("cpu")

OTHERS = (
    AttackConfig(name="pgd", attack="image", options={"steps": 10}),
    AttackConfig(name="bert", attack="bert"),
    AttackConfig(name="sep", attack="sep"),
    AttackConfig(name="torch-apgd", attack="torchattacks:APGD", options={"steps": 50}),
)
"""Beside those of `strong`, for comparison; none of them counts in it."""


def reference(steps: int, restarts: int) -> tuple[AttackConfig, ...]:
    """The expensive one: best responses in every direction, with long answers and restarts."""
    options: dict[str, Any] = {"first_steps": steps, "steps": steps // 4, "restarts": restarts}
    return tuple(
        AttackConfig(
            name=f"reference-{direction}", attack="joint", options={**options, "direction": direction, "loss": loss}
        )
        for direction, loss in (("tr", "margin"), ("ir", "margin"), ("both", "cross"))
    )


def trial(options: argparse.Namespace, recipe: Recipe) -> TrialConfig:
    """A short fine-tuning at four times the radius of the evaluation: half of `real_small`'s."""
    point = recipe_point(recipe, 4 * options.epsilon, 0.05)
    protocol = Protocol(
        attacks=(), epsilon=options.epsilon, eight_bit=False, gallery_images=options.images, bootstrap_samples=100
    )
    return TrialConfig.model_validate(
        {
            "key": recipe,
            "point": point,
            "data": {"root": options.root, "image_pixels": options.pixels, "resize": "stretch"},
            "model": {
                "image_tower": str(options.image_tower),
                "pretrain": {"epochs": 15, "batch_size": 256, "learning_rate": 1e-3, "mlm_epochs": 1},
            },
            "training": {
                "epochs": 1,
                "epoch_images": options.train_images,
                "batch_size": 32,
                "learning_rate": 1e-4,
                "attack_candidates": 3,
            },
            "protocol": protocol.model_copy(update={"attacks": (AttackConfig(name="text", attack="text"),)}),
            "cache_dir": options.out / "cache",
        }
    )


def trained(options: argparse.Namespace, recipe: Recipe) -> tuple[RetrievalModel, Prepared]:
    """The recipe's model, and what it is measured on."""
    from trainables.measure import run_once

    config = trial(options, recipe)
    prepared = prepare(config, _log)
    folder = options.out / f"{recipe}-{options.train_images}-{options.pixels}"
    if folder.is_dir():
        return load(str(folder)), prepared
    began = time.process_time()
    clean = config.protocol.model_copy(update={"attacks": ()})
    run_once(config.model_copy(update={"protocol": clean}), prepared, DEVICE)
    _log(f"{RECIPES[recipe].title}: trained in {time.process_time() - began:.0f} s")
    prepared.base.save(folder)
    return prepared.base, prepared


def measured(
    options: argparse.Namespace, recipe: Recipe, model: RetrievalModel, prepared: Prepared, config: AttackConfig
) -> dict[str, Any]:
    """Ranks of every query under an attack alone, and its processor seconds."""
    path = options.out / f"{recipe}-{config.name}.json"
    content = json.dumps([config.model_dump(), options.images, options.epsilon, options.words, options.candidates])
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["of"] == content:
            return dict(found)
    protocol = Protocol(
        attacks=(config,),
        epsilon=options.epsilon,
        eight_bit=False,
        words=options.words,
        candidates=options.candidates,
        gallery_images=options.images,
    )
    began = time.process_time()
    ranks = evaluate(model, prepared.gallery, protocol, max_tokens=32, device=DEVICE).ranks
    seconds = time.process_time() - began
    found = {"of": content, "seconds": seconds}
    found |= {name: [ranks[name].tr.tolist(), ranks[name].ir.tolist()] for name in ranks}
    path.write_text(json.dumps(found), encoding="utf-8")
    _log(f"{RECIPES[recipe].title}, {config.name}: {seconds:.0f} s")
    return found


def recall(ranks: Ranks, k: int) -> tuple[float, float]:
    """Of images and captions, in percent."""
    return 100 * float((ranks.tr <= k).mean()), 100 * float((ranks.ir <= k).mean())


def worst(found: Sequence[Ranks]) -> Ranks:
    """Of several attacks, query by query."""
    return Ranks(
        np.max([ranks.tr for ranks in found], axis=0),
        np.max([ranks.ir for ranks in found], axis=0),
        found[0].caption_image,
    )


def only(found: Mapping[str, Ranks], name: str, k: int) -> float:
    """Points of the mean recall at k that are lost without an attack: of queries that no other breaks."""
    rest = worst([ranks for other, ranks in found.items() if other != name])
    return float(np.mean(recall(rest, k)) - np.mean(recall(worst(list(found.values())), k)))


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strength", description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="COCO-format folder: annotations, images, split")
    parser.add_argument("--image-tower", type=Path, required=True, help="`transformers` image model")
    parser.add_argument("--out", type=Path, default=Path("strength"))
    parser.add_argument("--recipes", nargs="+", default=list(COMPARED), choices=COMPARED)
    parser.add_argument("--images", type=int, default=100, help="in the gallery")
    parser.add_argument("--train-images", type=int, default=960)
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--epsilon", type=float, default=0.25 / 255)
    parser.add_argument("--words", type=int, default=1)
    parser.add_argument("--candidates", type=int, default=3)
    parser.add_argument("--reference-steps", type=int, default=200)
    parser.add_argument("--reference-restarts", type=int, default=5)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Entry point."""
    options = parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    strong = named_protocol("strong", {"eight_bit": False, "epsilon": options.epsilon}).attacks
    against = reference(options.reference_steps, options.reference_restarts)
    tables: dict[str, dict[Recipe, tuple[Ranks, float]]] = {}
    for recipe in options.recipes:
        model, prepared = trained(options, recipe)
        for config in (*OTHERS, *strong, *against):
            found = measured(options, recipe, model, prepared, config)
            for name in (CLEAN, config.name):
                ranks = Ranks(np.array(found[name][0]), np.array(found[name][1]), prepared.gallery.caption_image)
                tables.setdefault(name, {})[recipe] = ranks, 0.0 if name == CLEAN else found["seconds"]
    print(report(tables, [a.name for a in strong], [a.name for a in against], options.recipes))
    return 0


def report(
    tables: Mapping[str, Mapping[Recipe, tuple[Ranks, float]]],
    strong: Sequence[str],
    against: Sequence[str],
    recipes: Sequence[Recipe],
) -> str:
    """Markdown: TR and IR recall at 1 and 10 by attack and model; cost; and what only a member of `strong` breaks."""
    titles = " | ".join(RECIPES[recipe].title for recipe in recipes)
    lines = [f"| TR / IR, R@1 and R@10 | {titles} | s |", "|" + "---|" * (len(recipes) + 2)]

    def cells(ranks: Sequence[Ranks]) -> str:
        shown = (" and ".join("{:.1f} / {:.1f}".format(*recall(one, k)) for k in (1, 10)) for one in ranks)
        return " | ".join(shown)

    for name, row in tables.items():
        ranks, seconds = zip(*(row[recipe] for recipe in recipes), strict=True)
        lines.append(f"| {name} | {cells(ranks)} | {np.mean(seconds):.0f} |")
    for title, names in (("`strong`, all together", strong), ("reference, all together", [*strong, *against])):
        found = [worst([tables[name][recipe][0] for name in names]) for recipe in recipes]
        spent = sum(float(np.mean([tables[name][recipe][1] for recipe in recipes])) for name in names)
        lines.append(f"| **{title}** | {cells(found)} | {spent:.0f} |")
    lines += ["", f"| only this breaks, points of mean R@1 and R@10 | {titles} |", "|" + "---|" * (len(recipes) + 1)]
    for name in strong:
        lost = []
        for recipe in recipes:
            members = {other: tables[other][recipe][0] for other in strong}
            lost.append(" and ".join(f"{only(members, name, k):.1f}" for k in (1, 10)))
        lines.append(f"| {name} | {' | '.join(lost)} |")
    return "\n".join(lines)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
