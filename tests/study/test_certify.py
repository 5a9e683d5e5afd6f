"""What a study found is measured again: whoever hides gradients or claims too much leaves the certified front."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import trainables.models.loading
from study import certify
from study.config import Budget, Objective, StudyConfig, TrialTemplate
from study.front.certification import (
    Certificate,
    CertifiedFront,
    Terms,
    comparable_targets,
    judge,
    table,
    worst_case,
)
from study.front.estimates import FrontEntry
from study.ledger.ledger import Ledger
from study.records import read_manifest
from study.tracking.mlflow_store import import_mlflow
from study.tracking.projection import default_uri
from tests.study.helpers import opened, study
from trainables.config import DataConfig, ModelConfig, Point, Protocol, ShapesConfig, TrialConfig
from trainables.errors import InputError
from trainables.evaluate import trial_folder
from trainables.models.clip import Clip
from trainables.prepare import prepare
from trainables.results import Audit, Check, EvaluationManifest, Loss, Metric, Outcome, TrialResult
from trainables.training.finetune import finetune

PROTOCOL = Protocol(words=0, gallery_images=32, rung_gallery_images=6, image_steps=8, bootstrap_samples=100)
HONEST, MASKED, LIAR, GONE = range(4)


class Staircase(Clip):
    """Rounds its pixels to few levels: what it computes is as good, but no gradient comes back through it."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        return super().encode_image((pixels * 16).round() / 16)


def end(ledger: Ledger, config: StudyConfig, trial: TrialConfig, claims: dict[str, float]) -> str:
    """Train the next trial of the study, and account for it with what it claims."""
    record = ledger.take()
    folder = config.paths.runs / record.key
    folder.mkdir(parents=True)
    trial = trial.model_copy(update={"key": record.key})
    finetune(trial, prepare(trial), torch.device("cpu"), None, folder, lambda metrics, checkpoint: None)
    saved = trial_folder(str(folder))
    assert saved is not None
    result = TrialResult.model_validate_json((saved / "result.json").read_text())
    claimed = {name: Metric(value=value, low=value, high=value) for name, value in claims.items()}
    result = result.model_copy(update={"metrics": {**result.metrics, **claimed}})
    ledger.finish(record, Outcome(state="complete", result=result), trial)
    return record.key


@pytest.fixture(scope="module")
def finished(tiny_trial: TrialConfig, tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """A study with an honest model, one that hides its gradients, one that claims too much, and one that is gone."""
    pretrain = tiny_trial.model.pretrain.model_copy(update={"epochs": 15})
    point = Point(temperature=0.07, epsilon=PROTOCOL.epsilon, attack_steps=1)
    trial = tiny_trial.model_copy(
        update={
            "data": DataConfig(image_pixels=32, shapes=ShapesConfig(train_images=500, val_images=32, test_images=32)),
            "model": tiny_trial.model.model_copy(update={"pretrain": pretrain}),
            "training": tiny_trial.training.model_copy(update={"epoch_images": 64}),
            "protocol": PROTOCOL,
            "point": point,
        }
    )
    config = study(
        tmp_path_factory.mktemp("studies"),
        recipes=(),
        budget=Budget(trials=4),
        protocol=PROTOCOL,
        objectives=(Objective(metric="clean/mr_r5"), Objective(metric="both/mr_r5")),
    )
    ledger = opened(config)
    end(ledger, config, trial, {"clean/mr_r5": 0.99, "both/mr_r5": 0.2})
    end(ledger, config, trial, {"clean/mr_r5": 0.98, "both/mr_r5": 0.3})
    spoilt = trial.model_copy(update={"training": trial.training.model_copy(update={"learning_rate": 0.03})})
    end(ledger, config, spoilt, {"clean/mr_r5": 0.97, "both/mr_r5": 0.8})
    gone = end(ledger, config, trial, {"clean/mr_r5": 0.1, "both/mr_r5": 0.9})
    folder = trial_folder(str(config.paths.runs / gone))
    assert folder is not None
    (folder / "trial.json").unlink()
    return config


def run(config: StudyConfig, *flags: str) -> int:
    return certify.main(["--name", config.name, "--studies-dir", str(config.studies_dir), *flags])


@pytest.fixture
def planted(finished: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    masked, load = f"s-t{MASKED:05d}-s0", trainables.models.loading.load

    def load_planted(name: str, image_pixels: int | None = None) -> Any:
        model = load(name, image_pixels)
        return Staircase(model.clip, model.tokenizer) if masked in name and isinstance(model, Clip) else model

    monkeypatch.setattr(trainables.models.loading, "load", load_planted)
    return finished


def test_only_the_honest_stay(planted: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    harder = planted.paths.root / "harder.yaml"
    harder.write_text("{attacks: [image, both, 'torchattacks:APGD'], audit: true, gallery_images: 1000}")
    assert run(planted, "--protocol", str(harder)) == 0
    decided = CertifiedFront.model_validate_json(planted.paths.certified_front.read_text())
    keys = [f"s-t{number:05d}-s0" for number in range(4)]
    assert [entry.key for entry in decided.front] == [keys[HONEST]]
    reasons = {left.key: left.reason for left in decided.left}
    assert set(reasons) == {keys[MASKED], keys[LIAR], keys[GONE]}
    assert "hides its gradients from the protocol's attack, so its recalls do not count" in reasons[keys[MASKED]]
    assert "gradients are there" in reasons[keys[MASKED]]
    assert reasons[keys[LIAR]] == f"measured again, it is dominated by {keys[HONEST]}"
    assert "its model is gone" in reasons[keys[GONE]]

    honest = Certificate.model_validate_json(planted.paths.certificate(keys[HONEST]).read_text())
    assert honest.terms.seed == PROTOCOL.seed + certify.FRESH
    assert honest.worst_of == {
        "clean/mr_r5": ["clean"],
        "both/mr_r5": ["image", "both", "apgd"],
    }
    robust = honest.values["both/mr_r5"]
    assert robust.low <= robust.value <= robust.high
    assert robust.value <= min(honest.metrics[f"{attack}/mr_r5"].value for attack in honest.worst_of["both/mr_r5"])
    assert decided.front[0].values["both/mr_r5"] == robust.value
    assert (decided.held_out, decided.front[0].split) == (True, "test")
    assert set(honest.correct) > {f"apgd/{direction}_r5" for direction in ("tr", "ir")}
    shown = capsys.readouterr().out
    assert "0.970 -> " in shown
    assert "1 of 4 are certified" in shown
    assert "not certified: hides its gradients" in " ".join(shown.split())
    assert set(decided.findings) == set(keys) - {keys[GONE]}
    assert decided.findings[keys[MASKED]] == reasons[keys[MASKED]]

    runs = import_mlflow().MlflowClient(default_uri(planted.paths)).search_runs(["1"], "tags.certified = 'true'")
    assert [found.data.tags["paretovl.trial"] for found in runs] == [keys[HONEST]]

    # Again: nothing is measured twice, and a stop on the way costs one model at most.
    stamps = {path: path.stat().st_mtime_ns for path in planted.paths.root.glob("certified/*.json")}
    assert len(stamps) == 3
    planted.paths.certificate(keys[LIAR]).unlink()
    assert run(planted, "--protocol", str(harder)) == 0
    again = {path: path.stat().st_mtime_ns for path in planted.paths.root.glob("certified/*.json")}
    assert {path for path in stamps if again[path] != stamps[path]} == {planted.paths.certificate(keys[LIAR])}
    assert CertifiedFront.model_validate_json(planted.paths.certified_front.read_text()) == decided

    # The study's own account is untouched.
    claimed = read_manifest(planted.paths.manifest(keys[LIAR]))
    assert claimed is not None
    assert claimed.metrics["both/mr_r5"].value == 0.8

    certificate = planted.paths.certificate(keys[HONEST])
    whole = certificate.read_text()
    certificate.write_text(whole[:50])
    with pytest.raises(SystemExit):
        run(planted, "--protocol", str(harder))
    assert "is not the account of a trial: it is empty or cut short" in capsys.readouterr().err
    certificate.write_text(whole)

    with pytest.raises(SystemExit):
        run(planted, "--protocol", str(harder), "--seed", "5")
    assert "was made on other terms" in capsys.readouterr().err

    # A certificate, a model and a protocol are known by what is in them.
    harder.write_text(harder.read_text().replace("'torchattacks:APGD'", "text"))
    refused(planted, harder, capsys, f"{keys[HONEST]}.json was made from something else", "protocol_hash: ")
    harder.write_text(harder.read_text().replace("text", "'torchattacks:APGD'"))
    claims = planted.paths.certificate(keys[LIAR])
    kept = claims.read_text()
    claims.write_text(kept.replace('"value": 0.8', '"value": 0.7'))
    refused(planted, harder, capsys, f"{keys[LIAR]}.json was made from something else", "claimed.both/mr_r5.value: 0.7")
    claims.write_text(kept)
    saved = trial_folder(str(planted.paths.runs / keys[HONEST]))
    assert saved is not None
    weights = (saved / "model" / "model.safetensors").read_bytes()
    (saved / "model" / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    refused(planted, harder, capsys, f"{keys[HONEST]}.json was made from something else", "model_digest: ")
    (saved / "model" / "model.safetensors").write_bytes(weights)
    assert run(planted, "--protocol", str(harder)) == 0
    trial = TrialConfig.model_validate_json((saved / "trial.json").read_text())
    other = trial.model_copy(update={"point": trial.point.model_copy(update={"temperature": 0.08})})
    (saved / "trial.json").write_text(other.model_dump_json())
    refused(planted, harder, capsys, "holds another model than the one that", "point.temperature: 0.07 -> 0.08")
    (saved / "trial.json").write_text(trial.model_copy(update={"owner": "theirs"}).model_dump_json())
    refused(planted, harder, capsys, "holds another model than the one that", " -> theirs")
    (saved / "trial.json").write_text(trial.model_dump_json())
    certificate.write_text(json.dumps({**json.loads(whole), "study": "theirs"}))
    refused(planted, harder, capsys, f"{keys[HONEST]}.json was made from something else", "study: theirs -> ")


def refused(config: StudyConfig, protocol: Path, capsys: pytest.CaptureFixture[str], *told: str) -> None:
    with pytest.raises(SystemExit):
        run(config, "--protocol", str(protocol))
    message = capsys.readouterr().err
    for part in told:
        assert part in message


def test_a_query_counts_only_if_it_survives_every_attack() -> None:
    def bits(*values: int) -> str:
        return base64.b64encode(np.packbits(np.array(values, bool)).tobytes()).decode()

    protocol = Protocol.model_validate(
        {"attacks": ("image", "both"), "recall_at": (1,), "gallery_images": 4, "bootstrap_samples": 100}
    )
    evaluated = EvaluationManifest(
        model="m",
        model_digest="",
        temperature=None,
        transfer_from=None,
        data_digest="",
        protocol=protocol,
        protocol_hash="",
        metrics={},
        audit=None,
        correct={
            "image/tr_r1": bits(1, 1, 0, 0),
            "both/tr_r1": bits(1, 0, 1, 0),
            "image/ir_r1": bits(1, 1, 1, 1),
            "both/ir_r1": bits(0, 1, 1, 1),
        },
        queries={"tr": 4, "ir": 4},
        captions_per_image=[1, 1, 1, 1],
        seconds=0,
        versions={},
    )
    assert worst_case(evaluated, ["image", "both"], "tr_r1").value == 0.25, "each alone has 0.5"
    assert worst_case(evaluated, ["image", "both"], "ir_r1").value == 0.75
    assert worst_case(evaluated, ["image", "both"], "mr_r1").value == 0.5
    interval = worst_case(evaluated, ["image"], "tr_r1")
    assert interval.low < 0.5 < interval.high


def test_only_attacks_that_change_the_same_are_compared() -> None:
    own = Protocol(rerank=4)
    strong = Protocol.model_validate({"attacks": ("image", "text", "sga"), "rerank": 4})
    assert comparable_targets("clean", own, strong) == ["clean"]
    assert comparable_targets("clean.itm", own, strong) == ["clean.itm"]
    assert comparable_targets("image", own, strong) == ["image"]
    assert comparable_targets("text", own, strong) == ["text"]
    assert comparable_targets("both", own, strong) == ["image", "text", "sga"]
    assert comparable_targets("image.float", own, strong) == ["image.float"]
    assert comparable_targets("both.itm", own, strong) == ["image.itm", "text.itm", "sga.itm"]
    with pytest.raises(InputError, match=r"no target image\.itm, as 'image\.itm' is measured after it"):
        comparable_targets("image.itm", own, strong.model_copy(update={"rerank": None}))
    with pytest.raises(InputError, match="no attack that changes text"):
        comparable_targets("text", own, strong.model_copy(update={"attacks": strong.attacks[:1]}))


@pytest.mark.parametrize("family", ["albef", "blip"])
def test_what_is_judged_after_matching_can_be_certified(
    family: Literal["albef", "blip"], tiny_trial: TrialConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol = Protocol(
        words=0, gallery_images=8, rung_gallery_images=4, image_steps=1, bootstrap_samples=100, rerank=4
    )
    model = tiny_trial.model.model_copy(update={"family": family})
    trial = tiny_trial.model_copy(update={"model": model, "protocol": protocol})
    metrics = ("clean.itm/mr_r5", "both.itm/mr_r5")
    config = study(
        tmp_path,
        recipes=(),
        budget=Budget(trials=1),
        protocol=protocol,
        objectives=tuple(Objective(metric=metric) for metric in metrics),
        trial=TrialTemplate(model=ModelConfig(family=family)),
    )
    key = end(opened(config), config, trial, dict.fromkeys(metrics, 0.5))
    harder = tmp_path / "harder.yaml"
    harder.write_text("{attacks: [image, both], audit: true, gallery_images: 8}")
    with pytest.raises(SystemExit):
        run(config, "--protocol", str(harder))
    told = capsys.readouterr().err
    assert "no target clean.itm, as 'clean.itm' is measured after it" in told
    assert "audit" not in told, "it was measured before"
    harder.write_text("{attacks: [image, both], audit: true, gallery_images: 8, rerank: 4}")
    run(config, "--protocol", str(harder))
    found = Certificate.model_validate_json(config.paths.certificate(key).read_text())
    assert found.worst_of == {"clean.itm/mr_r5": ["clean.itm"], "both.itm/mr_r5": ["image.itm", "both.itm"]}
    assert found.values["both.itm/mr_r5"].value <= found.metrics["image.itm/mr_r5"].value


def test_a_study_that_runs_is_not_certified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = study(tmp_path)
    opened(config)
    with config.paths.lock.open("w") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            run(config)
    assert "is running" in capsys.readouterr().err
    assert run(config) == 1
    assert json.loads(config.paths.certified_front.read_text())["front"] == []


@pytest.mark.parametrize(
    ("failed", "told", "counts"),
    [
        ((), "no sign that it hides its gradients", True),
        (("own",), "so its recalls count; not passed: check of own", True),
        (("own", "protocol"), "so its recalls do not count; not passed: check of protocol", False),
    ],
)
def test_what_was_found_is_told_in_words_that_do_not_contradict(
    failed: tuple[Loss, ...], told: str, counts: bool
) -> None:
    losses: tuple[Loss, ...] = ("own", "protocol")
    checks = [
        Check(name=f"check of {loss}", loss=loss, passed=loss not in failed, evidence={}, rule="") for loss in losses
    ]
    verdict: Literal["honest", "masked"] = "masked" if failed else "honest"
    found = Audit(verdict=verdict, reliable="protocol" not in failed, checks=checks)
    assert told in found.finding
    value = Metric(value=0.5, low=0.4, high=0.6)
    terms = Terms(protocol="strong", seed=1, gallery_images=None)
    certificate = Certificate.model_construct(
        key="k", terms=terms, values={"a": value}, claimed={"a": value}, audit=found
    )
    entry = FrontEntry(
        key="k", params={}, values={"a": 0.5}, intervals={"a": (0.4, 0.6)}, recipe=None, replicates=1, probability=1
    )
    objectives = [Objective.model_construct(metric="a", direction="maximize", low=0, high=1)]
    decided = judge(terms, "val", [entry], [certificate], objectives)
    shown = Console(width=300, record=True, file=io.StringIO())
    shown.print(table(decided, [certificate], objectives))
    text = shown.export_text()
    assert (("* " in text), "not certified:" in text) == (counts, not counts)
    assert found.finding in text
    assert "masked" not in text
    assert decided.findings == {"k": found.finding}
