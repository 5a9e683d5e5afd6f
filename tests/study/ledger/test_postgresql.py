"""A study in PostgreSQL: held by one driver, and its password is nowhere."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa
import yaml

from study import status
from study.ledger.frozen import freeze
from study.ledger.lease import Lease
from study.ledger.ledger import Ledger
from study.ledger.sessions import sessions
from study.ledger.store import open_storage
from study.paths import StudyPaths
from tests.study.conftest import PASSWORD
from tests.study.helpers import study
from trainables.errors import InputError

TINY = {
    "recipes": ["finetune"],
    "objectives": [{"metric": "clean/mr_r5"}, {"metric": "both/mr_r5"}],
    "budget": {"trials": 0},
    "data": {"image_pixels": 32, "shapes": {"train_images": 64, "val_images": 16, "test_images": 16}},
    "trial": {
        "model": {
            "tiny": {"width": 32, "layers": 1, "heads": 2, "patch_pixels": 8, "embedding": 32},
            "pretrain": {"epochs": 1, "batch_size": 16, "mlm_epochs": 1},
        },
        "training": {"epochs": 1, "batch_size": 8},
    },
    "protocol": {"gallery_images": 12, "rung_gallery_images": 6, "image_steps": 1, "bootstrap_samples": 100},
}


def never(reason: str) -> None:
    raise AssertionError(reason)


def test_one_driver_on_any_host(postgresql: str, tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path)
    engine = open_storage(paths, postgresql).engine
    got, refused, barrier, leave = [], [], threading.Barrier(4), threading.Event()

    def drive() -> None:
        barrier.wait()
        try:
            with Lease(open_storage(paths, postgresql).engine, "s", never):
                got.append(1)
                leave.wait()
        except InputError:
            refused.append(1)

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    end = time.time() + 30
    while len(got) + len(refused) < 4 and time.time() < end:
        time.sleep(0.01)
    leave.set()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 3)
    with engine.begin() as connection:
        insert = sa.text(
            "INSERT INTO paretovl_sessions (study, host, process, process_started, device, started, heartbeat) "
            "VALUES ('s', 'other', 1, 0, '', :now, :now)"
        )
        connection.execute(insert, {"now": time.time()})
    with pytest.raises(InputError, match="process 1 on other"), Lease(engine, "s", never):
        pass
    assert len(sessions(engine, "s")) == 2
    engine.dispose()


def test_a_wrong_password_is_told_without_it(
    postgresql: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = study(tmp_path, storage=postgresql.replace(PASSWORD, "wrong-secret"))
    config.paths.root.mkdir(parents=True)
    freeze(config, {}, accept_changes=False)
    assert "wrong-secret" not in config.paths.config.read_text()
    with pytest.raises(SystemExit):
        status.main(["--name", "s", "--studies-dir", str(tmp_path)])
    told = capsys.readouterr().err
    assert "the study's database postgresql+psycopg://me@127.0.0.1" in told
    assert "wrong-secret" not in told


def test_status_finds_the_password_where_postgresql_keeps_it(
    postgresql_of_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = study(tmp_path, storage=postgresql_of_file)
    config.paths.root.mkdir(parents=True)
    freeze(config, {}, accept_changes=False)
    Ledger(config, config.paths, "print")
    assert status.main(["--name", "s", "--studies-dir", str(tmp_path)]) == 0
    assert "2 waiting" in capsys.readouterr().out


@pytest.mark.timeout(300)
def test_a_whole_study_leaves_no_password(postgresql: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TINY))
    command = [sys.executable, "-m", "study.run", "--config", str(tmp_path / "config.yaml"), "--name", "s"]
    command += ["--studies-dir", str(tmp_path / "studies")]
    command += ["--storage", postgresql]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "studies" / "s"
    shown: set[str] = set()
    while driver.poll() is None:
        time.sleep(0.5)
        if (folder / "study.yaml").exists():
            with suppress(psutil.NoSuchProcess):
                processes = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
                shown |= {word for process in processes for word in process.cmdline()}
    out, told = driver.communicate()
    assert driver.returncode == 1, "so small a study can tell nothing from chance"
    assert "study s is done: 1 trial, " in out, out + told
    assert shown
    assert not any(PASSWORD in word for word in shown)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"study.yaml", "manifest.json", "mlflow.db", "front.json"} <= {path.name for path in files}
    assert not (folder / "study.db").exists()
    assert [path for path in files if PASSWORD.encode() in path.read_bytes()] == []
    assert PASSWORD not in out + told


def test_the_sqlite_study_opens_in_optunas_dashboard(tmp_path: Path) -> None:
    config = study(tmp_path)
    config.paths.root.mkdir(parents=True)
    ledger = Ledger(config, config.paths, "print")
    taken = ledger.take()
    with Lease(open_storage(config.paths, None).engine, "s", never):
        pass
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("optuna-dashboard")
    url = f"sqlite:///{config.paths.database}"
    server = subprocess.Popen(
        [str(program), url, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def get(path: str) -> dict[str, Any]:
        found: dict[str, Any] = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=10))
        return found

    try:
        end = time.time() + 60
        while True:
            try:
                (known,) = get("studies")["study_summaries"]
                break
            except OSError:
                assert server.poll() is None
                assert time.time() < end, "the dashboard does not answer"
                time.sleep(0.2)
        assert known["study_name"] == "s"
        trials = get(f"studies/{known['study_id']}?after=0")["trials"]
        assert [(trial["number"], trial["state"]) for trial in trials] == [(0, "Running"), (1, "Waiting")]
        assert taken.number == 0
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
