"""Input that cannot be used: one clear message, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import fcntl
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import sqlalchemy as sa
import yaml
from PIL import Image
from pydantic import ValidationError

from study.arguments import parse
from study.config import StudyConfig
from study.ledger.store import open_storage
from study.paths import StudyPaths
from study.run import main
from trainables.config import Point
from trainables.errors import InputError

Prepare = Callable[[Path], list[str]]


def dataset(folder: Path) -> Path:
    """A small COCO-format set: four training images and three for evaluation, five captions each."""
    root = folder / "data"
    (root / "images").mkdir(parents=True)
    ids = range(1, 8)
    for i in ids:
        Image.fromarray(np.full((20, 20, 3), 30 * i, dtype=np.uint8)).save(root / "images" / f"{i}.png")
    images = [{"id": i, "file_name": f"{i}.png"} for i in ids]
    captions = [{"id": 10 * i + k, "image_id": i, "caption": f"grey {i} form {k}"} for i in ids for k in range(5)]
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (root / "split.json").write_text(json.dumps({"train": [1, 2, 3, 4], "val": [5, 6, 7]}))
    return root


def edited(folder: Path, change: Callable[[dict[str, list[dict[str, object]]]], object]) -> list[str]:
    root = dataset(folder)
    content = json.loads((root / "captions.json").read_text())
    change(content)
    (root / "captions.json").write_text(json.dumps(content))
    return ["--data.root", str(root)]


def with_file(folder: Path, content: object) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return ["--config", str(path)]


def damaged(folder: Path, name: str, content: bytes) -> list[str]:
    root = dataset(folder)
    (root / name).write_bytes(content)
    return ["--data.root", str(root)]


def file_in_place_of_folder(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["--studies-dir", str(folder / "file")]


def locked(folder: Path) -> list[str]:
    study = folder / "studies" / "quickstart"
    study.mkdir(parents=True)
    lock = (study / ".lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    HELD.append(lock)
    return []


def foreign_port(folder: Path) -> list[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    HELD.append(listener)
    return ["--cluster.address", f"127.0.0.1:{listener.getsockname()[1]}"]


def older_optuna(folder: Path) -> list[str]:
    (folder / "studies" / "quickstart").mkdir(parents=True)
    engine = open_storage(StudyPaths(folder / "studies" / "quickstart"), None).engine
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'v2.6.0.a'"))
    engine.dispose()
    return []


def database_of_mlflow(folder: Path) -> list[str]:
    url = f"sqlite:///{folder / 'mlflow.db'}"
    with sa.create_engine(url).begin() as connection:
        connection.execute(sa.text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"))
        connection.execute(sa.text("INSERT INTO alembic_version VALUES ('1b5f0d9ad7c1')"))
    return ["--storage", url]


def made(folder: Path, name: str) -> list[str]:
    (folder / "studies" / "quickstart" / name).mkdir(parents=True)
    return []


def base_of(folder: Path, family: str, fields: dict[str, object]) -> list[str]:
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": family}))
    return [*with_file(folder, fields), "--trial.model.base", str(base)]


def everything_missing(folder: Path) -> list[str]:
    attacks = {"attacks": ["both", "imgae", {"name": "long", "attack": "image", "options": {"step": 3}}]}
    flags = ["--data.root", str(folder / "nowhere"), "--trial.model.masked-lm", str(folder / "bert")]
    flags += ["--trial.model.pretrain.root", str(folder / "pairs")]
    return [*with_file(folder, {"protocol": attacks, "objectives": [{"metric": "both/mr_r1"}]}), *flags]


WEIGHT = {"kind": "float", "low": 0, "high": 0.9}
MATCHED = {"space": {"contrastive_weight": WEIGHT, "companion": {"kind": "choice", "choices": ["matching"]}}}
HELD: list[IO[str] | socket.socket] = []
FLOAT_KNOB = {"kind": "float", "low": 0, "high": 2}

BAD: dict[str, tuple[Prepare, str]] = {
    "unknown field": (
        lambda f: with_file(f, {"budgett": {"trials": 3}}),
        "budgett: no such field; did you mean budget?",
    ),
    "field of another part": (
        lambda f: with_file(f, {"trial": {"training": {"batchsize": 3}, "gpus_per_worker": 1}}),
        "did you mean trial.training.batch_size?\n"
        "  trial.gpus_per_worker: no such field; did you mean trial.workers.gpus_per_worker?",
    ),
    "unknown flag": (lambda f: ["--budget.trial", "4"], "did you mean --budget.trials"),
    "flag without value": (lambda f: ["--budget.trials"], "expected one argument"),
    "several mistakes": (lambda f: ["--budget.trials", "-1", "--seed", "x"], "2 mistakes"),
    "wrong type": (lambda f: ["--protocol.epsilon", "much"], "protocol.epsilon"),
    "radius by zero": (lambda f: ["--protocol.epsilon", "2/0"], "write a radius"),
    "broken YAML": (lambda f: with_file(f, "a: [1"), "is no YAML"),
    "no mapping": (lambda f: with_file(f, "- 1"), "not fields with values"),
    "missing file": (lambda f: ["--config", str(f / "none.yaml")], "none.yaml: cannot be read"),
    "unknown preset": (lambda f: ["--preset", "slowstart"], "presets are"),
    "study name": (lambda f: ["--name", "../elsewhere"], "use letters a-z, digits"),
    "knob out of range": (lambda f: with_file(f, {"space": {"contrastive_weight": FLOAT_KNOB}}), "out of range"),
    "unknown knob": (lambda f: with_file(f, {"space": {"tempo": FLOAT_KNOB}}), "space.tempo: no such knob"),
    "unknown metric": (lambda f: with_file(f, {"objectives": [{"metric": "clean/r1"}]}), "no metric clean/r1"),
    "batch and workers": (lambda f: ["--trial.workers.count", "3"], "no multiple of"),
    "two families": (
        lambda f: ["--trial.model.base", "a", "--trial.model.image-tower", "b"],
        "not both",
    ),
    "text tower alone": (lambda f: ["--trial.model.text-tower", "a"], "goes with image_tower"),
    "missing data root": (lambda f: ["--data.root", str(f / "nowhere")], "nowhere"),
    "broken annotations": (lambda f: damaged(f, "captions.json", b"{"), "captions.json"),
    "annotation without image": (
        lambda f: edited(f, lambda c: c["annotations"].append({"id": 999, "image_id": 77, "caption": "a"})),
        "77",
    ),
    "file name leaves the folder": (
        lambda f: edited(f, lambda c: c["images"][0].update(file_name="../../secret.png")),
        "../../secret.png",
    ),
    "zero-byte image": (lambda f: damaged(f, "images/2.png", b""), "2.png"),
    "missing split": (lambda f: damaged(f, "split.json", b'{"train": [1]}'), "data.val_share 0.1 of 1 training images"),
    "leak": (lambda f: damaged(f, "split.json", b'{"train": [1, 2, 5], "test": [5, 6]}'), "5"),
    "file in place of the studies": (file_in_place_of_folder, "cannot be written"),
    "second driver": (locked, "running in another process"),
    "unusable storage": (
        lambda f: ["--storage", "sqlite:////nowhere/at/all/study.db"],
        "storage: the study's database",
    ),
    "unknown storage": (lambda f: ["--storage", "carrier-pigeon://me:secret@home/db"], "storage: the study's database"),
    "database of an older Optuna": (older_optuna, "optuna storage upgrade --storage sqlite:///"),
    "database of another program": (database_of_mlflow, "storage: the study's database"),
    "folder in place of the database": (lambda f: made(f, "study.db"), "study.db cannot be used: unable to open"),
    "folder in place of the lock": (lambda f: made(f, ".lock"), ".lock: Is a directory"),
    "folder in place of study.yaml": (lambda f: made(f, "study.yaml"), "study.yaml: cannot be read: Is a directory"),
    "warm start from nowhere": (
        lambda f: with_file(f, {"warm_start": ["nowhere"]}),
        "error: warm_start: there is no study 'nowhere'",
    ),
    "tracking unreachable": (lambda f: ["--tracking.uri", "http://127.0.0.1:9"], "tracking.uri"),
    "port of something else": (foreign_port, "cluster.address"),
    "attack that is none": (everything_missing, "protocol.attacks, imgae: no attack 'imgae'; there are image, text"),
    "option that is none": (everything_missing, "protocol.attacks, long: no option step; options are"),
    "model that is not there": (everything_missing, "/bert; give a hub id, a folder, or a file of weights"),
    "pairs that are not there": (everything_missing, "/pairs is no folder"),
    "data that is not there": (everything_missing, "nowhere is no folder"),
    "file of an attack": (
        lambda f: with_file(f, {"protocol": {"attacks": ["image", "both", f"{f}/mine.py:Mine"]}}),
        "mine.py; write FILE.py:CLASS",
    ),
    "companion that the base has not": (
        lambda f: base_of(f, "clip", MATCHED),
        "/base is a clip:\n  companion matching: a clip has no fusion transformer to match pairs with (for example at",
    ),
    "re-ranking that the base cannot": (
        lambda f: base_of(f, "siglip", {"protocol": {"rerank": 9}}),
        "protocol.rerank: a siglip has no fusion transformer",
    ),
    "data set without a root": (
        lambda f: ["--data.captions", "dataset_coco.json"],
        "data.captions: given, but data.root does not say where that data set is",
    ),
    "variable that sets nothing": (
        lambda f: ["--config", "$NOT_SET_ANYWHERE/study.yaml"],
        "the variable $NOT_SET_ANYWHERE is not set",
    ),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare, expected = BAD[name]
    small = [
        "--data.image-pixels",
        "16",
        "--data.shapes.train-images",
        "16",
        "--data.shapes.val-images",
        "8",
        "--data.shapes.test-images",
        "8",
    ]
    flags = ["--studies-dir", str(tmp_path / "studies"), *small, *prepare(tmp_path)]
    try:
        with pytest.raises(SystemExit) as end:
            main(flags)
    finally:
        while HELD:
            HELD.pop().close()
    told = capfd.readouterr()
    assert end.value.code == 2, told
    assert told.err.count("error:") == 1, told.err
    assert expected in told.err
    assert "Traceback" not in told.err
    assert "secret@" not in told.err
    assert not list(tmp_path.glob("studies/*/trials/*/events.jsonl"))


def test_all_mistakes_are_told_at_once_also_those_that_depend_on_other_fields(tmp_path: Path) -> None:
    wrong = {
        "replicates": -1,
        "objectives": [{"metric": "clean/r1"}],
        "constraints": [{"metric": "cost/coffee", "at_most": 3}],
        "points": [{"tau": 3}],
        "budget": {"money": 3},
        "trial": {"training": {"batch_size": 7}, "workers": {"count": 2}},
    }
    told = message(tmp_path, wrong)
    assert re.findall(r"^  ([\w.]+):", told, re.MULTILINE) == sorted(wrong, key=list(StudyConfig.model_fields).index)
    # What cannot be known while another field is wrong is not told.
    assert "objectives" not in message(tmp_path, wrong | {"protocol": {"recall_at": [0]}})
    assert "points" not in message(tmp_path, wrong | {"space": {"tau": FLOAT_KNOB}})
    # Defaults are held against what was given, too.
    with pytest.raises(ValidationError, match="no metric clean/mr_r1, both/mr_r1"):
        StudyConfig.model_validate({"protocol": {"recall_at": [5]}})


def message(folder: Path, fields: dict[str, Any]) -> str:
    with pytest.raises(InputError) as error:
        parse(with_file(folder, fields))
    return str(error.value)


def test_unknown_flag(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--studies-dir", str(tmp_path), "--bugdet.trials", "3"])
    assert end.value.code == 2
    assert "--bugdet.trials" in capfd.readouterr().err


def test_points_that_contradict_themselves() -> None:
    for fields in ({"epsilon": 0.1}, {"attack_steps": 2}, {"epsilon": "3/2", "attack_steps": 1}):
        with pytest.raises(ValueError, match=r"attack_steps|less than"):
            Point.model_validate(fields)
