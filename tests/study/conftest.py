"""A PostgreSQL server and a tracked study for tests that need one."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from tracked import FakeStudy

from study.tracking.mlflow_store import import_mlflow

PASSWORD = "correct-horse-battery-staple"


def _program(name: str) -> str | None:
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # Debian keeps them off PATH
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *map(str, places)]))


class Server:
    """A PostgreSQL server on loopback that takes passwords only. It belongs to nobody and goes with the tests."""

    def __init__(self, folder: Path) -> None:
        initdb, postgres = _program("initdb"), _program("postgres")
        if initdb is None or postgres is None:  # a server cannot be a Python dependency; SQLite runs the same tests
            pytest.skip("PostgreSQL is not installed (Debian's package is postgresql)")
        self._user = "nobody" if os.geteuid() == 0 else None  # it refuses to run as root
        (folder / "password").write_text(PASSWORD)
        for path in (folder, folder / "password") if self._user else ():
            shutil.chown(path, self._user)
        flags = ["--username", "me", "--auth", "scram-sha-256", "--pwfile", str(folder / "password"), "--no-sync"]
        making = [initdb, "-D", str(folder / "data"), *flags]
        subprocess.run(making, user=self._user, check=True, capture_output=True, cwd="/")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._command = [postgres, "-D", str(folder / "data"), "-h", "127.0.0.1", "-p", str(port), "-k", "", "-F"]
        self._log = folder / "log"
        self.url = sa.URL.create("postgresql+psycopg", "me", PASSWORD, "127.0.0.1", port, "postgres")

    def start(self, wait: bool = True) -> None:
        """Begin to serve."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, user=self._user, cwd="/", stderr=log, start_new_session=True
            )
        engine = sa.create_engine(self.url)
        for _ in range(200 if wait else 0):
            try:
                engine.connect().close()
                break
            except sa.exc.OperationalError:
                assert self._process.poll() is None, "the server has ended"
                time.sleep(0.05)
        engine.dispose()

    def stop(self) -> None:
        """At once, as in a crash: transactions are lost, connections cut."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(30)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    """One for all tests of this process."""
    folder = Path(tempfile.mkdtemp())  # not pytest's, whose parents another run closes for other users
    server = Server(folder)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgresql(postgresql_server: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL, with its password, of an empty database of the test's own."""
    name = f"test_{abs(hash(request.node.nodeid))}"
    engine = sa.create_engine(postgresql_server.url, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield postgresql_server.url.set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture
def postgresql_of_file(postgresql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of such a database without its password, which is where PostgreSQL looks for it."""
    passwords = tmp_path / "pgpass"
    passwords.write_text(f"*:*:*:me:{PASSWORD}\n")
    passwords.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(passwords))
    return postgresql.replace(f":{PASSWORD}@", "@")


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every database a ledger can be in, in turn; in use wherever a study names no other."""
    if request.param == "postgresql":
        from study.ledger import ledger

        url, original = request.getfixturevalue("postgresql"), ledger.open_storage
        monkeypatch.setattr(ledger, "open_storage", lambda paths, given, make=True: original(paths, given or url, make))
    return str(request.param)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all its tables, which takes seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    import_mlflow().MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def study(tmp_path: Path, empty_store: Path) -> FakeStudy:
    study = FakeStudy(tmp_path / "study")
    shutil.copy(empty_store, study.paths.mlflow_database)
    return study


@pytest.fixture
def other_uri(tmp_path: Path, empty_store: Path) -> str:
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'other.db')}"
