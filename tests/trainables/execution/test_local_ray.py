"""Where Ray's sockets and token go: told before Ray starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from study.run import main
from trainables.errors import InputError
from trainables.execution.local_ray import SOCKET_BYTES, ray_folder
from trainables.trial import main as run_trial


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_a_folder_is_refused_where_ray_itself_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.utils import validate_socket_filepath

    assert ray_folder() == Path("/tmp")
    longest = SOCKET_BYTES - len("/ray/session_2026-11-26_19-41-58_560199_1234567/sockets/plasma_store")
    for length, fits in ((longest, True), (longest + 1, False)):
        folder = Path("/tmp") / ("x" * (length - len("/tmp/")))
        socket = folder / "ray" / "session_2026-11-26_19-41-58_560199_1234567" / "sockets" / "plasma_store"
        monkeypatch.setenv("TMPDIR", str(folder))
        if fits:
            validate_socket_filepath(str(socket))
            assert ray_folder() == folder
            folder.rmdir()
        else:
            with pytest.raises(OSError, match=r"AF_UNIX"):
                validate_socket_filepath(str(socket))
            with pytest.raises(InputError, match=r"TMPDIR: Ray keeps sockets in .* 1 bytes too long"):
                ray_folder()
    monkeypatch.setenv("RAY_TMPDIR", str(Path("/tmp")))
    assert ray_folder() == Path("/tmp")


def test_a_folder_or_home_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/nothing")
    with pytest.raises(InputError, match=r"HOME: .* cannot be written"):
        ray_folder()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    ray_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nothing")
    with pytest.raises(InputError, match=r"RAY_TMPDIR: .* cannot be written"):
        ray_folder()


@pytest.mark.parametrize("command", ["study", "trial"])
def test_every_command_that_starts_ray_says_so(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 25)))
    (tmp_path / "trial.yaml").write_text("")
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
    start, arguments = {
        "study": (main, ["--studies-dir", str(tmp_path / "studies"), *small]),
        "trial": (run_trial, [str(tmp_path / "trial.yaml")]),
    }[command]
    with pytest.raises(SystemExit) as end:
        start(arguments)
    assert end.value.code == 2
    assert "bytes too long for them; set RAY_TMPDIR" in capsys.readouterr().err
