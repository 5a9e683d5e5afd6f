"""A study is one study: in its folder, in its database, in everything that it leaves behind."""

from __future__ import annotations

import threading
from pathlib import Path

import optuna
import pytest

from study.config import StudyConfig
from study.ledger.lease import Lease
from study.ledger.ownership import claim
from study.ledger.remake import ID
from study.ledger.store import open_storage
from study.records import read_frozen
from tests.study.helpers import study
from trainables.errors import InputError


@pytest.fixture(params=["sqlite", "postgresql"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database that several folders use."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgresql"))
    return f"sqlite:///{tmp_path / 'shared.db'}"


def begun(config: StudyConfig) -> None:
    config.paths.root.mkdir(parents=True, exist_ok=True)
    storage = open_storage(config.paths, config.storage)
    with Lease(storage.engine, config.name, lambda _: None):
        claim(config, storage, {"mark": 1}, accept_changes=False)


def test_a_second_folder_is_refused_before_the_first_has_trials(shared: str, tmp_path: Path) -> None:
    first, second = (study(tmp_path / name, storage=shared) for name in ("a", "b"))
    begun(first)
    known = read_frozen(first.paths).id
    assert known is not None
    for accept in (False, True):
        with pytest.raises(InputError, match=rf"another study 's' \(id {known}, last driven from .*another --name"):
            claim(second, open_storage(second.paths, shared), {"mark": 1}, accept)
    assert not second.paths.config.exists()
    begun(first)
    assert optuna.load_study(study_name="s", storage=shared).user_attrs[ID] == known == read_frozen(first.paths).id


def test_of_two_that_begin_at_the_same_moment_one_is_refused(shared: str, tmp_path: Path) -> None:
    for round_ in range(3):
        configs = [study(tmp_path / f"{round_}{name}", storage=shared, name=f"s{round_}") for name in "abc"]
        refused, barrier = [], threading.Barrier(len(configs))
        for config in configs:
            open_storage(config.paths, shared)

        def start(config: StudyConfig, barrier: threading.Barrier = barrier, refused: list[str] = refused) -> None:
            barrier.wait()
            try:
                begun(config)
            except InputError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=start, args=(config,)) for config in configs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (owner,) = [config for config in configs if config.paths.config.exists()]
        held = optuna.load_study(study_name=owner.name, storage=shared).user_attrs[ID]
        assert held == read_frozen(owner.paths).id
        assert len(refused) == 2
        assert all("another study" in told or "running" in told or "just left" in told for told in refused), refused
