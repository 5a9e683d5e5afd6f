"""Published defences as points of the same space."""

from __future__ import annotations

from typing import Literal

from trainables.config import Point

Recipe = Literal["finetune", "tecoa_itr", "fare", "mat"]


def recipe_point(recipe: Recipe, epsilon: float, temperature: float) -> Point:
    """A published defence against the study's threat model.

    Args:
        recipe: which one.
        epsilon: radius of the evaluation attack. The papers train at the radius they evaluate, 2/255.
        temperature: of the base model, kept fixed.

    Returns:
        Its point:
        `finetune`: clean contrastive fine-tuning.
        `tecoa_itr`: contrastive loss on adversarial images, PGD-10 (TeCoA, Mao et al. 2023, as applied to retrieval
        in the MAT paper).
        `fare`: anchor loss on the image encoder only, embedding-deviation PGD-10 (Schlarmann et al. 2024).
        `mat`: captions first, one word, then images with PGD-2 (multimodal adversarial training).
    """
    if recipe == "finetune":
        return Point(temperature=temperature)
    if recipe == "tecoa_itr":
        return Point(temperature=temperature, epsilon=epsilon, attack_steps=10)
    if recipe == "fare":
        return Point(
            contrastive_weight=0.0,
            temperature=temperature,
            epsilon=epsilon,
            attack_steps=10,
            trainable="image",
            attack_objective="deviation",
        )
    return Point(temperature=temperature, epsilon=epsilon, attack_steps=2, words=1)
