"""A point of the search space: what is searched, and what tells published defences apart."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainables.config.fields import Epsilon, Model, raise_all

Companion = Literal["anchor", "matching", "consistency"]
"""What the loss has beside the contrastive one."""


class Point(Model):
    """One point of the space: what is searched, and what tells published defences apart.

    The loss is `w * contrastive(x', t'; tau) + (1 - w) * companion(x', t')` on adversarial pairs made under this
    point's training attack.
    """

    contrastive_weight: float = Field(1.0, ge=0, le=1, description="w, weight of the contrastive loss")
    temperature: float = Field(0.05, gt=0, le=1, description="tau, or where it starts if it is learned")
    temperature_learned: bool = Field(False, description="whether tau is trained from that start")
    epsilon: Epsilon = Field(0.0, description="L-inf radius of the training attack, in [0, 1] or as 2/255")
    attack_steps: int = Field(0, ge=0, le=100, description="PGD steps of the training attack; 0 only at epsilon 0")
    words: int = Field(0, ge=0, le=10, description="words the training attack may change in a caption")
    text_search: Literal["importance", "exact"] = Field(
        "importance",
        description="the words the training attack changes: important ones that help, or the best of all words",
    )
    companion: Literal["auto"] | Companion = Field(
        "auto",
        description="anchor to the frozen original; image-text matching with hard negatives; consistency of attacked "
        "and clean retrieval, the contrastive loss then on clean pairs (TRADES); auto: matching in fusion families, "
        "anchor in others",
    )
    pairs: Literal["adversarial", "crossed"] = Field(
        "adversarial",
        description="contrastive loss of (x', t'), or the mean of those of (x', t) and (x, t') as in MMCoA",
    )
    distillation: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the contrastive targets that a momentum copy of the model sets (ALBEF's alpha: 0.4)",
    )
    epsilon_start: Epsilon = Field(0.0, description="radius before the ramp")
    ramp_begin: float = Field(0.0, ge=0, le=1, description="share of the training after which the radius rises")
    ramp_end: float = Field(0.0, ge=0, le=1, description="share of the training at which it is epsilon; 0: no ramp")
    captions_per_image: int = Field(1, ge=1, le=10, description="captions each image of a batch is paired with")
    text_augmentation: Literal["none", "eda"] = Field(
        "none", description="EDA: words replaced, put in, moved or left out"
    )
    image_augmentation: Literal["none", "crop"] = Field("none", description="random resized crop and mirroring")
    trainable: Literal["all", "image", "text", "fusion"] = Field("all", description="which part is trained")
    attack_objective: Literal["cross", "deviation"] = Field(
        "cross",
        description="the image attack pushes away from the captions, or from the frozen clean embedding",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Point:
        # A rule is about three fields at most, see `search_spaces.space.TOGETHER`.
        idle = self.companion != "auto" and self.trainable not in ("all", *parts_in_loss(self, self.companion))
        wrong = {
            "epsilon > 0 needs attack_steps >= 1": self.epsilon > 0 and self.attack_steps == 0,
            "attack_steps > 0 needs epsilon > 0": self.epsilon == 0 and self.attack_steps > 0,
            "ramp_end is before ramp_begin": self.ramp_end < self.ramp_begin,
            "epsilon_start is the radius before a ramp, and with ramp_end 0 there is none": (
                self.epsilon_start > 0 and self.ramp_end == 0
            ),
            "pairs crossed says nothing with companion consistency, whose contrastive loss is on clean pairs": (
                self.pairs == "crossed" and self.companion == "consistency"
            ),
            NOTHING_TRAINED: idle or (self.trainable == "fusion" and self.contrastive_weight == 1),
        }
        raise_all(reason for reason, so in wrong.items() if so)
        return self


NOTHING_TRAINED = (
    "nothing would be trained: at this contrastive_weight and companion the loss does not depend on the part that is "
    "trainable"
)


def parts_in_loss(point: Point, companion: Companion) -> set[str]:
    """What the loss depends on. Which words and pixels an attack changes has no gradient.

    Args:
        point: its weight counts.
        companion: what its own stands for in the family.
    """
    if point.contrastive_weight == 0 and companion == "anchor":
        return {"image"}
    fused = point.contrastive_weight < 1 and companion == "matching"
    return {"image", "text", "fusion"} if fused else {"image", "text"}
