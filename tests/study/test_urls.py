"""A study whose folder is a bucket: what goes with that, what does not, and that all commands find it there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import yaml

from study import certify, export, plan, rebuild, run, status, track
from study.arguments import parse
from study.config import StudyConfig
from study.ledger.set_aside import set_aside
from study.paths import StudyPaths
from study.records import read_manifest
from study.tracking.mlflow_store import TrackingError, open_experiment
from tests.s3_server import S3Server
from tests.study.helpers import complete, opened, run_next, study
from trainables import files
from trainables.config import TrialConfig
from trainables.errors import InputError
from trainables.evaluate import load_subject, trial_folder
from trainables.execution.signals import RESUMABLE
from trainables.files import UrlPath
from trainables.object_storage import StorageAway


def refused(*flags: str) -> str:
    with pytest.raises(InputError) as told:
        parse(["--name", "s", *flags])
    return str(told.value)


def test_what_cannot_lie_in_a_bucket_is_told_at_once(bucket: UrlPath) -> None:
    told = refused("--studies-dir", str(bucket), "--data.root", "s3://b/coco", "--cache-dir", "cache")
    assert told.startswith("4 mistakes")
    assert "data.root: is a URL; give a path that every machine has (given: 's3://b/coco')" in told
    assert "cache_dir: is relative; where studies_dir is a URL, give a folder that each machine makes" in told
    assert "tracking: needs uri where studies_dir is a URL: http(s):// of an MLflow server, or a database" in told
    assert "storage: has to be a database server where studies_dir is a URL, such as postgresql" in told
    assert "storage: has to be" in refused("--studies-dir", str(bucket), "--storage", "sqlite:////tmp/x.db")


@pytest.mark.parametrize("command", ["run", "status", "export"])
@pytest.mark.parametrize("given", ["hdfs://b/x", "s3://", "s3:/b/x", "s3://me:secret@b/x"])
def test_no_url_means_a_folder_of_its_name(
    command: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main = {"run": run.main, "status": status.main, "export": export.main}[command]
    with pytest.raises(SystemExit) as end:
        main(["--name", "s", "--studies-dir", given])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert "BUCKET/PREFIX" in told
    assert "secret" not in told
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_that_cannot_be_used_is_one_message(
    bucket: UrlPath, postgresql_of_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--name", "s", "--storage", postgresql_of_file, "--tracking.uri", "http://127.0.0.1:9"]
    with pytest.raises(SystemExit) as end:
        run.main([*flags, "--studies-dir", "s3://nobody/studies"])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert "studies_dir: s3://nobody/studies/s cannot be used: NO_SUCH_BUCKET: The specified bucket does not" in told
    assert "AWS_ACCESS_KEY_ID" in told
    with pytest.raises(SystemExit):
        status.main(["--name", "s", "--studies-dir", str(bucket)])
    assert f"there is no study at {bucket}/s; studies in {bucket}: none" in capsys.readouterr().err


def test_wrong_keys_are_told_as_such(
    postgresql_of_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = S3Server(INITIAL_NO_AUTH_ACTION_COUNT="0")  # moto's word for: keys have to be right
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        status.main(["--name", "s", "--studies-dir", "s3://theirs/studies"])
    server.end()
    told = capsys.readouterr().err
    assert told.startswith("error: s3://theirs/studies/s/study.yaml: ACCESS_DENIED: ")
    assert "keys that may read, write, list and delete in it: AWS_ACCESS_KEY_ID" in told


def test_a_storage_that_goes_away_ends_the_session_as_resumable(
    bucket: UrlPath, postgresql_of_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(config: StudyConfig) -> int:
        try:
            raise StorageAway(5, "NETWORK_CONNECTION: no route", f"{bucket}/s/front.json")
        except StorageAway as error:
            raise RuntimeError("the Tune run failed") from error

    monkeypatch.setattr(run, "run", away)
    flags = ["--name", "s", "--storage", postgresql_of_file, "--tracking.uri", "http://127.0.0.1:9"]
    with pytest.raises(SystemExit) as end:
        run.main([*flags, "--studies-dir", str(bucket)])
    assert end.value.code == RESUMABLE
    told = capsys.readouterr().err
    assert told == (
        f"stopped: {bucket}/s/front.json does not answer (NETWORK_CONNECTION: no route); nothing is lost: "
        "run the same command again\n"
    )


@pytest.mark.parametrize("command", [run, plan, status, export, track, rebuild, certify])
def test_a_storage_that_is_away_from_the_start_is_resumable_for_all_commands(
    command: ModuleType, bucket: UrlPath, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(files.opened, "__defaults__", (1,))  # it would try for 40 s
    with pytest.raises(SystemExit) as end:
        command.main(["--name", "s", "--studies-dir", str(bucket)])
    told = capsys.readouterr().err
    assert end.value.code == RESUMABLE, told
    assert re.fullmatch(rf"stopped: {bucket}/s\S* does not answer \(NETWORK_CONNECTION: .*run the same .*\n", told), (
        told
    )


def end(config: StudyConfig, key: str) -> None:
    """Go on with the study, and end the trial that is left."""
    ledger = opened(config)
    (number,) = ledger.remaining().resume
    assert ledger.records()[number].key == key
    ledger.finish(ledger.take(number), complete(0.4, 0.3), TrialConfig())


def exported(studies: Path | UrlPath, to: Path) -> dict[str, pd.DataFrame]:
    assert export.main(["--name", "s", "--studies-dir", str(studies), "--out", str(to)]) == 0
    tables = {name: pd.read_csv(to / f"{name}.csv") for name in ("trials", "events")}
    return {name: table.drop(columns=["time", "ended"], errors="ignore") for name, table in tables.items()}


def test_it_is_the_study_that_lies_on_a_disk(
    bucket: UrlPath, postgresql_of_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables, standings = {}, []
    remote = {"storage": postgresql_of_file, "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"}}
    for name, studies, fields in (("disk", tmp_path / "studies", {}), ("bucket", bucket / "studies", remote)):
        config = study(studies, **fields)
        ledger = opened(config)
        run_next(ledger, config, complete(0.5, 0.1))
        key = ledger.take().key
        del ledger  # killed with a trial on its way
        end(config, key)
        account = config.paths.manifest(key)
        assert read_manifest(account) is not None
        set_aside(config.paths, opened(config).records(), [key])
        assert read_manifest(account) is None
        assert (config.paths.root / "set_aside" / key / "1" / key / "manifest.json").exists()
        end(config, key)
        capsys.readouterr()
        assert status.main(["--name", "s", "--studies-dir", str(studies), "--json"]) == 0
        standing = json.loads(capsys.readouterr().out)
        standings.append([standing[field] for field in ("states", "front", "hypervolume", "state")])
        tables[name] = exported(studies, tmp_path / name)
    assert standings[0] == standings[1]
    assert standings[0][0]["complete"] == 2
    for name in ("trials", "events"):
        pd.testing.assert_frame_equal(tables["disk"][name], tables["bucket"][name])
    frozen = yaml.safe_load((bucket / "studies" / "s" / "study.yaml").read_text(encoding="utf-8"))
    assert frozen["config"]["studies_dir"] == str(bucket / "studies")
    assert StudyPaths(bucket / "studies" / "s").resume_command.endswith(f"--studies-dir {bucket}/studies")


def test_mlflow_without_a_client_for_the_bucket_is_told_at_once(
    bucket: UrlPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(TrackingError, match=r"MLflow needs boto3 to put artifacts to s3://.*: install it"):
        open_experiment(f"sqlite:///{tmp_path}/mlflow.db", "paretovl/s", "id", bucket / "mlartifacts")


def test_a_trials_model_is_read_from_a_bucket(bucket: UrlPath) -> None:
    for step, name in ((1, "trial.json"), (2, "trial.json"), (2, "model/config.json"), (3, "state.json")):
        (bucket / "runs" / "s-t00000-s0" / f"checkpoint_{step}" / name).write_text(f"{step}", encoding="utf-8")
    folder = trial_folder(str(bucket / "runs" / "s-t00000-s0"))
    assert folder is not None
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json")) == [
        "model/config.json",
        "trial.json",
    ]
    assert (folder / "trial.json").read_text() == "2"
    assert trial_folder(str(bucket / "runs" / "s-t00001-s0")) is None
    with pytest.raises(InputError, match="has no model of a trial; a URL is that of its folder"):
        load_subject(str(bucket / "runs" / "s-t00001-s0"))
