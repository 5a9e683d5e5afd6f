"""`python -m study.track`."""

from __future__ import annotations

import fcntl
import shutil

import optuna
import pytest
from tracked import OBJECTIVES, FakeStudy, client_of, dump, runs_of

from study import track
from study.config import Budget, StudyConfig
from study.ledger.frozen import freeze
from study.ledger.store import open_storage
from study.tracking.projection import default_uri, ui_command


@pytest.fixture
def known_study(study: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> FakeStudy:
    config = StudyConfig(
        name="study", studies_dir=study.paths.root.parent, objectives=OBJECTIVES, budget=Budget(trials=5)
    )
    study.paths.config.unlink()
    study.fingerprint = freeze(config, {}, accept_changes=False)
    optuna.create_study(study_name="study", storage=open_storage(study.paths, None))
    monkeypatch.setattr("study.ledger.ledger.read_records", lambda name, storage: study.records)
    for _ in study.life():
        pass
    study.end(5, 0.9, 0.9)
    return study


def run_track(study: FakeStudy, *arguments: str) -> int:
    return track.main(["--name", "study", "--studies-dir", str(study.paths.root.parent), *arguments])


def test_the_command_syncs_and_rebuilds(
    known_study: FakeStudy, other_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_track(known_study) == 0
    shown = capsys.readouterr().out
    assert "6 trials, 6 ended, 1 on the front; the study is finished" in shown
    assert ui_command(None, known_study.paths) in shown
    assert run_track(known_study, "--tracking-uri", other_uri) == 0
    first = dump(other_uri)
    assert first == dump(default_uri(known_study.paths))
    client = client_of(other_uri)
    client.set_tag(runs_of(other_uri)["study study"].info.run_id, "stray", "1")
    assert run_track(known_study, "--tracking-uri", other_uri, "--rebuild") == 0
    assert dump(other_uri) == first


def test_the_command_refuses_what_it_cannot_use(known_study: FakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        track.main(["--name", "other", "--studies-dir", str(known_study.paths.root.parent)])
    assert "there is no study at" in (told := capsys.readouterr().err)
    assert told.endswith(": study\n")
    with known_study.paths.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            run_track(known_study)
        assert "is running" in capsys.readouterr().err
    assert run_track(known_study, "--tracking-uri", "nonsense://x") == 1
    assert "MLflow at nonsense://x failed" in capsys.readouterr().err


def test_a_study_with_something_left_to_do_is_interrupted(
    known_study: FakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(known_study.paths.manifest(known_study.records.pop().key).parent)
    assert run_track(known_study) == 0
    assert "the study is interrupted" in capsys.readouterr().out
