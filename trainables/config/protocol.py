"""The evaluation that all trials of a study share: its attacks, and the names of what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, JsonValue, field_validator, model_validator

from trainables.config.fields import Epsilon, Model, Name, PlaceOrName, Seed, Separated

CLEAN, FLOAT, MATCHING = "clean", ".float", ".itm"
"""The target that is not attacked, and what a target's name ends with if its images are not rounded to 8 bits, or if
its ranks are those after image-text matching."""

TAKEN = (CLEAN, "cost", "rung", "train")
"""What other metrics begin with."""

BATCH_IMAGES = 50
"""Attacked at once where nothing says otherwise; part of what attacks of torchattacks find."""

DIRECTIONS = ("tr", "ir", "mr")
"""Text retrieval (image to caption), image retrieval (caption to image), and the mean of the two."""


class AttackConfig(Model):
    """One attack of the evaluation. A plain string is short for the attack under its own name.

    Example:
        >>> AttackConfig.model_validate("torchattacks:APGD").name
        'apgd'
    """

    name: Name = Field(description="what its metrics begin with, such as sga/mr_r1")
    attack: PlaceOrName = Field(description="image, text, both, co, sga, ..., torchattacks:NAME or FILE.py:CLASS")
    options: dict[str, JsonValue] = Field(
        {}, description="fields of the attack; its budget is the protocol's otherwise"
    )

    @model_validator(mode="before")
    @classmethod
    def _named_by_itself(cls, value: object) -> object:
        if isinstance(value, str):
            return {"name": value.rpartition(":")[2].lower(), "attack": value}
        return {"attack": value["name"], **value} if isinstance(value, dict) and "name" in value else value

    def __str__(self) -> str:
        return self.name

    @property
    def file(self) -> Path | None:
        """Where its class is, if that is a file of somebody's own."""
        file, _, name = self.attack.rpartition(":")
        return Path(file) if name and file.endswith(".py") else None

    @field_validator("name")
    @classmethod
    def _free_to_use(cls, name: str) -> str:
        if name in TAKEN or name.endswith((FLOAT, MATCHING)):
            raise ValueError(f"{', '.join(TAKEN)} and names that end with {FLOAT} or {MATCHING} have a meaning already")
        return name


SEARCHED_ATTACKS = tuple(AttackConfig(name=name, attack=name) for name in ("image", "text", "both"))


class Protocol(Model):
    """The evaluation: fixed within a study, hashed, never searched. It reads no trial's temperature."""

    attacks: Annotated[tuple[AttackConfig, ...], Separated] = Field(
        SEARCHED_ATTACKS, description="measured beside clean retrieval: images, captions and both"
    )
    epsilon: Epsilon = Field(2 / 255, description="L-inf radius of the image attacks, in [0, 1] or as 2/255")
    image_steps: int = Field(10, ge=1, le=1000, description="PGD steps; each moves by 2.5 epsilon / steps")
    words: int = Field(1, ge=0, le=10, description="words the text attack may change in a caption")
    candidates: int = Field(10, ge=1, le=10, description="masked-LM substitutes tried per word")
    gallery_images: int = Field(200, ge=2, description="evaluation images, each with all its captions")
    rung_gallery_images: int = Field(50, ge=2, description="least images of the small evaluation after each epoch")
    rung_image_steps: int = Field(3, ge=1, le=1000, description="its least PGD steps")
    rung_growth: float = Field(
        0.5,
        ge=0,
        le=1,
        description="after a share s of the training, the small evaluation has rung_growth x s of the images and the "
        "steps of the final one, if that is more than the least; 0: all small evaluations are alike",
    )
    recall_at: Annotated[tuple[int, ...], Separated] = Field((1, 5, 10), description="the k of R@k, rising")
    bootstrap_samples: int = Field(1000, ge=100, le=100_000, description="galleries drawn for the intervals")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="share of the draws within an interval")
    batch_images: int | None = Field(
        None,
        ge=1,
        description="images attacked at once; empty: as many as a GPU's memory holds, 50 on a CPU and with "
        "torchattacks, whose results alone depend on it",
    )
    eight_bit: bool = Field(True, description="score attacked images rounded to 8 bits, and beside it as they are")
    rerank: int | None = Field(
        None, ge=1, description="fusion families: put so many first candidates in order by image-text matching, too"
    )
    audit: bool = Field(False, description="look for gradient masking, too, in the final evaluation")
    seed: Seed = Field(0, description="of the attacks and the intervals")

    @field_validator("attacks")
    @classmethod
    def _names_differ(cls, value: tuple[AttackConfig, ...]) -> tuple[AttackConfig, ...]:
        names = [attack.name for attack in value]
        if len(set(names)) < len(names):
            raise ValueError(f"two attacks have the same name: {', '.join(names)}")
        return value

    @field_validator("recall_at")
    @classmethod
    def _recalls(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or list(value) != sorted(set(value)) or value[0] < 1:
            raise ValueError("recall_at needs rising positive integers, for example [1, 5, 10]")
        return value

    @model_validator(mode="after")
    def _rounding_keeps_the_radius(self) -> Protocol:
        if self.eight_bit and 0 < self.epsilon < 1 / 255:
            raise ValueError(
                f"epsilon {self.epsilon:g} is less than one of 255 levels: nothing of it is left in 8-bit images; "
                "set eight_bit: false to score them as they are"
            )
        return self

    def rung(self, share: float, images: int) -> Protocol:
        """The small evaluation after an epoch. Later ones, which fewer trials reach, have larger galleries and more
        attack steps; those at one share of the training are alike, and only they are compared.

        Args:
            share: of the training that is done, in (0, 1).
            images: there are in the gallery of the final evaluation.
        """
        part = self.rung_growth * share
        gallery = max(self.rung_gallery_images, round(part * images))
        steps = max(self.rung_image_steps, round(part * self.image_steps))
        return self.model_copy(
            update={"gallery_images": min(gallery, images), "image_steps": min(steps, self.image_steps)}
        )

    @property
    def targets(self) -> list[str]:
        """What is measured: `clean` and every attack; beside them their `.itm` and `.float` where asked for."""
        scored = [CLEAN, *(attack.name for attack in self.attacks)]
        matched = [target + MATCHING for target in scored] if self.rerank else []
        beside = [target + FLOAT for target in scored[1:]] if self.eight_bit else []
        return [*scored, *matched, *beside]

    @property
    def metric_names(self) -> list[str]:
        """Every metric, for example `both/mr_r5`: target, direction, recall at k (all in [0, 1])."""
        return [
            f"{target}/{direction}_r{k}" for target in self.targets for direction in DIRECTIONS for k in self.recall_at
        ]
