"""A hub id is one revision: the one in the cache of this machine, for as long as a study lasts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from study.arguments import parse
from study.ledger.frozen import fingerprint, freeze
from study.run import with_revisions
from trainables.config import TrialConfig
from trainables.hub import located, pinned
from trainables.models.loading import load
from trainables.prepare import prepare

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without network, as the hub's client lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "models--org--name"


def published(hub: Path, revision: str, files: Path | None = None) -> None:
    folder = hub / "snapshots" / revision
    if files is None:
        folder.mkdir(parents=True)
    else:
        shutil.copytree(files, folder)
    (hub / "refs").mkdir(exist_ok=True)
    (hub / "refs" / "main").write_text(revision)


def test_an_id_stands_for_the_revision_in_the_cache(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pinned("org/name") == "org/name", "nobody knows"
    published(hub, OLD)
    assert pinned("org/name") == f"org/name@{OLD}" == pinned(f"org/name@{OLD}")
    (hub / "refs" / "main").write_text(NEW)
    assert pinned("org/name") == "org/name", "nothing of it is here yet"
    published(hub, NEW)
    assert pinned("org/name") == f"org/name@{NEW}"
    assert Path(located(f"org/name@{OLD}")) == hub / "snapshots" / OLD
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for name in ("org/name", "./org/name", "/no/such", "a/b/c"):
        assert pinned(name) == name
        assert located(name) == name


def test_a_model_is_loaded_from_its_revision(hub: Path, tiny_trial: TrialConfig, tmp_path: Path) -> None:
    base = prepare(tiny_trial).base
    base.save(tmp_path / "model")
    published(hub, OLD, tmp_path / "model")
    published(hub, NEW)
    assert load(f"org/name@{OLD}").family == base.family


def test_a_study_keeps_its_revision(hub: Path, tmp_path: Path) -> None:
    def config(*flags: str) -> tuple[str | None, dict[str, object]]:
        given = with_revisions(parse(["--studies-dir", str(tmp_path), *flags]))
        given.paths.root.mkdir(parents=True, exist_ok=True)
        mark = fingerprint(given, "d", "c")
        freeze(given, mark, accept_changes=False)
        return given.trial.model.base, mark

    published(hub, OLD)
    begun = config("--trial.model.base", "org/name")
    assert begun[0] == f"org/name@{OLD}"
    published(hub, NEW)
    assert config() == config("--trial.model.base", "org/name") == begun
