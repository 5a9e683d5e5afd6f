"""What one node prepares the others copy, once each: nodes are cache folders, the shared place a folder or a bucket."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.study.helpers import forked
from trainables import prepare
from trainables.config import TrialConfig
from trainables.data import cache, depot
from trainables.data.depot import bring, give, offered, sharing
from trainables.files import Location
from trainables.prepare import Workshop


@pytest.fixture(params=["folder", "bucket"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "bucket":
        return request.getfixturevalue("bucket") / "shared"
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depot, "CHUNK", 1000)


@pytest.fixture
def array(tmp_path: Path) -> Path:
    """On the first node."""
    path = tmp_path / "one" / "images-1.npy"
    path.parent.mkdir()
    np.save(path, np.arange(2500))
    return path


def objects(shared: Location) -> list[Location]:
    return sorted((path for path in shared.glob("**/*") if path.is_file()), key=str)


def test_three_nodes_prepare_once(
    shared: Location, tiny_trial: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(module: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: (made.append(name), original(*given))[1])

    for module, name in (
        (cache, "_build"),
        *((prepare, f"make_{what}") for what in ("base", "masked_lm", "tokenizer")),
    ):
        counted(module, name)
    counted(Workshop, "_make_substitutes")
    found = []
    for node in ("one", "two", "three"):
        before = depot.copied_bytes
        with sharing(str(shared)):
            workshop = Workshop(tiny_trial.model_copy(update={"cache_dir": tmp_path / node}), print)
            weights = workshop.base().state_dict()
            train, _ = workshop.substitutes()
        found.append((workshop.hashes, [*map(float, (value.sum() for value in weights.values()))], train.texts()))
        brought = depot.copied_bytes - before
        assert (brought > workshop.dataset.train.pixels.nbytes) == (node != "one")
        assert not [*(tmp_path / node).glob("*.brought")]
    assert found[0] == found[1] == found[2]
    assert sorted(made) == [
        *["_build"] * 2,
        *["_make_substitutes"] * 2,
        "make_base",
        "make_masked_lm",
        "make_tokenizer",
    ]
    before = depot.copied_bytes
    with sharing(str(shared)):  # another trial on a node that has all
        Workshop(tiny_trial.model_copy(update={"cache_dir": tmp_path / "three"}), print).base()
    assert depot.copied_bytes == before


@pytest.mark.usefixtures("small_chunks")
def test_a_chunk_that_arrives_damaged_is_read_again(
    shared: Location, array: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sharing(str(shared)):
        give(array)
        expected = array.read_bytes()
        array.unlink()
        pwrite, wrong = depot.hashlib.sha256, [b"first"]
        monkeypatch.setattr(depot.hashlib, "sha256", lambda content: pwrite(content + (wrong.pop() if wrong else b"")))
        assert bring(array)
    assert not wrong, "one was damaged"
    assert array.read_bytes() == expected


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_what_is_damaged_in_the_shared_place_is_made_again(shared: Location, array: Path, damage: str) -> None:
    with sharing(str(shared)):
        give(array)
        expected = array.read_bytes()
        (content,) = (path for path in objects(shared) if path.name == "whole")
        if damage == "gone":
            content.unlink()
        else:
            content.write_bytes(expected[:-1] + b"x" * (damage == "changed"))
        array.unlink()
        assert not bring(array)
        assert not array.exists()
        assert not offered(array), "nobody else tries"
        array.write_bytes(expected)
        give(array)
        array.unlink()
        assert bring(array)
    assert array.read_bytes() == expected


@pytest.mark.usefixtures("small_chunks")
def test_killed_in_the_middle_of_a_copy(array: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared").mkdir()
    with sharing(str(tmp_path / "shared")):
        give(array)
        expected = array.read_bytes()
        array.unlink()

        def slow(file: int, content: bytes, offset: int) -> None:
            os.write(file, content)
            (tmp_path / "begun").touch()
            time.sleep(60)

        def work() -> None:
            monkeypatch.setattr(depot.os, "pwrite", slow)
            bring(array)

        child = forked(work)
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not array.exists()
        assert len([*array.parent.glob("*.brought")]) == 1
        assert bring(array)
    assert array.read_bytes() == expected
    assert [path.name for path in array.parent.iterdir()] == [array.name]


def test_of_two_nodes_that_trained_the_same_model_all_have_the_first(shared: Location, tmp_path: Path) -> None:
    with sharing(str(shared)):
        for node in ("one", "two", "three"):
            folder = tmp_path / node / "base-1"
            if node != "three":
                folder.mkdir(parents=True)
                (folder / "model.safetensors").write_bytes(node.encode())
                give(folder)
            else:
                folder.parent.mkdir()
                assert bring(folder)
    assert {(tmp_path / node / "base-1" / "model.safetensors").read_bytes() for node in ("one", "two", "three")} == {
        b"one"
    }


def test_without_a_shared_place_nothing_is_asked(array: Path) -> None:
    give(array)
    assert not bring(array)
    assert not offered(array)
