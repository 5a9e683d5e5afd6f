"""Where each file of a study is, and what to type about it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from trainables.errors import InputError, redacted
from trainables.files import Location, UrlPath


@dataclass(frozen=True)
class StudyPaths:
    """Every path of one study."""

    root: Location

    @property
    def disk(self) -> Path:
        """The root, for what has to be on a disk: databases and the lock.

        Raises:
            InputError: it is elsewhere.
        """
        if isinstance(self.root, UrlPath):
            raise InputError(f"{self.root}: no database can lie there; give --storage and --tracking.uri")
        return self.root

    @property
    def config(self) -> Location:
        """Frozen configuration and fingerprint."""
        return self.root / "study.yaml"

    @property
    def database(self) -> Path:
        """The default Optuna storage."""
        return self.disk / "study.db"

    @property
    def earlier_id(self) -> Location:
        """Where earlier versions kept the study's id."""
        return self.root / "tracking-id"

    @property
    def lock(self) -> Path:
        """Held by the one driver."""
        return self.disk / ".lock"

    @property
    def runs(self) -> Location:
        """Ray Train's checkpoints by trial key."""
        return self.root / "runs"

    @property
    def front(self) -> Location:
        """The current front as JSON."""
        return self.root / "front.json"

    @property
    def certified_front(self) -> Location:
        """What of the front was measured again and stays."""
        return self.root / "certified_front.json"

    def certificate(self, key: str) -> Location:
        """The write-once account of a trial's model measured again; details are in the folder of that name."""
        return self.root / "certified" / f"{key}.json"

    @property
    def pareto_page(self) -> Location:
        """The front as a page."""
        return self.root / "pareto.html"

    @property
    def mlflow_database(self) -> Path:
        """The default MLflow store."""
        return self.disk / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Location:
        """Artifacts of the default MLflow store."""
        return self.root / "mlartifacts"

    @property
    def resume_command(self) -> str:
        """What to type to go on with the study."""
        return shlex.join(self._command("study.run"))

    def _command(self, module: str) -> list[str]:
        elsewhere = [] if self.root.parent == Path("studies") else ["--studies-dir", str(self.root.parent)]
        return ["python", "-m", module, "--name", self.root.name, *elsewhere]

    def rebuild_command(self, storage: str | None) -> str:
        """What to type to make the study in a database from its files."""
        there = [] if storage is None else ["--storage", redacted(storage)]
        return shlex.join([*self._command("study.rebuild"), *there])

    @property
    def retry_command(self) -> str:
        """What to type to have failed trials run again."""
        return f"{self.resume_command} --retry-failed"

    def manifest(self, key: str) -> Location:
        """The write-once account of an ended trial."""
        return self.root / "trials" / key / "manifest.json"

    def asked(self, key: str) -> Location:
        """What was asked of a trial."""
        return self.root / "trials" / key / "asked.json"

    @property
    def sampler(self) -> Location:
        """What the sampler keeps between suggestions."""
        return self.root / "sampler.json"

    def events(self, key: str) -> Location:
        """The trial's log, one JSON object a line."""
        return self.root / "trials" / key / "events.jsonl"

    @property
    def sessions(self) -> Location:
        """When drivers began to work on the study from this folder, one JSON object a line."""
        return self.root / "sessions.jsonl"


def sqlite_url(path: Path) -> str:
    """The database in a file, for SQLAlchemy.

    Example:
        >>> sqlite_url(Path("/what?/50%25/study.db"))
        'sqlite:////what%3F/50%2525/study.db'
    """
    return f"sqlite:///{path.resolve()}".replace("%", "%25").replace("?", "%3F")


def short_key(key: str) -> str:
    """A trial's key where the study is known: `t00042` of `quickstart-t00042-s0`; a replicate keeps its end."""
    return "-".join(key.rsplit("-", 2)[1:]).removesuffix("-s0")
