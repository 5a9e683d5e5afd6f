"""`python -m study.certify`: the front attacked again, harder and with fresh seeds, before anybody relies on it.

What a study finds is the best of many noisy measurements under the attack it was searched with. Certification measures
every model of the front again under the `strong` protocol, with seeds that the search never saw, and looks for gradient
masking. What cannot be relied on, or is not on the front of the new measurements, leaves the certified front.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, ValidationError

from study.config import COSTS, Objective
from study.front.dominance import front_mask, measured, oriented
from study.front.estimates import FrontEntry, front
from study.paths import StudyPaths
from study.records import Manifest, read_account, write_atomically
from study.view import StudyView, read_study, study_parser
from trainables.cli.command import all_mistakes, exit_on_input_error
from trainables.config import CLEAN, Model, Point, TrialConfig
from trainables.config.fields import SEEDS, PlaceOrName, Seed
from trainables.errors import InputError
from trainables.files import filled
from trainables.identity import differences, protocol_hash
from trainables.results import Audit, Metric, TrialResult

if TYPE_CHECKING:
    from rich.table import Table

    from trainables.config import Protocol
    from trainables.evaluate import Arguments
    from trainables.results import EvaluationManifest

FRESH = 1000
"""Added to the seed that a study was searched with."""

Log = Callable[[str], None]


class Terms(Model):
    """What was asked of a certification; equal for all members of a front."""

    protocol: PlaceOrName
    seed: Seed
    gallery_images: int | None = Field(ge=2)


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


class Left(Model):
    """A member of the study's front that is not certified, and why."""

    key: str
    reason: str


class CertifiedFront(Model):
    """`certified_front.json`."""

    terms: Terms
    front: list[FrontEntry]
    left: list[Left]
    findings: dict[str, str] = {}
    """Of every model that was measured again: what the audit found, and whether its recalls count."""


def judge(
    terms: Terms,
    entries: Sequence[FrontEntry],
    certificates: Sequence[Certificate],
    objectives: Sequence[Objective],
) -> CertifiedFront:
    """Decide who stays.

    Args:
        terms: of the certificates.
        entries: the study's front.
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
    return CertifiedFront(terms=terms, front=stay, left=left, findings=findings)


def _certified(entry: FrontEntry, certificate: Certificate) -> FrontEntry:
    values = certificate.values
    return entry.model_copy(
        update={
            "values": {name: metric.value for name, metric in values.items()},
            "intervals": {name: (metric.low, metric.high) for name, metric in values.items()},
        }
    )


def worst_case(evaluated: EvaluationManifest, attacks: Sequence[str], measure: str, captions: np.ndarray) -> Metric:
    """A recall where a query counts only if it survives every one of the attacks, each at its own best.

    Args:
        evaluated: with the bits of every query.
        attacks: names in it.
        measure: such as `mr_r5`.
        captions: (captions,) image of each caption of the gallery.
    """
    from trainables.evaluation.intervals import recall_metrics
    from trainables.evaluation.retrieval import Ranks

    k = int(measure.rpartition("_r")[2])

    def ranks(direction: str) -> np.ndarray:
        count = evaluated.queries[direction]
        packed = (base64.b64decode(evaluated.correct[f"{attack}/{direction}_r{k}"]) for attack in attacks)
        bits = [np.unpackbits(np.frombuffer(bytes_, np.uint8), count=count).astype(bool) for bytes_ in packed]
        return np.where(np.logical_and.reduce(bits), 1, k + 1)

    protocol = evaluated.protocol
    found = recall_metrics(
        Ranks(ranks("tr"), ranks("ir"), captions),
        (k,),
        samples=protocol.bootstrap_samples,
        confidence=protocol.confidence,
        seed=protocol.seed,
    )
    return found[measure]


def comparable_attacks(target: str, own: Protocol, strong: Protocol) -> list[str]:
    """Attacks of `strong` that change nothing but what the study's attack `target` may change, itself among them.

    Raises:
        InputError: there is none.
    """
    from trainables.attacks.registry import build_attack

    if target == CLEAN:
        return [CLEAN]
    aim = next(attack for attack in own.attacks if attack.name == target.removesuffix(".float"))
    changes = build_attack(aim, own).changes
    names = [attack.name for attack in strong.attacks if build_attack(attack, strong).changes <= changes]
    if not names:
        raise InputError(f"the protocol has no attack that changes {' and '.join(sorted(changes))}, as {target!r} does")
    return names


def certify(view: StudyView, terms: Terms, log: Log) -> tuple[CertifiedFront, list[Certificate]]:
    """Measure what is not certified yet, and decide.

    Raises:
        InputError: an earlier certificate was made on other terms.
    """
    from trainables.evaluate import trial_folder

    paths, objectives = view.paths, view.config.objectives
    manifests = {manifest.key: manifest for manifest in view.manifests}
    entries = front(view.manifests, objectives, view.config.protocol.confidence)
    certificates = []
    for place, entry in enumerate(entries, 1):
        path, manifest = paths.certificate(entry.key), manifests[entry.key]
        there = trial_folder(str(paths.runs / entry.key)) is not None
        if there:
            _refuse_other_model(paths, manifest)
        if path.exists():
            certificate = read_account(path, Certificate)
            if certificate.terms != terms:
                raise InputError(
                    f"{path} was made on other terms ({certificate.terms}); give the same, or move {path.parent} away"
                )
            origin = {**_origin(view, manifest, terms, there), **_trial_of(manifest)}
            made = certificate.model_dump(mode="json", include=set(origin))
            earlier = {name: origin[name] for name in _trial_of(manifest) if made[name] is None}
            if other := differences({**made, **earlier}, origin):
                raise InputError(
                    f"{path} was made from something else than what is there now:\n  "
                    + "\n  ".join(other)
                    + "\nmove it away to have that measured"
                )
        elif not there:
            continue
        else:
            log(f"{place}/{len(entries)} {entry.key}")
            certificate = _measure(view, manifest, terms)
            write_atomically(path, certificate.model_dump_json(indent=1))
        certificates.append(certificate)
    decided = judge(terms, entries, certificates, objectives)
    write_atomically(paths.certified_front, decided.model_dump_json(indent=1))
    return decided, certificates


def _refuse_other_model(paths: StudyPaths, manifest: Manifest) -> None:
    """See that the model in a trial's run folder is the one that its manifest was measured on."""
    from trainables.evaluate import trial_folder

    folder = trial_folder(str(paths.runs / manifest.key))
    assert folder is not None
    trial = TrialConfig.model_validate_json((folder / "trial.json").read_text(encoding="utf-8"))
    result = TrialResult.model_validate_json((folder / "result.json").read_text(encoding="utf-8"))
    found = {"point": trial.point.model_dump(mode="json"), "seed": trial.seed, "hashes": result.hashes}
    found |= {"key": trial.key, "study": trial.owner or manifest.study}  # earlier versions did not write it
    point = Point.model_validate(manifest.point).model_dump(mode="json")
    expected = {"point": point, "seed": manifest.seeds["trial"], "hashes": manifest.hashes}
    expected |= {"key": manifest.key, "study": manifest.study}
    if other := differences(expected, found):
        raise InputError(
            f"{folder} holds another model than the one that {paths.manifest(manifest.key)} was measured on:\n  "
            + "\n  ".join(other)
            + "\nput back what was there, or move that folder away: the trial is then left out"
        )


def _trial_of(manifest: Manifest) -> dict[str, Any]:
    """Those fields of a certificate that say which trial it is about."""
    return manifest.model_dump(mode="json", include={"study", "fingerprint", "point"})


def _origin(view: StudyView, manifest: Manifest, terms: Terms, model_there: bool) -> dict[str, Any]:
    """Those fields of a certificate that say what it was made from, as they have to be now."""
    from trainables.evaluate import load_subject, protocol_of
    from trainables.evaluation.adversarial import model_digest

    claimed = {objective.metric: measured(manifest, objective.metric) for objective in view.config.objectives}
    found: dict[str, Any] = {"claimed": {name: metric.model_dump(mode="json") for name, metric in claimed.items()}}
    if model_there:
        arguments = _arguments(view, manifest, terms)
        subject = load_subject(arguments.model)
        found["model_digest"] = model_digest(subject.model)
        found["protocol_hash"] = protocol_hash(protocol_of(arguments, subject))
    return found


def _arguments(view: StudyView, manifest: Manifest, terms: Terms) -> Arguments:
    from trainables.evaluate import parse

    folder = view.paths.runs / manifest.key
    flags = ["--model", str(folder), "--protocol", terms.protocol, "--seed", str(terms.seed)]
    flags += [] if terms.gallery_images is None else ["--gallery-images", str(terms.gallery_images)]
    return parse(flags)


def _measure(view: StudyView, manifest: Manifest, terms: Terms) -> Certificate:
    from trainables.data import load_dataset
    from trainables.evaluate import run

    arguments = _arguments(view, manifest, terms)
    details = view.paths.certificate(manifest.key).with_suffix("")
    with contextlib.redirect_stdout(sys.stderr), filled(details) as folder:
        evaluated = run(arguments.model_copy(update={"out": folder}))
    if evaluated.data_digest != manifest.hashes["data"]:
        raise InputError(
            f"{arguments.data.root or 'the data'} is not what the study was made on (digest {manifest.hashes['data']}, "
            f"now {evaluated.data_digest}); put back the data of the study"
        )
    if evaluated.audit is None:
        raise InputError(f"protocol {terms.protocol} has no audit of gradient masking; set audit: true")
    owners = load_dataset(arguments.data, arguments.cache_dir).test.caption_image
    owners = owners[owners < evaluated.queries["tr"]]
    claimed = {objective.metric: measured(manifest, objective.metric) for objective in view.config.objectives}
    values, worst_of = {}, {}
    for metric in claimed:
        if metric in COSTS:
            values[metric] = claimed[metric]
            continue
        target, _, measure = metric.partition("/")
        worst_of[metric] = comparable_attacks(target, view.config.protocol, evaluated.protocol)
        values[metric] = worst_case(evaluated, worst_of[metric], measure, owners)
    return Certificate(
        key=manifest.key,
        **_trial_of(manifest),
        terms=terms,
        protocol_hash=evaluated.protocol_hash,
        model_digest=evaluated.model_digest,
        claimed=claimed,
        values=values,
        worst_of=worst_of,
        audit=evaluated.audit,
        metrics=evaluated.metrics,
    )


def table(decided: CertifiedFront, certificates: Sequence[Certificate], objectives: Sequence[Objective]) -> Table:
    """Every member of the study's front: what it claimed, what it holds, and why it counts or not."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title="Certification", title_justify="left", box=None, pad_edge=False)
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


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    examples = "python -m study.certify --name quickstart", "python -m study.certify --protocol harder.yaml --seed 7"
    parser = study_parser("python -m study.certify", __doc__, *examples)
    parser.add_argument("--protocol", default="strong", help="strong, or a YAML file (default: %(default)s)")
    parser.add_argument("--seed", type=int, help=f"of the attacks (default: {FRESH} beyond the study's own)")
    parser.add_argument(
        "--gallery-images", type=int, metavar="IMAGES", help="evaluation images (default: all there are)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 where nothing of the front is left."""
    options = parser().parse_args(arguments)
    with exit_on_input_error():
        return _run(StudyPaths(options.studies_dir / options.name), vars(options))


def terms_of(options: Mapping[str, Any], searched_with: int) -> Terms:
    """What the flags ask for; the seed is another one than what the study was searched with, unless they say it.

    Raises:
        InputError: with all mistakes at once.
    """
    asked = {name: options[name] for name in Terms.model_fields}
    if asked["seed"] is None:
        asked["seed"] = (searched_with + FRESH) % SEEDS
    try:
        terms = Terms.model_validate(asked)
    except ValidationError as error:
        raise all_mistakes(error, Terms, "the certification") from None
    file = Path(terms.protocol)
    return terms.model_copy(update={"protocol": str(file.resolve())}) if file.is_file() else terms


def _run(paths: StudyPaths, options: dict[str, Any]) -> int:
    from study.execution.display import terminal
    from study.ledger.lease import driver_lock
    from study.status import status_of
    from study.tracking.mlflow_store import TrackingError
    from study.tracking.projection import Projection

    view = read_study(paths)
    if view.running:
        raise InputError(f"study {view.config.name!r} is running; its front can be certified when it has ended")
    terms = terms_of(options, view.config.protocol.seed)
    with driver_lock(view.config):
        decided, certificates = certify(view, terms, lambda line: print(line, file=sys.stderr))
        terminal().print(table(decided, certificates, view.config.objectives))
        print(
            f"{len(decided.front)} of {len(decided.front) + len(decided.left)} are certified: {paths.certified_front}"
        )
        try:
            projection = Projection(paths, view.config.tracking.uri, view.config.name, view.config.objectives)
            projection.sync(view.records, "finished" if status_of(view).done else "interrupted")
        except TrackingError as error:
            print(f"MLflow is behind: {error}", file=sys.stderr)
    return 0 if decided.front else 1


if __name__ == "__main__":
    sys.exit(main())
