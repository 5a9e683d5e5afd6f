"""What one trial is: a point of the search space, the data, the model, the training and the evaluation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainables.config.fields import Key, Model, Place, PlaceOrName, Seed, Separated, Url, raise_all
from trainables.config.point import NOTHING_TRAINED, Companion, Point, parts_in_loss
from trainables.config.protocol import Protocol

SplitName = Literal["val", "test"]
VAL: SplitName = "val"
TEST: SplitName = "test"
"""What trials are measured on, and what is measured in the end."""


class ShapesConfig(Model):
    """The procedural data set used when no data root is given."""

    train_images: int = Field(1500, ge=8, le=1_000_000, description="drawn for training")
    val_images: int = Field(200, ge=8, le=100_000, description="drawn for the search to measure on")
    test_images: int = Field(200, ge=8, le=100_000, description="drawn for what is measured in the end")
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
    val_split: str = Field(VAL, description="split that trials are measured on, so that a search never sees the test")
    test_split: str = Field(TEST, description="split that certification and published tables measure")
    val_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="where the set has no split val: this share of the training images is held out for it",
    )
    eval_split: SplitName = Field(VAL, description="which of the two is measured: val, or test")
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
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="images of which a worker holds activations at once, so that any batch fits, for one more forward "
        "pass (GradCache); empty: all of its batch",
    )
    learning_rate: float = Field(3e-4, gt=0, lt=1, description="of AdamW, at its peak")
    weight_decay: float = Field(1e-4, ge=0, lt=1, description="of AdamW; not on biases, norms and temperature")
    temperature_reach: float = Field(
        1.0,
        gt=0,
        le=10,
        description="how far ln tau can move in a training where it is learned: AdamW moves a parameter by about its "
        "rate a step, so tau's own peak rate is twice this over the steps",
    )
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising learning rate")
    gradient_clip: float = Field(1.0, gt=0, description="largest global gradient norm of the model")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in backward passes: a fraction of the memory, more time"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="the image tower for the training attack, by torch.compile; auto: on GPUs"
    )
    attack_candidates: int = Field(5, ge=1, le=10, description="masked-LM substitutes the training attack tries a word")
    log_every_steps: int = Field(5, ge=1, description="how often loss and temperature are kept")
    checkpoint_minutes: float = Field(
        10,
        gt=0,
        description="between checkpoints within an epoch, and between pieces of the final evaluation that are kept: at "
        "most so much is done again after a loss",
    )

    @model_validator(mode="after")
    def _an_epoch_has_a_batch(self) -> TrainingConfig:
        if self.epoch_images is not None and self.epoch_images < self.batch_size:
            raise ValueError(f"epoch_images {self.epoch_images} is less than one batch of {self.batch_size}")
        return self


class WorkersConfig(Model):
    """What one trial holds."""

    count: int = Field(1, ge=1, le=1024, description="data-parallel workers of a trial")
    gpus_per_worker: float | None = Field(
        None,
        ge=0,
        le=1,
        description="1, a fraction for trials side by side on one GPU, 0 for CPUs; empty: 1 if the cluster has GPUs",
    )
    sharded: bool = Field(
        False, description="each keeps its share of weights, gradients and optimiser state between steps (FSDP)"
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="CPU cores a worker computes on, one thread each")

    @property
    def share(self) -> float:
        """Of a device that a worker holds, of its memory too."""
        return self.gpus_per_worker or 1.0

    def lacking(self, cpus: float, gpus: float) -> str | None:
        """What a trial needs and a machine of so many CPUs and GPUs does not have; None if it can run there."""
        need_cpus, need_gpus = self.count * self.cpus_per_worker, self.count * (self.gpus_per_worker or 0)
        if need_cpus <= cpus and need_gpus <= gpus:
            return None
        return (
            f"a trial needs {need_cpus:g} CPUs and {need_gpus:g} GPUs, this machine has {cpus:g} and {gpus:g}; lower "
            "workers.count, cpus_per_worker or gpus_per_worker"
        )

    def side_by_side(self, devices: float) -> int:
        """Trials that fit on so many devices at once; a share of 0.4 fits twice on each, not 2.5 times."""
        return int(devices * int(1 / self.share + 1e-9) / self.count + 1e-9)

    @model_validator(mode="after")
    def _a_gpu_has_one_worker_of_a_trial(self) -> WorkersConfig:
        if self.count > 1 and self.share < 1:
            raise ValueError(
                f"count {self.count} with gpus_per_worker {self.share:g}: workers of one trial cannot share a GPU, as "
                "NCCL takes one a GPU; set count 1 for trials side by side on it, or gpus_per_worker 1"
            )
        return self


class TrialConfig(Model):
    """Everything one trial depends on. Equal configs give equal results."""

    key: Key = Field("trial", description="stable name, also the run name")
    owner: str | None = Field(None, description="whose run it is; that of another owner is not gone on with")
    point: Point = Point()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    protocol: Protocol = Protocol()
    workers: WorkersConfig = WorkersConfig()
    seed: Seed = 0
    cache_dir: Place = Field(Path("studies/.cache"), description="prepared data and base models, shared by trials")
    shared_cache: Url | None = Field(
        None, description="where nodes with disks of their own give each other what they prepared (path or URL)"
    )
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
