"""What was measured, of a trial or of any model: plain data, as a manifest keeps it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from trainables.config import TEST, CaptionForm, Model, Protocol, SplitName
from trainables.errors import counted


class Metric(Model):
    """A measured value with its bootstrap interval over evaluation images."""

    value: float
    low: float
    high: float


class Caveat(Model):
    """Something that the numbers alone do not say."""

    text: str
    void: bool = Field(False, description="nothing can be concluded from the result as a whole")


Loss = Literal["own", "protocol"]
"""Which loss an audit's attack follows: the cross-entropy at the model's own temperature, as a naive evaluation would
take it, or the scale-free one that all numbers here are measured with."""


class Check(Model):
    """One comparison of a gradient-masking audit."""

    name: str
    loss: Loss
    passed: bool = Field(description="whether an honest model could look like this")
    evidence: dict[str, float] = Field(description="shares of images that still find a caption of theirs first")
    rule: str = Field(description="what had to hold")


class Audit(Model):
    """What a gradient-masking audit found."""

    verdict: Literal["honest", "masked"] = Field(description="masked if any check failed")
    reliable: bool = Field(description="no check of the protocol's own loss failed: measured robustness is real")
    checks: list[Check]

    @property
    def finding(self) -> str:
        """What was found, and whether the measured recalls count, in words."""
        own, protocol = (
            ", ".join(check.name for check in self.checks if check.loss == loss and not check.passed)
            for loss in ("own", "protocol")
        )
        if protocol:
            return (
                f"hides its gradients from the protocol's attack, so its recalls do not count; not passed: {protocol}"
            )
        if own:
            return (
                "its temperature would mislead an attack through the model's own loss, which is not how it was "
                f"measured, so its recalls count; not passed: {own}"
            )
        return "no sign that it hides its gradients"


class TrialResult(Model):
    """What a finished trial measured."""

    metrics: dict[str, Metric]
    split: SplitName = Field(TEST, description="that was measured; earlier versions measured the test")
    correct: dict[str, str] = Field(description="per `target/direction_rk`: query bits, np.packbits in base64")
    queries: dict[str, int] = Field(description="number of queries per direction, `tr` and `ir`")
    captions_per_image: list[int] = Field([], description="so that the bits can be compared with another model's")
    device_seconds: float = Field(
        ge=0, description="workers x share of a device x seconds, all attempts, until this was written"
    )
    peak_memory_gb: float | None = Field(
        None, ge=0, description="1e9 bytes, most that a worker held: of its GPU, or resident on CPUs"
    )
    seconds: dict[str, float] = Field(description="of the last attempt: load, attack, train, evaluate, audit, save")
    moved_bytes: dict[str, int] = Field(
        {},
        description="of the last attempt, until this was written: prepared, brought from other nodes, and checkpoints",
    )
    evaluation_images: int | None = Field(
        None, description="attacked at once by the first worker in the end, fewer where its memory held no more"
    )
    steps: int = Field(ge=0)
    resumed_from_steps: list[int] = Field(description="optimiser step each further attempt went on from")
    passed_over: list[str] = Field([], description="checkpoints that could not be read, and why")
    temperature: float = Field(description="at the end of training")
    untouched: str | None = Field(None, description="why the model is still the one training began with, if it is")
    audit: Audit | None = Field(None, description="of gradient masking, where the protocol asks for it")
    hashes: dict[str, str] = Field(description="data, base, substitutes and protocol the numbers belong to")
    versions: dict[str, str]


Cause = Literal[
    "complete", "stopped", "interrupted", "queued", "preempted", "infrastructure", "out_of_memory", "point", "bug"
]
"""Why an attempt ended. `stopped`: early, at a rung. `interrupted`: its driver ended. `queued`: its devices did not
come in time, so that nothing was held. `preempted` and `infrastructure` are the cluster's doing; `out_of_memory`,
`point` (diverged, too long) and `bug` the trial's own."""


class Attempt(Model):
    """One try of a trial, written by whoever ran it: it exists though its workers are gone."""

    began: float = Field(description="seconds since 1970, when its devices were first held")
    ended: float | None = Field(None, description="when they were let go; None while it runs, or if nobody saw the end")
    nodes: list[str] = Field([], description="of its workers, by rank: host name and Ray's id of the node")
    devices: float = Field(ge=0, description="workers x share of a device")
    device: str = Field("", description="kind of device, as Ray names it; empty on CPUs")
    from_step: int = 0
    to_step: int = 0
    cause: Cause | None = Field(None, description="None while it runs")
    reason: str = ""
    failed_on: str = Field("", description="the node whose worker's failure explains the others; empty if none does")

    @property
    def device_seconds(self) -> float:
        """Devices x seconds held; 0 while nobody knows how long, and where none came."""
        if self.ended is None or self.cause == "queued":
            return 0.0
        return self.devices * max(0.0, self.ended - self.began)


class Outcome(Model):
    """How a trial ended."""

    state: Literal["complete", "infeasible", "failed"]
    reason: str | None = None
    trace: str | None = Field(None, description="where the trial's own code failed")
    result: TrialResult | None = None


def given_up(reasons: Sequence[str]) -> Outcome:
    """The end of a trial that was lost more often than allowed."""
    each = reasons[:1] if len(set(reasons)) == 1 else reasons
    return Outcome(state="failed", reason=f"lost {counted(len(reasons), 'time')}: {'; '.join(each)}")


class Preprocessing(Model):
    """What a model was given of images and captions."""

    image_pixels: int
    resize: str
    max_tokens: int
    caption_text: CaptionForm


class EvaluationManifest(Model):
    """What was measured, of which model, under which protocol."""

    model: str
    model_digest: str
    temperature: float | None
    transfer_from: str | None
    data_digest: str
    split: SplitName = Field(TEST, description="that was measured; earlier versions measured the test")
    preprocessing: Preprocessing | None = Field(None, description="None in files of earlier versions")
    protocol: Protocol
    protocol_hash: str
    metrics: dict[str, Metric]
    further: dict[str, float] = Field({}, description="within folds, and by CxC and ECCV Caption, without intervals")
    audit: Audit | None
    correct: dict[str, str]
    queries: dict[str, int]
    captions_per_image: list[int] = Field([], description="so that the bits can be compared with another model's")
    caveats: list[Caveat] = Field([], description="what has to be known before the numbers are relied on")
    seconds: float
    versions: dict[str, str]


def library_versions() -> dict[str, str]:
    """Of what decides a measurement."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("paretovl", "torch", "transformers", "torchattacks", "ray", "numpy"):
        with contextlib.suppress(PackageNotFoundError):  # a benchmark runs without some of them
            found[name] = version(name)
    return found
