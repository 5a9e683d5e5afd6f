"""What one trial is: a point of the search space, the data, the model, the training and the fixed evaluation protocol.

Everything here is plain data (pydantic), imports no tensor library, and is the whole contract between `study` and
`trainables`: a `TrialConfig` goes in, a `TrialResult` comes out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from trainables.fields import Epsilon, Key, Name, Place, PlaceOrName, Seed, Separated, Url

CLEAN, FLOAT, MATCHING = "clean", ".float", ".itm"
"""The target that is not attacked, and what a target's name ends with if its images are not rounded to 8 bits, or if
its ranks are those after image-text matching."""

TAKEN = (CLEAN, "cost", "rung", "train")
"""What other metrics begin with."""

DIRECTIONS = ("tr", "ir", "mr")
"""Text retrieval (image to caption), image retrieval (caption to image), and the mean of the two."""


class Model(BaseModel):
    """Base of every schema here: unknown fields are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def content_hash(value: BaseModel | dict[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the value's canonical JSON."""
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


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


def raise_all(problems: Iterable[str]) -> None:
    """One ValueError with all problems, if there are any."""
    told = "; ".join(problems)
    if told:
        raise ValueError(told)


class ShapesConfig(Model):
    """The procedural data set used when no data root is given."""

    train_images: int = Field(1500, ge=8, le=1_000_000, description="drawn for training")
    test_images: int = Field(200, ge=8, le=100_000, description="drawn for evaluation")
    seed: Seed = Field(0, description="of the drawings")


class DataConfig(Model):
    """Image-caption pairs in COCO format, or the embedded shapes where `root` is empty."""

    root: Place | None = Field(None, description="folder of a COCO-format set; empty: procedural shapes")
    images: str = Field("images", description="image folder below root")
    captions: str = Field("captions.json", description="captions file below root (COCO format or Karpathy JSON)")
    split: str | None = Field(
        None, description="split file below root, {split: [image id, ...]}; empty: split.json, or what captions carries"
    )
    linked_folders: tuple[Place, ...] = Field(
        (), description="folders elsewhere that links below the image folder may lead to"
    )
    shards: str | None = Field(
        None, description="WebDataset tars below root to train on, such as train-*.tar; the rest is for evaluation"
    )
    generated_captions: Place | None = Field(
        None, description="a captioner's captions (COCO results: [{image_id, caption}]), added to training images'"
    )
    train_splits: Annotated[tuple[str, ...], Separated] = Field(
        ("train", "restval"), description="splits to train on, as far as there are such"
    )
    eval_split: str = Field("test", description="split to evaluate on")
    eval_min_captions: int = Field(5, ge=1, description="evaluate only images with at least this many captions")
    image_pixels: int = Field(64, ge=16, le=1024, description="images are resized once to this square")
    resize: Literal["stretch", "crop"] = Field("crop", description="centre crop of the short side, or stretch")
    max_train_images: int | None = Field(None, ge=1, description="use the first n training images only")
    shapes: ShapesConfig = ShapesConfig()

    @property
    def most_train_images(self) -> float:
        """More are not trained on, as far as the configuration says."""
        drawn = self.shapes.train_images if self.root is None else math.inf
        return min(drawn, self.max_train_images or math.inf)

    @model_validator(mode="after")
    def _shards_have_what_they_need(self) -> DataConfig:
        if self.shards is not None and self.root is None:
            raise ValueError("data.shards needs data.root: they lie below it, and so does what is evaluated")
        if self.shards is not None and self.generated_captions is not None:
            raise ValueError("data.generated_captions does not go with data.shards: put the captions into the shards")
        if self.split is not None and "{split}" in self.captions:
            raise ValueError(f"data.captions {self.captions} is one file a split, so give no data.split beside it")
        return self


class PretrainConfig(Model):
    """How a base model is made from scratch, once, when no pretrained one is named."""

    root: Place | None = Field(None, description="COCO-format set to pre-train on; empty: the study's training split")
    epochs: int = Field(24, ge=1, le=10_000, description="passes over the pre-training pairs")
    batch_size: int = Field(64, ge=2, description="pairs of a step")
    learning_rate: float = Field(1e-3, gt=0, lt=1, description="of AdamW, at its peak")
    temperature: float = Field(0.07, gt=0, le=1, description="start of the learned temperature")
    mlm_epochs: int = Field(8, ge=1, description="epochs of the tiny masked language model for text attacks")
    seed: Seed = Field(0, description="of weights and order")


class TinyConfig(Model):
    """Size of the CLIP that is built when no base is named."""

    width: int = Field(64, ge=8, le=4096, description="of the hidden states of both towers")
    layers: int = Field(2, ge=1, le=48, description="of each tower")
    heads: int = Field(4, ge=1, le=64, description="attention heads of a layer; they divide the width")
    patch_pixels: int = Field(8, ge=2, le=64, description="side of an image patch")
    embedding: int = Field(64, ge=8, le=4096, description="of the space both towers share")

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> TinyConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


CaptionForm = Literal["family", "attack-literature"]
"""See `captions`."""

Family = Literal["clip", "dual", "albef", "blip"]
"""CLIP; any image tower with any text tower; the fusion transformers ALBEF and BLIP."""
FUSION_FAMILIES = ("albef", "blip")


class ModelConfig(Model):
    """Which vision-language model is fine-tuned."""

    family: Family | None = Field(None, description="empty: dual if image_tower is given, clip otherwise")
    base: PlaceOrName | None = Field(
        None, description="what to start from: hub id, directory or file; empty: a tiny one"
    )
    image_tower: PlaceOrName | None = Field(None, description="image encoder (hub id or directory) of a dual encoder")
    text_tower: PlaceOrName | None = Field(None, description="its text encoder; empty: mean of learned word embeddings")
    masked_lm: PlaceOrName | None = Field(None, description="masked language model for text attacks; empty: a tiny one")
    max_tokens: int = Field(32, ge=4, le=512, description="captions are cut to this many tokens")
    caption_text: CaptionForm = Field(
        "family",
        description="what the model reads of a caption: as its family publishes it, or as Co-Attack and SGA do",
    )
    tiny: TinyConfig = TinyConfig()
    pretrain: PretrainConfig = PretrainConfig()

    @model_validator(mode="after")
    def _one_family(self) -> ModelConfig:
        if self.base and self.image_tower:
            raise ValueError("give base (a whole model) or image_tower (a dual encoder), not both")
        if self.image_tower and self.family not in (None, "dual"):
            raise ValueError(f"image_tower makes a dual encoder, family is {self.family}; leave one out")
        if self.family == "dual" and not (self.image_tower or self.base):
            raise ValueError("family dual needs image_tower, or a base")
        if self.text_tower and not self.image_tower:
            raise ValueError("text_tower goes with image_tower")
        return self

    @property
    def known_family(self) -> str | None:
        """The family, or None where only the base itself says it."""
        if self.family is not None or self.base is not None:
            return self.family
        return "dual" if self.image_tower else "clip"


class TrainingConfig(Model):
    """How long and how fast a trial fine-tunes."""

    epochs: int = Field(3, ge=1, le=1000, description="each ends in a checkpoint and a small evaluation (a rung)")
    epoch_images: int | None = Field(None, ge=2, description="images an epoch draws at random; empty: all of them")
    batch_size: int = Field(32, ge=2, description="global batch: the number of contrastive pairs over all workers")
    learning_rate: float = Field(3e-4, gt=0, lt=1, description="of AdamW, at its peak")
    weight_decay: float = Field(1e-4, ge=0, lt=1, description="of AdamW")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising learning rate")
    gradient_clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in backward passes: a fraction of the memory, more time"
    )
    attack_candidates: int = Field(5, ge=1, le=10, description="masked-LM substitutes the training attack tries a word")
    log_every_steps: int = Field(5, ge=1, description="how often loss and temperature are kept")

    @model_validator(mode="after")
    def _an_epoch_has_a_batch(self) -> TrainingConfig:
        if self.epoch_images is not None and self.epoch_images < self.batch_size:
            raise ValueError(f"epoch_images {self.epoch_images} is less than one batch of {self.batch_size}")
        return self


class WorkersConfig(Model):
    """What one trial holds."""

    count: int = Field(1, ge=1, le=1024, description="data-parallel workers of a trial")
    gpus_per_worker: float | None = Field(None, ge=0, description="empty: one if the cluster has any, else none")
    sharded: bool = Field(
        False, description="each keeps its share of weights, gradients and optimiser state between steps (FSDP)"
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="CPU cores a worker computes on, one thread each")


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
        SEARCHED_ATTACKS, description="measured beside clean retrieval: images, captions and both (Sep-Attack)"
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
    batch_images: int = Field(50, ge=1, description="images attacked at once; changes no result")
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


class TrialConfig(Model):
    """Everything one trial depends on. Equal configs give equal results."""

    key: Key = Field("trial", description="stable name, also the run name")
    point: Point = Point()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    protocol: Protocol = Protocol()
    workers: WorkersConfig = WorkersConfig()
    seed: Seed = 0
    cache_dir: Place = Field(Path("studies/.cache"), description="prepared data and base models, shared by trials")
    storage_path: Url = Field("studies/.runs", description="where Ray Train keeps checkpoints (path or URL)")

    @model_validator(mode="after")
    def _goes_together(self) -> TrialConfig:
        batch, workers, model = self.training.batch_size, self.workers.count, self.model
        family, images = model.known_family, self.data.most_train_images
        patch, pixels = model.tiny.patch_pixels, self.data.image_pixels
        tiny = model.base is None and model.image_tower is None
        wrong = {
            f"training.batch_size {batch} is no multiple of workers.count {workers}": batch % workers > 0,
            f"workers.count {workers} is more than the training images, {images}": images < workers,
            f"model.tiny.patch_pixels {patch} is more than data.image_pixels {pixels}": tiny and patch > pixels,
        }
        raise_all(
            [
                *(reason for reason, so in wrong.items() if so),
                *([] if family is None else not_of_the_family(family, self.point, self.protocol)),
            ]
        )
        return self


def not_of_the_family(family: str, point: Point, protocol: Protocol) -> list[str]:
    """What a model of the family cannot do, of what a trial asks for.

    Args:
        family: as `Family`, or any other without a fusion transformer.
        point: of the trial.
        protocol: of its evaluation.
    """
    if family in FUSION_FAMILIES:
        return []
    none = f"a {family} has no fusion transformer"
    companion: Companion = "anchor" if point.companion == "auto" else point.companion
    wrong = {
        f"companion matching: {none} to match pairs with": companion == "matching",
        f"trainable fusion: {none}": point.trainable == "fusion",
        f"protocol.rerank: {none} to match pairs with": protocol.rerank is not None,
        f"protocol.attacks, itm: {none} to attack": any(attack.attack == "itm" for attack in protocol.attacks),
        NOTHING_TRAINED: point.trainable == "text" and "text" not in parts_in_loss(point, companion),
    }
    return [reason for reason, so in wrong.items() if so]
