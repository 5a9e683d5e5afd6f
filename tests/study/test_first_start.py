"""A command that is refused leaves what it found, so that the corrected one is a first start."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from study.ledger.ownership import claim
from study.ledger.store import open_storage
from study.ledger.undo import undone_if_refused
from study.run import main
from tests.study.helpers import complete, opened, run_next, study
from trainables.errors import InputError

SMALL = (
    "--data.shapes.train-images",
    "32",
    "--data.shapes.val-images",
    "8",
    "--data.shapes.test-images",
    "8",
    "--data.image-pixels",
    "32",
)


def test_a_tracking_server_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others, (folder, shared) = tmp_path / "others.db", (tmp_path / name for name in ("given", "shared.db"))
    optuna.create_study(study_name="other", storage=f"sqlite:///{others}")
    (folder / "s").mkdir(parents=True)
    (folder / "s" / "notes.txt").write_text("mine")
    for studies, storage in ((tmp_path / "new", None), (tmp_path / "new", shared), (folder, others), (folder, None)):
        flags = ["--name", "s", "--studies-dir", str(studies), "--tracking.uri", "http://127.0.0.1:9", *SMALL]
        flags += ["--cache-dir", str(tmp_path / "cache"), *(["--storage", f"sqlite:///{storage}"] if storage else [])]
        with pytest.raises(SystemExit, match="2"):
            main(flags)
        assert "error: tracking.uri: " in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "given", "others.db"]
        assert {path.name for path in (folder / "s").iterdir()} <= {"notes.txt", ".lock"}
        assert optuna.get_all_study_names(f"sqlite:///{others}") == ["other"]


def test_another_database_of_a_study_that_was_begun(tmp_path: Path) -> None:
    config = study(tmp_path)
    run_next(opened(config), config, complete())
    before = sorted(tmp_path.rglob("*"))
    elsewhere = config.model_copy(update={"storage": f"sqlite:///{tmp_path}/other.db"})
    for refused in (elsewhere, config):
        if refused is config:
            config.paths.database.unlink()
            before.remove(config.paths.database)
        with pytest.raises(InputError, match="has no study 's'"), undone_if_refused(refused):
            claim(refused, open_storage(refused.paths, refused.storage), {"mark": 1}, False)
        assert sorted(tmp_path.rglob("*")) == before


def test_what_was_begun_stays(tmp_path: Path) -> None:
    config = study(tmp_path)

    def fail() -> None:
        run_next(opened(config), config, complete())
        raise InputError("the disk is full")

    with pytest.raises(InputError, match="full"), undone_if_refused(config):
        fail()
    assert [record.state for record in opened(config).records()] == ["complete", "waiting"]
