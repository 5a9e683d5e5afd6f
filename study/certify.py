"""`python -m study.certify`: the front attacked again, harder and with fresh seeds, before anybody relies on it.

What a study finds is the best of many noisy measurements under the attack it was searched with. Certification measures
every model that is on the front or may be, and every recipe, again: on images that the search has not seen, under the
`strong` protocol, with fresh seeds; and looks for gradient masking. What cannot be relied on, or is not on the front of
the new measurements, leaves the certified front.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from study.config import COSTS
from study.front.certification import (
    Certificate,
    CertifiedFront,
    Terms,
    comparable_targets,
    judge,
    table,
    worst_case,
)
from study.front.dominance import measured
from study.front.estimates import candidates
from study.paths import StudyPaths
from study.records import Manifest, read_account, write_atomically
from study.view import StudyView, read_study, study_parser
from trainables.cli.command import all_mistakes, exit_on_input_error
from trainables.config import TEST, Point, SplitName, TrialConfig
from trainables.config.fields import SEEDS
from trainables.errors import InputError
from trainables.files import filled
from trainables.identity import differences, protocol_hash
from trainables.results import TrialResult

if TYPE_CHECKING:
    from trainables.evaluate import Arguments

FRESH = 1000
"""Added to the seed that a study was searched with."""

Log = Callable[[str], None]


def certify(view: StudyView, terms: Terms, log: Log) -> tuple[CertifiedFront, list[Certificate]]:
    """Measure what is not certified yet, and decide.

    Raises:
        InputError: an earlier certificate was made on other terms.
    """
    from trainables.evaluate import trial_folder

    paths, objectives = view.paths, view.config.objectives
    manifests = {manifest.key: manifest for manifest in view.manifests}
    entries = candidates(view.manifests, objectives, view.config.protocol.confidence)
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
    decided = judge(terms, view.config.data.eval_split, entries, certificates, objectives)
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
    flags += ["--data.eval-split", terms.split]
    flags += [] if terms.gallery_images is None else ["--gallery-images", str(terms.gallery_images)]
    return parse(flags)


def _measure(view: StudyView, manifest: Manifest, terms: Terms) -> Certificate:
    from trainables.evaluate import load_subject, protocol_of, run

    arguments = _arguments(view, manifest, terms)
    _refuse_other_data(arguments, manifest)
    protocol = protocol_of(arguments, load_subject(arguments.model))
    if not protocol.audit:
        raise InputError(f"protocol {terms.protocol} has no audit of gradient masking; set audit: true")
    claimed = {objective.metric: measured(manifest, objective.metric) for objective in view.config.objectives}
    worst_of = {
        metric: comparable_targets(metric.partition("/")[0], view.config.protocol, protocol)
        for metric in claimed
        if metric not in COSTS
    }
    details = view.paths.certificate(manifest.key).with_suffix("")
    with contextlib.redirect_stdout(sys.stderr), filled(details) as folder:
        evaluated = run(arguments.model_copy(update={"out": folder}))
    assert evaluated.audit is not None
    values = {
        metric: worst_case(evaluated, worst_of[metric], metric.partition("/")[2]) if metric in worst_of else found
        for metric, found in claimed.items()
    }
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
        correct=evaluated.correct,
        queries=evaluated.queries,
        captions_per_image=evaluated.captions_per_image,
    )


def _refuse_other_data(arguments: Arguments, manifest: Manifest) -> None:
    """See that the data are still those that the trial was trained and measured on."""
    from trainables.data import load_dataset

    searched = arguments.data.model_copy(update={"eval_split": manifest.split})
    if (found := load_dataset(searched, arguments.cache_dir).digest) != manifest.hashes["data"]:
        raise InputError(
            f"{arguments.data.root or 'the data'} is not what the study was made on (digest {manifest.hashes['data']}, "
            f"now {found}); put back the data of the study"
        )


def parser() -> argparse.ArgumentParser:
    """Of the command's flags."""
    examples = "python -m study.certify --name quickstart", "python -m study.certify --protocol harder.yaml --seed 7"
    parser = study_parser("python -m study.certify", __doc__, *examples)
    parser.add_argument("--protocol", default="strong", help="strong, or a YAML file (default: %(default)s)")
    parser.add_argument("--seed", type=int, help=f"of the attacks (default: {FRESH} beyond the study's own)")
    parser.add_argument(
        "--split",
        choices=get_args(SplitName),
        default=TEST,
        help="images that are measured (default: %(default)s, which the search has not seen)",
    )
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
