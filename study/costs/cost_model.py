"""What a trial costs before it is run, counted from the shapes of its model: FLOPs, bytes, seconds, memory.

Pure functions. One multiply-add is two FLOPs: ViT-B/16 at 224 pixels, often given as 17.6 G, is that many multiply-adds
and 35.1 GFLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainables.config import Point, Protocol, TrainingConfig

BACKWARD_TO_PIXELS = 1.0
"""Of a forward pass: gradients of activations only, since parameters are frozen while an image is attacked."""
BACKWARD_TO_PARAMETERS = 2.0
"""Of a forward pass: gradients of activations and of weights."""

ATTACKABLE = 0.54
"""Of a caption's words, those that are no stop words, in COCO's test split."""

STATE_BYTES = 18
"""Per parameter, mixed precision with Adam: float32 weight, gradient and two moments, and a 16-bit copy."""
GRADIENT_BYTES = 4
"""Of these, what workers exchange."""
WHOLE_BYTES = 10
"""Of these, what even a worker with a share of the state needs within a step: weight, gradient and copy."""
MATCHED = 3
"""Pairs that image-text matching judges for each training pair (Li et al. 2021, section 3.2)."""


@dataclass(frozen=True)
class Tower:
    """A transformer encoder.

    Attributes:
        tokens: per sample.
        width: hidden size.
        layers: blocks of attention and a two-layer perceptron.
        inner: hidden size of the perceptron.
        patch_values: input values of one patch that is projected to `width`; 0 for text, whose embedding is looked up.
        vocabulary: of a text tower; 0 for images.
    """

    tokens: int
    width: int
    layers: int
    inner: int
    patch_values: int = 0
    vocabulary: int = 0

    @property
    def flops(self) -> float:
        """Of one forward pass of one sample.

        A layer has four projections of `width` x `width`, two of `width` x `inner`, and the two products of attention
        (Kaplan et al. 2020, "Scaling laws for neural language models", table 1, with the attention's own products).
        All layers count as whole ones, though CLIP's last one is computed for one token: of 12, 6 % less.
        """
        projections = self.tokens * self.width * (4 * self.width + 2 * self.inner)
        attention = 2 * self.tokens**2 * self.width
        return 2.0 * (self.layers * (projections + attention) + self.tokens * self.patch_values * self.width)

    @property
    def parameters(self) -> float:
        """Weights, without biases and norms."""
        layer = self.width * (4 * self.width + 2 * self.inner)
        return float(self.layers * layer + (self.patch_values + self.vocabulary + self.tokens) * self.width)

    @property
    def activation_bytes(self) -> float:
        """Kept of one sample for the backward pass, in 16 bits.

        34 bytes a token and unit of width in each layer (Korthikanti et al. 2022, "Reducing activation recomputation in
        large transformer models", equation 1, without the attention matrix, which fused attention does not keep).
        """
        return 34.0 * self.layers * self.tokens * self.width

    @property
    def checkpointed_bytes(self) -> float:
        """The same with gradient checkpointing: the inputs of all layers, and all of the one that is computed again."""
        return (2.0 * self.layers + 34.0) * self.tokens * self.width


@dataclass(frozen=True)
class Counted:
    """A tower of any other kind, counted by running it; the same quantities as of a `Tower`."""

    flops: float
    parameters: float
    activation_bytes: float

    @property
    def checkpointed_bytes(self) -> float:
        """It has no transformer layers to be computed again."""
        return self.activation_bytes


@dataclass(frozen=True)
class Fusion:
    """Layers in which a caption attends to an image, beside the two towers.

    Attributes:
        tokens: of a caption.
        width: hidden size.
        layers: of self-attention, cross-attention and a two-layer perceptron.
        inner: hidden size of the perceptron.
        image_tokens: that are attended to.
        image_width: of these.
        own: whether all of its weights are its own (ALBEF), or only cross-attention, the rest the text tower's (BLIP).
    """

    tokens: int
    width: int
    layers: int
    inner: int
    image_tokens: int
    image_width: int
    own: bool

    @property
    def flops(self) -> float:
        """Of one pair's forward pass, without the image's keys and values. The last layer counts as a whole one."""
        projections = self.tokens * self.width * (6 * self.width + 2 * self.inner)
        attention = 2 * self.tokens * self.width * (self.tokens + self.image_tokens)
        return 2.0 * self.layers * (projections + attention)

    @property
    def image_flops(self) -> float:
        """Of an image's keys and values, which all its captions share."""
        return 4.0 * self.layers * self.image_tokens * self.image_width * self.width

    @property
    def parameters(self) -> float:
        """Weights beside those of the towers, without biases and norms."""
        crossing = 2 * self.width * (self.width + self.image_width)
        own = self.width * (4 * self.width + 2 * self.inner) if self.own else 0
        return float(self.layers * (crossing + own))

    @property
    def activation_bytes(self) -> float:
        """Kept of one pair for the backward pass, in 16 bits: as `Tower`'s, and the image's keys and values."""
        return self.layers * self.width * (34.0 * self.tokens + 4.0 * self.image_tokens)

    @property
    def checkpointed_bytes(self) -> float:
        """The same with gradient checkpointing."""
        return 2.0 * self.layers * self.tokens * self.width + self.activation_bytes / self.layers


@dataclass(frozen=True)
class Shape:
    """A model with its data.

    Attributes:
        image: its image tower.
        text: its text tower.
        caption_words: mean length of a caption.
        train_images: images an epoch draws.
        gallery_images: of the final evaluation.
        captions_per_image: in the evaluation.
        fusion: of a fusion transformer.
    """

    image: Tower | Counted
    text: Tower
    caption_words: float
    train_images: int
    gallery_images: int
    captions_per_image: float = 5.0
    fusion: Fusion | None = None

    @property
    def parameters(self) -> float:
        """Of the whole model."""
        return self.image.parameters + self.text.parameters + (self.fusion.parameters if self.fusion else 0.0)


@dataclass(frozen=True)
class Device:
    """A device as its data sheet has it.

    Attributes:
        flops: dense, per second, in the precision used here.
        bandwidth: of its memory, bytes per second.
        memory: bytes.
        utilisation: share of `flops` that training reaches.
        link: to the other devices of its machine, bytes per second each way.
    """

    flops: float
    bandwidth: float
    memory: float
    utilisation: float
    link: float


DEVICES: Mapping[str, Device] = {
    # NVIDIA's data sheets, bfloat16 without sparsity. 0.4 is what well-tuned transformer training reaches there
    # (Chowdhery et al. 2022, table 3: 0.21 to 0.46).
    # Links are NVLink of the third and fourth generation, and PCIe 4 with 16 lanes.
    "a100-80g": Device(312e12, 2.04e12, 80e9, 0.4, 300e9),
    "h100": Device(989e12, 3.35e12, 80e9, 0.4, 450e9),
    "l4": Device(121e12, 0.3e12, 24e9, 0.4, 32e9),
    # One core with AVX-512 at about 3 GHz has 96 GFLOPs in float32. Measured: CLIPs of width 64 to 128 train with 46 to
    # 83 of them.
    "cpu": Device(96e9, 10e9, 4e9, 0.7, 10e9),
}
"""By name. Names are those under which prices are given."""


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes moved, by phase of a trial, and the bytes of all steps' gradients."""

    flops: Mapping[str, float]
    bytes: Mapping[str, float]
    gradients: float

    def seconds(self, device: Device, workers: int = 1, share: float = 1.0) -> dict[str, float]:
        """By phase: what takes longer, computing or moving (the roofline of Williams et al. 2009).

        Several workers exchange gradients in a ring (Patarasuk and Yuan 2009), here as if nothing were computed
        meanwhile. Sharded workers exchange as much: weights one way, gradients the other.

        Args:
            device: of each worker.
            workers: that share the work.
            share: of its device that each worker has.
        """
        found = {
            phase: max(self.flops[phase] / (device.flops * device.utilisation), self.bytes[phase] / device.bandwidth)
            / (workers * share)
            for phase in self.flops
        }
        found["train"] += ring_bytes(self.gradients, workers) / device.link
        return found


def ring_bytes(size: float, workers: int) -> float:
    """That each worker sends, and receives, until all have the sum of what each has."""
    return 2 * (workers - 1) / workers * size


def pair_flops(
    image: float,
    text: float,
    point: Point,
    attack_candidates: int,
    caption_words: float,
    again: int = 0,
    matching: float = 0.0,
    chunked: int = 0,
) -> dict[str, float]:
    """FLOPs of one training pair, by phase `attack` and `train`.

    Args:
        image: a forward pass of the image tower.
        text: a forward pass of the text tower.
        point: of the trial.
        attack_candidates: tried a word.
        caption_words: mean length of a caption.
        again: forward passes within a backward pass, 1 with gradient checkpointing.
        matching: a forward pass of the fusion with all that is matched of a pair.
        chunked: 1 where activations of the training pass are kept of a micro-batch only, and computed again.
    """
    attack = 0.0
    if point.words:
        attack += text * text_tries(point.words, attack_candidates, caption_words, point.text_search) + image
    if point.epsilon:
        attack += point.attack_steps * image * (1 + again + BACKWARD_TO_PIXELS)
        attack += text if point.attack_objective == "cross" else 0.0
    forward = 1 + again + chunked
    text_training = forward + (BACKWARD_TO_PARAMETERS if point.trainable == "all" else BACKWARD_TO_PIXELS)
    train = image * (forward + BACKWARD_TO_PARAMETERS)
    train += text * text_training if point.contrastive_weight else 0.0
    train += image + text if point.distillation and point.contrastive_weight else 0.0  # the teacher
    if point.companion in ("auto", "matching") and point.contrastive_weight < 1:
        train += matching * (forward + BACKWARD_TO_PARAMETERS)
    return {"attack": attack, "train": train}


def needs_original(point: Point, fusion: bool) -> bool:
    """Whether the loss or the attack looks at the frozen original's embeddings; `auto` is matching with fusion."""
    anchored = point.companion == "anchor" or (point.companion == "auto" and not fusion)
    return point.attack_objective == "deviation" or (anchored and point.contrastive_weight < 1)


def text_tries(words: int, candidates: int, caption_words: float, search: str) -> float:
    """Versions of a caption that the text attack encodes: itself, without each word, and each substitute of `words`
    words; or, if it is `exact`, itself and each substitute of every word, `words` times."""
    if search == "exact":
        return 1 + words * ATTACKABLE * caption_words * candidates
    return 1 + caption_words + words * candidates


def evaluation_flops(shape: Shape, protocol: Protocol, images: int, again: int = 0) -> float:
    """FLOPs of one evaluation: every gallery attacked as the protocol says.

    Attacks other than `image` and `text` are counted as both of these. `again` is that of `pair_flops`.
    """
    captions = images * shape.captions_per_image
    image, text = shape.image.flops, shape.text.flops
    on_images = images * image * protocol.image_steps * (1 + again + BACKWARD_TO_PIXELS) + images * image
    on_texts = captions * text * text_tries(protocol.words, protocol.candidates, shape.caption_words, "exact")
    cost = {"image": on_images, "text": on_texts}
    attacks = sum(cost.get(attack.attack, on_images + on_texts) for attack in protocol.attacks)
    return images * image + captions * text + attacks + _reranking_flops(shape, protocol, images)


def _reranking_flops(shape: Shape, protocol: Protocol, images: int) -> float:
    """Clean and after every attack, the candidates of all images and of all captions; an image's are read together."""
    if shape.fusion is None or protocol.rerank is None:
        return 0.0
    captions = images * shape.captions_per_image
    pairs = images * min(protocol.rerank, captions) + captions * min(protocol.rerank, images)
    return (1 + len(protocol.attacks)) * (pairs * shape.fusion.flops + images * shape.fusion.image_flops)


def at_once(training: TrainingConfig, workers: int) -> float:
    """Images whose activations a worker keeps."""
    own = training.batch_size / workers
    return min(own, training.micro_batch or own)


def trial_work(shape: Shape, point: Point, training: TrainingConfig, protocol: Protocol, workers: int = 1) -> Work:
    """Everything a trial computes and moves, by phase: load, attack, train, evaluate.

    Load is the original embedding all images, where the loss or the attack looks at that. Bytes are the activations,
    written forward and read backward, and of every step the weights with their optimiser.
    """
    image, text = shape.image, shape.text
    pairs = float(training.epochs * shape.train_images)
    again = int(training.gradient_checkpointing)
    # The own caption and a wrong one with the image, and a wrong image with the caption.
    matching = MATCHED * shape.fusion.flops + 2 * shape.fusion.image_flops if shape.fusion else 0.0
    chunked = int(at_once(training, workers) * workers < training.batch_size)
    by_pair = pair_flops(
        image.flops, text.flops, point, training.attack_candidates, shape.caption_words, again, matching, chunked
    )
    shares = (epoch / training.epochs for epoch in range(1, training.epochs))
    rungs = (protocol.rung(share, shape.gallery_images) for share in shares)
    evaluations = [evaluation_flops(shape, rung, rung.gallery_images, again) for rung in rungs]
    flops = {
        "load": shape.train_images * image.flops * needs_original(point, shape.fusion is not None),
        **{phase: pairs * cost for phase, cost in by_pair.items()},
        "evaluate": sum(evaluations) + evaluation_flops(shape, protocol, shape.gallery_images, again),
    }
    steps = pairs / training.batch_size
    moved_a_flop = image.activation_bytes / image.flops  # forward once; backward reads it again
    matched = MATCHED * shape.fusion.activation_bytes if shape.fusion else 0.0
    per_pair = 2 * (image.activation_bytes + text.activation_bytes + matched)
    weights = shape.parameters * STATE_BYTES
    moved = {phase: flops[phase] * moved_a_flop for phase in ("load", "attack", "evaluate")}
    gradients = steps * shape.parameters * GRADIENT_BYTES
    return Work(flops, {**moved, "train": pairs * per_pair + steps * weights}, gradients)


def trial_memory(shape: Shape, training: TrainingConfig, workers: int, sharded: bool = False) -> float:
    """Bytes a worker's device needs: weights with optimiser, the original, and a batch's activations.

    A worker that has a share of the state has it beside the weights and gradients of all while a step runs.
    """
    parts = [shape.image, shape.text, *([shape.fusion] * MATCHED if shape.fusion else [])]
    batch = at_once(training, workers)
    activations = sum(
        part.checkpointed_bytes if training.gradient_checkpointing else part.activation_bytes for part in parts
    )
    state = WHOLE_BYTES + (STATE_BYTES - 2) / workers if sharded else STATE_BYTES
    return shape.parameters * (state + 4) + batch * activations
