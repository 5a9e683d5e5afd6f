"""What measuring a front again decides: who stays, what each holds under the worst attack, and why others left."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from study.config import Objective
from study.front.dominance import front_mask, oriented
from study.front.estimates import FrontEntry
from trainables.config import CLEAN, FLOAT, MATCHING, TEST, Model, SplitName
from trainables.config.fields import PlaceOrName, Seed
from trainables.errors import InputError
from trainables.results import Audit, Metric

if TYPE_CHECKING:
    from rich.table import Table

    from trainables.config import Protocol
    from trainables.results import EvaluationManifest


class Terms(Model):
    """What was asked of a certification; equal for all members of a front."""

    protocol: PlaceOrName
    seed: Seed
    gallery_images: int | None = Field(ge=2)
    split: SplitName = TEST


class Certificate(Model):
    """A trial's model, measured again. Written once, never changed."""

    key: str
    study: str | None = None
    fingerprint: str | None = None
    point: dict[str, Any] | None = None
    """Of the trial, with the study's id and fingerprint; None in files of earlier versions."""
    terms: Terms
    protocol_hash: str
    model_digest: str
    claimed: dict[str, Metric]
    """The objectives as the study measured them."""
    values: dict[str, Metric]
    """The objectives under the worst of the attacks that may change the same."""
    worst_of: dict[str, list[str]]
    """Those attacks."""
    audit: Audit
    metrics: dict[str, Metric]
    correct: dict[str, str] = {}
    queries: dict[str, int] = {}
    captions_per_image: list[int] = []
    """Bits of every query under every attack, as a trial's manifest has them; empty in files of earlier versions."""


class Left(Model):
    """A candidate that is not certified, and why."""

    key: str
    reason: str


class CertifiedFront(Model):
    """`certified_front.json`: of the study's front, what may be on it, and all recipes, those that are on it now."""

    terms: Terms
    held_out: bool | None = None
    """Whether the search saw none of the images that were measured; None in files of earlier versions."""
    front: list[FrontEntry]
    left: list[Left]
    findings: dict[str, str] = {}
    """Of every model that was measured again: what the audit found, and whether its recalls count."""


def judge(
    terms: Terms,
    searched: SplitName,
    entries: Sequence[FrontEntry],
    certificates: Sequence[Certificate],
    objectives: Sequence[Objective],
) -> CertifiedFront:
    """Decide who stays.

    Args:
        terms: of the certificates.
        searched: the split that the study was searched on.
        entries: the candidates.
        certificates: of those whose model is still there.
        objectives: of the study.
    """
    of = {certificate.key: certificate for certificate in certificates}
    reliable = [entry for entry in entries if entry.key in of and of[entry.key].audit.reliable]
    costs = oriented([[of[e.key].values[o.metric].value for o in objectives] for e in reliable], objectives)
    mask = front_mask(costs)
    stay, left = [], []
    for entry in entries:
        certificate = of.get(entry.key)
        if certificate is None:
            left.append(Left(key=entry.key, reason="its model is gone, so it cannot be measured again"))
        elif not certificate.audit.reliable:
            left.append(Left(key=entry.key, reason=certificate.audit.finding))
        elif mask[place := reliable.index(entry)]:
            stay.append(_certified(entry, certificate))
        else:
            better = (costs <= costs[place]).all(1) & (costs < costs[place]).any(1) & mask
            by = ", ".join(reliable[index].key for index in np.flatnonzero(better))
            left.append(Left(key=entry.key, reason=f"measured again, it is dominated by {by}"))
    findings = {key: certificate.audit.finding for key, certificate in of.items()}
    return CertifiedFront(terms=terms, held_out=terms.split != searched, front=stay, left=left, findings=findings)


def _certified(entry: FrontEntry, certificate: Certificate) -> FrontEntry:
    values = certificate.values
    return entry.model_copy(
        update={
            "values": {name: metric.value for name, metric in values.items()},
            "intervals": {name: (metric.low, metric.high) for name, metric in values.items()},
            "split": certificate.terms.split,
        }
    )


def worst_case(evaluated: EvaluationManifest, targets: Sequence[str], measure: str) -> Metric:
    """A recall where a query counts only if it survives every one of the attacks, each at its own best.

    Args:
        evaluated: with the bits of every query.
        targets: in it.
        measure: such as `mr_r5`.
    """
    from trainables.evaluation.intervals import recall_metrics
    from trainables.evaluation.retrieval import Ranks

    k = int(measure.rpartition("_r")[2])

    def ranks(direction: str) -> np.ndarray:
        count = evaluated.queries[direction]
        packed = (base64.b64decode(evaluated.correct[f"{target}/{direction}_r{k}"]) for target in targets)
        bits = [np.unpackbits(np.frombuffer(bytes_, np.uint8), count=count).astype(bool) for bytes_ in packed]
        return np.where(np.logical_and.reduce(bits), 1, k + 1)

    protocol, counts = evaluated.protocol, evaluated.captions_per_image
    captions = np.repeat(np.arange(len(counts)), counts)
    found = recall_metrics(
        Ranks(ranks("tr"), ranks("ir"), captions),
        (k,),
        samples=protocol.bootstrap_samples,
        confidence=protocol.confidence,
        seed=protocol.seed,
    )
    return found[measure]


def comparable_targets(target: str, own: Protocol, strong: Protocol) -> list[str]:
    """Targets of `strong` whose attacks change nothing but what the study's own may change, ranked as it is.

    Args:
        target: such as `both`, or `both.itm`: then all are those after image-text matching.
        own: protocol of the study.
        strong: of the certification.

    Raises:
        InputError: there is none.
    """
    from trainables.attacks.registry import build_attack

    ending = next((ending for ending in (FLOAT, MATCHING) if target.endswith(ending)), "")
    name = target.removesuffix(ending)
    if name == CLEAN:
        found = [target]
    else:
        aim = next(attack for attack in own.attacks if attack.name == name)
        changes = build_attack(aim, own).changes
        found = [attack.name + ending for attack in strong.attacks if build_attack(attack, strong).changes <= changes]
        if not found:
            changed = " and ".join(sorted(changes))
            raise InputError(f"the protocol has no attack that changes {changed}, as {target!r} is measured after it")
    if found[0] not in strong.targets:
        raise InputError(f"the protocol has no target {found[0]}, as {target!r} is measured after it")
    return found


def table(decided: CertifiedFront, certificates: Sequence[Certificate], objectives: Sequence[Objective]) -> Table:
    """Every candidate: what it claimed, what it holds, and why it counts or not."""
    from rich.table import Table
    from rich.text import Text

    seen = "" if decided.held_out else ", which the search has seen"
    title = f"Certification on the split {decided.terms.split}{seen}"
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("", "trial", *(objective.metric for objective in objectives), ""):
        shown.add_column(name)
    of = {certificate.key: certificate for certificate in certificates}
    reasons = {left.key: left.reason for left in decided.left}
    for key in [entry.key for entry in decided.front] + list(reasons):
        cells = [_change(of[key], objective.metric) if key in of else "" for objective in objectives]
        why = f"not certified: {reasons[key]}" if key in reasons else f"certified: {decided.findings[key]}"
        shown.add_row(*map(Text, ("" if key in reasons else "*", key, *cells, why)))
    return shown


def _change(certificate: Certificate, metric: str) -> str:
    now = certificate.values[metric]
    return f"{certificate.claimed[metric].value:.3f} -> {now.value:.3f} [{now.low:.3f}, {now.high:.3f}]"
