"""`python -m trainables.evaluate --model MODEL --protocol strong`: how robust a model is, without any study.

Writes `manifest.json`, `table.csv` and `examples.html`, and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from trainables.caveats import evaluation_caveats
from trainables.cli.command import exit_on_input_error, place_or_url
from trainables.cli.flags import Flags, from_command_line
from trainables.config import CLEAN, TEST, CaptionForm, DataConfig, ModelConfig, Protocol, TrialConfig
from trainables.config.fields import Epsilon, Place, PlaceOrName, Seed
from trainables.errors import InputError
from trainables.evaluation.report import print_report, strongest, table
from trainables.files import below, held_copy, location
from trainables.identity import protocol_hash
from trainables.results import EvaluationManifest, Preprocessing, TrialResult

if TYPE_CHECKING:
    from trainables.attacks.contract import Attack
    from trainables.evaluation.robustness import Evaluation
    from trainables.models import RetrievalModel

KEPT = (
    *("epsilon", "words", "image_steps", "candidates", "eight_bit", "seed"),
    *("recall_at", "bootstrap_samples", "confidence"),
)
"""Fields of a protocol that a trial's own protocol sets for the evaluation of its model."""


class Arguments(Flags):
    """Measure a model, clean and under a named protocol of attacks."""

    model_config = SettingsConfigDict(cli_prog_name="python -m trainables.evaluate")
    common_fields = (
        *(
            "model",
            "protocol",
            "data.root",
            "data.eval_split",
            "data.image_pixels",
            "epsilon",
            "words",
            "gallery_images",
            "max_tokens",
        ),
        *("masked_lm", "transfer_from", "out"),
    )
    decided_later = dict.fromkeys(("data.image_pixels", "data.resize"), "as the model's family does")
    example_commands = (
        "python -m trainables.evaluate --model studies/mine/runs/mine-t00003-s0",
        "python -m trainables.evaluate --model DIR --data.root DIR --protocol strong",
    )

    model: PlaceOrName = Field(
        description="folder or URL of a trial (STUDIES/NAME/runs/KEY), a model's folder, or hub id"
    )
    protocol: PlaceOrName = Field("search", description="search, strong, natural, grid, or a YAML file of a protocol")
    data: DataConfig = DataConfig(eval_split=TEST)
    masked_lm: PlaceOrName | None = Field(None, description="masked language model for text attacks; empty: a tiny one")
    caption_text: CaptionForm = Field(
        "family",
        description="what the model reads of captions: as its family publishes it, or Co-Attack and SGA",
    )
    max_tokens: int | None = Field(
        None, ge=4, le=512, description="captions are cut to this many tokens; empty: as the model's family does"
    )
    rerank: int | None = Field(
        None, ge=0, description="first candidates that ALBEF and BLIP put in order by matching; empty: as they publish"
    )
    transfer_from: PlaceOrName | None = Field(
        None, description="attack this model, and replay what comes out on --model"
    )
    epsilon: Epsilon | None = Field(None, description="L-inf radius, in [0, 1] or as 2/255; empty: the protocol's")
    words: int | None = Field(None, ge=0, le=10, description="words changed per caption; empty: the protocol's")
    gallery_images: int | None = Field(None, ge=2, description="evaluation images; empty: the protocol's")
    seed: Seed | None = Field(None, description="of the attacks; empty: the protocol's")
    fold_images: int | None = Field(None, ge=2, description="also within blocks of so many images: 1000 is COCO 1K")
    ground_truth: Place | None = Field(None, description="folder of ECCV Caption's and CxC's ids, for COCO's test")
    examples: int = Field(8, ge=0, le=100, description="images shown on the page")
    cache_dir: Place = Field(Path("studies/.cache"), description="prepared data and adversarial examples")
    out: Place | None = Field(None, description="folder for the results; empty: evaluations/MODEL-PROTOCOL")


@dataclass(frozen=True)
class Subject:
    """A model that can be evaluated.

    Attributes:
        name: as it was given.
        model: on the CPU.
        temperature: its own, if it has one.
        trial: whose model it is, if it is a trial's.
    """

    name: str
    model: RetrievalModel
    temperature: float | None
    trial: TrialConfig | None

    @property
    def max_tokens(self) -> int:
        """Where captions are cut unless a flag says otherwise."""
        return self.model.max_tokens if self.trial is None else self.trial.model.max_tokens


def trial_folder(name: str) -> Path | None:
    """The last complete checkpoint below a trial's folder, or None where there is none. Of a URL, a copy."""
    folder = location(name)
    found = below(folder, "**/trial.json") if folder.is_dir() else []
    return held_copy(found[-1].parent) if found else None


def load_subject(name: str, image_pixels: int | None = None) -> Subject:
    """A trial's model, or one by folder, file or hub id.

    Args:
        name: as it was given.
        image_pixels: of the images to come, see `loading.load`.

    Raises:
        InputError: it cannot be loaded.
    """
    from trainables.models.loading import load

    folder = trial_folder(name)
    if folder is None and "://" in name:
        raise InputError(f"{name} has no model of a trial; a URL is that of its folder, STUDIES/NAME/runs/KEY")
    if folder is None:
        model = load(name, image_pixels)
        for guess in model.guesses:
            _log(f"{name}: {guess}")
        return Subject(name, model, model.own_temperature, None)
    trial = TrialConfig.model_validate_json((folder / "trial.json").read_text(encoding="utf-8"))
    result = TrialResult.model_validate_json((folder / "result.json").read_text(encoding="utf-8"))
    return Subject(name, load(str(folder / "model")), result.temperature, trial)


def parse(arguments: Sequence[str] | None = None) -> Arguments:
    """The evaluation that flags and `PARETOVL_...` variables describe; a trial brings its own data and budget.

    Raises:
        InputError: with all mistakes at once.
        SystemExit: after --help.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model", type=place_or_url, default=os.environ.get("PARETOVL_MODEL"))
    model = early.parse_known_args(given)[0].model
    folder = None if model is None else trial_folder(str(model))
    values: dict[str, Any] = {"data": {"eval_split": TEST}}
    if folder is not None:
        trial = TrialConfig.model_validate_json((folder / "trial.json").read_text(encoding="utf-8"))
        values = {
            "data": {**trial.data.model_dump(), "eval_split": TEST},
            "masked_lm": trial.model.masked_lm,
            "max_tokens": trial.model.max_tokens,
            "caption_text": trial.model.caption_text,
            "cache_dir": trial.cache_dir,
        }
    return from_command_line(Arguments, given, values, "the evaluation")


def settled(arguments: Arguments, model: RetrievalModel) -> Arguments:
    """The arguments, with what is not given as the model's family publishes it. A trial gives everything.

    Raises:
        InputError: more tokens than the model reads.
    """
    from trainables.models import check_length

    data = arguments.data
    own = {"image_pixels": model.image_pixels, "resize": model.resize}
    taken = {name: value for name, value in own.items() if value is not None and name not in data.model_fields_set}
    max_tokens = model.max_tokens if arguments.max_tokens is None else arguments.max_tokens
    check_length(model, max_tokens)
    return arguments.model_copy(update={"data": data.model_copy(update=taken), "max_tokens": max_tokens})


def _reranked(arguments: Arguments, subject: Subject) -> int | None:
    """How many candidates; ALBEF and BLIP publish 128 on Flickr30k."""
    if arguments.rerank is not None:
        return arguments.rerank or None
    if subject.trial is not None:
        return subject.trial.protocol.rerank
    published = subject.model.candidates
    return published and (128 if "flickr30k" in arguments.data.captions.lower() else published)


def protocol_of(arguments: Arguments, subject: Subject) -> Protocol:
    """The named protocol, with a trial's own budget and a family's re-ranking unless flags or a file say otherwise."""
    from trainables.evaluation.protocols import PROTOCOLS, named_protocol
    from trainables.models import FusionModel

    changes: dict[str, Any] = {}
    if subject.trial is not None:
        own = subject.trial.protocol
        changes = {name: getattr(own, name) for name in KEPT}
        if arguments.protocol == "search":
            changes["gallery_images"] = own.gallery_images
    flags = {name: getattr(arguments, name) for name in ("epsilon", "words", "gallery_images", "seed")}
    changes |= {name: value for name, value in flags.items() if value is not None}
    if arguments.rerank is not None or arguments.protocol in PROTOCOLS:
        changes["rerank"] = _reranked(arguments, subject)
    if arguments.protocol == "natural":
        changes.pop("eight_bit", None)
    return named_protocol(arguments.protocol, changes, fusion=isinstance(subject.model, FusionModel))


def run(arguments: Arguments) -> EvaluationManifest:
    """Evaluate, and write the results."""
    import numpy as np
    import torch

    from dashboards.evaluation_page import evaluation_page
    from trainables.attacks.registry import build_attacks
    from trainables.evaluation.adversarial import AdversarialCache, model_digest, replay, victim_digest
    from trainables.evaluation.audit import audit
    from trainables.evaluation.examples import examples
    from trainables.evaluation.protocols import budgets
    from trainables.evaluation.robustness import evaluate
    from trainables.evaluation.scores import (
        all_metrics,
        correct_bits,
        expected_metrics,
        extended_recalls,
        fold_recalls,
    )
    from trainables.prepare import Workshop
    from trainables.results import library_versions

    started = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels = arguments.data.image_pixels if "image_pixels" in arguments.data.model_fields_set else None
    subject = load_subject(arguments.model, pixels)
    arguments = settled(arguments, subject.model)
    protocol = protocol_of(arguments, subject)
    preprocessing = Preprocessing(
        image_pixels=arguments.data.image_pixels,
        resize=arguments.data.resize,
        max_tokens=arguments.max_tokens,
        caption_text=arguments.caption_text,
    )
    _log(_opening_line(preprocessing, subject, protocol))
    workshop = Workshop(_trial(arguments, subject, protocol), _log, subject.model.family)
    gallery = workshop.gallery().first(protocol.gallery_images)
    source = subject
    if arguments.transfer_from is not None:
        source = load_subject(arguments.transfer_from, preprocessing.image_pixels)
    source_tokens = preprocessing.max_tokens if source is subject else source.max_tokens
    attacks = build_attacks(protocol)
    hashes = {"data": workshop.dataset.digest, "substitutes": workshop.substitutes_hash}
    victim = victim_digest(source.model, source_tokens)
    caches = {
        name: AdversarialCache(arguments.cache_dir, victim, attack, protocol, gallery, hashes)
        for name, attack in attacks.items()
    }

    def measure(
        model: RetrievalModel, max_tokens: int, protocol: Protocol, attacks: Mapping[str, Attack]
    ) -> Evaluation:
        return evaluate(
            model.to(device),
            gallery,
            protocol,
            max_tokens=max_tokens,
            device=device,
            attacks=attacks,
            observe=lambda name, labels, made: caches[name].add(labels, made),
        )

    if arguments.transfer_from is not None:
        missing = {name: attack for name, attack in attacks.items() if not caches[name].complete}
        if missing:
            _log(f"attacking {source.name}: {', '.join(missing)}")
            wanted = tuple(attack for attack in protocol.attacks if attack.name in missing)
            measure(source.model, source_tokens, protocol.model_copy(update={"attacks": wanted}), missing)
        attacks = {name: replay(attack, caches[name]) for name, attack in attacks.items()}
    _log(f"{len(gallery.pixels)} images, {len(gallery.caption_image)} captions: {', '.join(attacks) or CLEAN}")
    replayed = arguments.transfer_from is not None
    scored = protocol.model_copy(update={"eight_bit": protocol.eight_bit and not replayed})  # they are rounded already
    found = measure(subject.model, preprocessing.max_tokens, scored, attacks)
    metrics = all_metrics(found.ranks, scored)
    further: dict[str, float] = {}
    if arguments.protocol == "grid":
        metrics |= expected_metrics({budget: found.ranks[name] for name, budget in budgets(protocol).items()}, scored)
    if arguments.fold_images:
        further |= fold_recalls(found.features, gallery, arguments.fold_images)
    if arguments.ground_truth:
        further |= extended_recalls(found.features, workshop.dataset.evaluation, arguments.ground_truth)
    verdict = None
    if protocol.audit:
        _log("looking for gradient masking")
        verdict = audit(
            subject.model,
            gallery,
            protocol,
            temperature=subject.temperature,
            max_tokens=preprocessing.max_tokens,
            device=device,
        )
    manifest = EvaluationManifest(
        model=arguments.model,
        model_digest=model_digest(subject.model),
        temperature=subject.temperature,
        transfer_from=arguments.transfer_from,
        data_digest=workshop.dataset.digest,
        split=arguments.data.eval_split,
        preprocessing=preprocessing,
        protocol=protocol,
        protocol_hash=protocol_hash(protocol),
        metrics=metrics,
        further=further,
        audit=verdict,
        correct=correct_bits(found.ranks, scored),
        queries={"tr": len(found.ranks[CLEAN].tr), "ir": len(found.ranks[CLEAN].ir)},
        captions_per_image=np.bincount(gallery.caption_image).tolist(),
        seconds=round(time.time() - started, 3),
        versions=library_versions(),
    )
    manifest = manifest.model_copy(update={"caveats": evaluation_caveats(manifest, protocol)})
    out = arguments.out or Path("evaluations") / f"{Path(arguments.model).name}-{Path(arguments.protocol).stem}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    with (out / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(table(manifest))
    shown = strongest(manifest)
    pairs = examples(found, shown, gallery, caches[shown].read, arguments.examples) if shown in caches else []
    (out / "examples.html").write_text(evaluation_page(manifest, shown, pairs), encoding="utf-8")
    print_report(manifest, out)
    return manifest


def _trial(arguments: Arguments, subject: Subject, protocol: Protocol) -> TrialConfig:
    """What the workshop needs to find or make data and substitutes."""
    trial = subject.trial or TrialConfig(model=ModelConfig(base=arguments.model))
    given = {name: getattr(arguments, name) for name in ("masked_lm", "max_tokens", "caption_text")}
    model = trial.model.model_copy(update=given)
    changes = {"data": arguments.data, "model": model, "protocol": protocol, "cache_dir": arguments.cache_dir}
    return trial.model_copy(update=changes)


def _opening_line(given: Preprocessing, subject: Subject, protocol: Protocol) -> str:
    family = subject.model.family
    text = f"{family}'s text" if given.caption_text == "family" else f"the text of the {given.caption_text}"
    ranked = f", the first {protocol.rerank} put in order by matching" if protocol.rerank else ""
    size = f"{given.image_pixels} x {given.image_pixels} ({given.resize})"
    if subject.model.image_pixels is None and subject.trial is None:
        size += ", which the model does not say: see --data.image-pixels"
    return f"{family}: images {size}; captions as {text}, at most {given.max_tokens} tokens{ranked}"


def _log(line: str) -> None:
    print(line, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 where nothing can be concluded from what was measured."""
    with exit_on_input_error():
        manifest = run(parse(arguments))
    return int(any(caveat.void for caveat in manifest.caveats))


if __name__ == "__main__":
    sys.exit(main())
