"""Published defences as points of the same space."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from search_spaces.space import Space, corners, example_of
from trainables.config import Point

Recipe = Literal["finetune", "tecoa_itr", "fare", "mat", "mat_one_to_many", "mmcoa"]


@dataclass(frozen=True)
class Published:
    """A defence as it was published.

    Attributes:
        title: as the papers write it.
        source: where it comes from.
        inferred: what the source does not say and is therefore a guess, empty if nothing.
        attack_steps: of the image attack at the study's radius; 0 for none.
        fields: further fields of its point.
    """

    title: str
    source: str
    inferred: str = ""
    attack_steps: int = 0
    fields: dict[str, Any] = field(default_factory=dict)


RECIPES: dict[Recipe, Published] = {
    "finetune": Published(
        title="Finetune",
        source="clean contrastive fine-tuning, the baseline of all",
    ),
    "tecoa_itr": Published(
        title="TeCoA-ITR",
        source="TeCoA (Mao et al. 2023) as applied to retrieval in the MAT paper: PGD-10 on images, all parameters",
        inferred="optimiser and rate",
        attack_steps=10,
    ),
    "fare": Published(
        title="FARE",
        source="Schlarmann et al. 2024: squared L2 to the frozen embedding in loss and attack; PGD-10, image side",
        inferred="relative to the embedding's squared norm, so that it can be weighed against the contrastive loss",
        attack_steps=10,
        fields={
            "contrastive_weight": 0.0,
            "companion": "anchor",
            "trainable": "image",
            "attack_objective": "deviation",
        },
    ),
    "mat": Published(
        title="MAT",
        source="multimodal adversarial training: one word of the captions first, then PGD-2 on images against them",
        inferred="optimiser, rate, batch, step size and random start",
        attack_steps=2,
        fields={"words": 1},
    ),
    "mat_one_to_many": Published(
        title="MAT+ (1:N)",
        source="MAT on one-to-many pairs: several captions an image, a captioner's with data.generated_captions, "
        "text augmented by EDA",
        inferred="two captions an image, and all that is inferred of MAT",
        attack_steps=2,
        fields={"words": 1, "captions_per_image": 2, "text_augmentation": "eda"},
    ),
    "mmcoa": Published(
        title="MMCoA",
        source="multimodal contrastive adversarial training: attacked image with clean text, clean image with attacked",
        inferred="both pairs weigh the same; its text attack follows embeddings of one modality, ours the pair",
        attack_steps=10,
        fields={"words": 1, "pairs": "crossed"},
    ),
}
assert set(RECIPES) == set(get_args(Recipe))


def title(recipe: str | None) -> str:
    """A recipe as the papers write it; names of others as they are, and nothing for no recipe."""
    titles: dict[str | None, str] = {name: published.title for name, published in RECIPES.items()}
    return titles.get(recipe, recipe or "")


def recipe_point(recipe: Recipe, epsilon: float, temperature: float) -> Point:
    """A published defence against the study's threat model.

    Args:
        recipe: which one.
        epsilon: radius of the evaluation attack. The papers train at the radius they evaluate, 2/255.
        temperature: of the base model, kept fixed.
    """
    published = RECIPES[recipe]
    attack = {"epsilon": epsilon, "attack_steps": published.attack_steps} if published.attack_steps and epsilon else {}
    return Point(temperature=temperature, **attack, **published.fields)


def trials_of(
    space: Space, recipes: Iterable[Recipe], epsilon: float, temperature: float
) -> Iterator[tuple[str, Point]]:
    """What a study may run, as far as that can break a rule: the corners of its checked space, and its recipes.

    Args:
        space: checked.
        recipes: as points of `recipe_point`.
        epsilon: the study's image radius.
        temperature: of the recipes.

    Yields:
        How a message calls it, and the point.
    """
    for params in corners(space):
        yield example_of(params), Point.model_validate(params)
    for recipe in recipes:
        yield f"recipe {recipe}", recipe_point(recipe, epsilon, temperature)
