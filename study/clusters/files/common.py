"""What all kinds of clusters share: where things are on a node, how it is set up, and how Ray starts there.

Pure functions that give text. Each kind (`aws`, `gcp`, `local`, ...) adds what differs.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from study.arguments import known_presets
from study.clusters.files.typed import named_like, plain
from trainables.cli.flags import Flags
from trainables.config.fields import check_name

TRIAL_DRIVERS = 64
"""Trials whose own processes a head takes: each asks for a hundredth of a `trial_driver`, which no other node has."""
UV = "0.13.9"
PROJECT_FILES = ("pyproject.toml", "README.md", "LICENSE", "study", "trainables", "search_spaces", "dashboards")
"""What the project is built from."""
TOKEN = "~/.ray/auth_token"
"""Where Ray looks for the token that the nodes of a cluster share."""
AUTHENTICATION = "RAY_AUTH_MODE=token"
"""Before every command that speaks with Ray: a process without it cannot join."""
PORT, OBJECT_PORT, DASHBOARD_PORT = 6379, 8076, 8265


def _preset(name: str) -> str:
    if name not in known_presets():
        raise ValueError(f"there is none of that name; presets are {', '.join(known_presets())}")
    return name


Preset = Annotated[str, AfterValidator(_preset)]


class Cluster(Flags):
    """What every kind of cluster is told. Variables are those of a study: PARETOVL_PRESET means the same here."""

    provider: str
    cluster_name: Annotated[str, AfterValidator(check_name)] = Field("paretovl", description="of the nodes")
    preset: Preset = Field("coco_clip_b16", description="the study that its comments begin and price")

    _plain = field_validator("*")(plain)

    def plan_flags(self) -> list[str]:
        """Of the `study.plan` that says what the preset's study costs there; none where nothing is paid."""
        return []


@dataclass(frozen=True)
class Places:
    """Where things are on every node.

    Attributes:
        home: of the user that everything runs as.
        studies: folder or bucket that all nodes share.
        data: folder with images and captions, the same on every node.
        cache: folder on the node's own disk, for what can be made again.
    """

    home: str = "/home/ubuntu"
    studies: str = "/mnt/paretovl/studies"
    data: str = "/mnt/paretovl/data"
    cache: str = "/mnt/cache"

    @property
    def project(self) -> str:
        """The source."""
        return f"{self.home}/paretovl"

    @property
    def environment(self) -> str:
        """The virtual environment with everything."""
        return f"{self.home}/venv"

    @property
    def uv(self) -> str:
        """The virtual environment with uv alone."""
        return f"{self.home}/uv"

    def program(self, name: str) -> str:
        """One of the environment's programs: python, ray, mlflow."""
        return f"{self.environment}/bin/{name}"


class Elastic(Cluster):
    """What a cluster is told whose workers come and go."""

    nodes: int = Field(8, ge=1, description="workers there are at most")
    idle_minutes: float = Field(15, ge=1, le=120, description="a worker without work is given back after these")


Bucket = Annotated[str, named_like("[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", "the name of a bucket alone, as my-studies")]
Server = Annotated[
    str, named_like(r"(postgresql|mysql)(\+\w+)?://.+/.+", "the URL of a server, as postgresql://me@db/x")
]


class Cloud(Elastic):
    """What a cluster of rented machines is told: studies are on a file system that all nodes mount, or in a bucket."""

    scheme: ClassVar[str]
    """Of the URLs of buckets."""

    bucket: Bucket | None = Field(None, description="studies and data are in this bucket instead of on a file system")
    storage: Server | None = Field(None, description="with a bucket: database of the studies, a URL without password")

    @model_validator(mode="after")
    def _a_bucket_has_a_database(self) -> Cloud:
        if (self.bucket is None) != (self.storage is None):
            raise ValueError("bucket and storage go together: a study in a bucket has its database on a server")
        return self

    @property
    def places(self) -> Places:
        """On the nodes."""
        return (
            Places(studies=f"{self.scheme}://{self.bucket}/studies", data="/mnt/cache/data")
            if self.bucket
            else Places()
        )

    @property
    def tracking_uri(self) -> str:
        """Of MLflow; with a bucket on the head's own disk, as it can be made again."""
        folder = Places().home if self.bucket else f"{Places().studies}/{self.preset}"
        return f"sqlite:///{folder}/mlflow.db"

    @property
    def packages(self) -> list[str]:
        """That studies need besides the project's."""
        return ['"psycopg[binary]"'] if self.storage else []

    @property
    def own_files(self) -> list[str]:
        """To copy to the nodes."""
        return ["~/.pgpass"] if self.storage else []

    def variables(self) -> dict[str, str]:
        """See `study_variables`."""
        further = {"STORAGE": self.storage, "TRACKING__URI": self.tracking_uri} if self.storage else {}
        return study_variables(self.places, **further)


def study_variables(places: Places, **further: str) -> dict[str, str]:
    """What every study on a cluster has to be told, as variables: the head has them, so no command repeats them.

    Args:
        places: of the nodes.
        further: fields of a study by their variables' names, such as STORAGE.
    """
    found = {"STUDIES_DIR": places.studies, "CACHE_DIR": places.cache, "CLUSTER__ADDRESS": "auto", **further}
    return {f"PARETOVL_{name}": value for name, value in found.items()}


def variables_of(config: Mapping[str, Any]) -> dict[str, str]:
    """What the head of a cluster file has in its environment.

    Args:
        config: the file, parsed.
    """
    starts = " ".join(map(str, config.get("head_start_ray_commands") or ()))
    return dict(re.findall(r"(?<!\S)([A-Z][A-Z0-9_]*)=(\S+)", starts))


def usage(
    settings: Cluster, places: Places, guide: str, tools: str, upload: str, tracking_uri: str, *flags: str
) -> str:
    """How the file is used.

    Args:
        settings: of the cluster.
        places: of its nodes.
        guide: the page that tells more.
        tools: what is done once on the machine that runs `ray up`.
        upload: command that brings the data there.
        tracking_uri: MLflow's database.
        flags: of the study, besides preset and data.
    """
    study = " ".join(("--preset", settings.preset, "--data.root", places.data, *flags))
    mlflow = f"{places.program('mlflow')} ui --workers 1 --backend-store-uri {tracking_uri}"
    return f"""\
Written by `python -m study.cluster --provider {settings.provider}`, and yours to edit; {guide} tells more, and \
`python -m study.doctor --cluster cluster.yaml` what would go wrong. In the project folder, with its environment \
active, rsync and ssh at hand, once: {tools}, and `ray get-auth-token --generate`.

  ray up --no-restart cluster.yaml
  {upload}
  python -m study.submit --cluster cluster.yaml {study}
  ray exec cluster.yaml --port-forward 5000 '{mlflow}'
  ray down cluster.yaml

Without --no-restart, `ray up` stops Ray on a head that is there, and with it the study. The study outlives the \
connection; the same line follows it again, and fetches what came out. The MLflow line serves http://localhost:5000 \
until Ctrl-C.
"""


def fill_in(value: str) -> str:
    """What a comment about a value begins with, if it is not known yet."""
    return "FILL-IN: " if "FILL-IN" in value else ""


def size(settings: Elastic) -> str:
    """The section with how far a cluster grows, and when it shrinks."""
    return f"""\
cluster_name: {settings.cluster_name}
max_workers: {settings.nodes}
# A trial's end and the start of the next are seconds apart; a new node takes minutes.
idle_timeout_minutes: {settings.idle_minutes:g}
"""


def file_mounts(places: Places, *further: str) -> str:
    """The section with what is copied from the machine that runs `ray up`.

    Args:
        places: of the nodes.
        further: files that have the same place there and here, such as ~/.pgpass.
    """
    mounts = {f"{places.project}/{name}": name for name in PROJECT_FILES} | {name: name for name in (TOKEN, *further)}
    lines = "\n".join(f"  {there}: {here}" for there, here in mounts.items())
    return f"""\
# What the project is built from and nothing else. Ray reads every mounted file for its hash, whatever rsync_exclude
# says: the whole project folder would bring in .venv (gigabytes), .git and studies that are being written.
file_mounts:
{lines}
rsync_exclude: [__pycache__, .DS_Store]
"""


def setup(places: Places, packages: Sequence[str], python: str, link: str) -> str:
    """The sections that make the environment, once a node.

    Args:
        places: of the nodes.
        packages: to be there besides the project's, such as boto3.
        python: interpreter, by path or version.
        link: a path on everyone's PATH for `ray`, with `sudo` before it where that needs it.
    """
    sudo, _, link_path = link.rpartition(" ")
    further = f"\n    {' '.join(packages)}" if packages else ""
    return f"""\
# The same on every node. Versions follow from exclude-newer in pyproject.toml, also those of the last install: the job
# server and the autoscaler need packages that a study on one machine does not.
setup_commands:
  - python3 -m venv {places.uv} && {places.uv}/bin/pip install -q uv=={UV}
  - >-
    cd {places.project} &&
    UV_PROJECT_ENVIRONMENT={places.environment}
    {places.uv}/bin/uv sync -q --no-dev --inexact --python {python}
  - >-
    cd {places.project} && {places.uv}/bin/uv pip install -q --python {places.environment}{further}
    "ray[default]==$({places.program("python")} -c 'import ray; print(ray.__version__)')"
  # `ray down` calls a plain `ray`.
  - {f"{sudo} ".lstrip()}ln -sf {places.program("ray")} {link_path}
# Said because Ray has defaults of its own, which install into the system's Python.
head_setup_commands: []
worker_setup_commands: []
"""


def start(
    places: Places, variables: Mapping[str, str], head_flags: str = "", worker_flags: str = "", *, rented: bool = True
) -> str:
    """The sections that start Ray.

    Args:
        places: of the nodes.
        variables: that studies on the head find; see `study_variables`.
        head_flags: of `ray start` on the head, besides the usual ones.
        worker_flags: the same on the workers.
        rented: whether nodes come, and may be taken away with a notice, which `study.clusters.nodes.notices` reads.
    """
    ray, statistics = places.program("ray"), "RAY_USAGE_STATS_ENABLED=0"
    given_up = {
        "RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S": "300",
        "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": "1200",
        "RAY_AUTOSCALER_RECONCILE_RAY_INSTALL_STATUS_TIMEOUT_S": "1200",
    }
    found = folded(f"{name}={value}" for name, value in variables.items())
    patient = folded(f"{name}={value}" for name, value in given_up.items())
    head = f"{ray} start --head --port={PORT} --object-manager-port={OBJECT_PORT} --dashboard-host=127.0.0.1"
    config = "--autoscaling-config=~/ray_bootstrap_config.yaml"
    autoscaler = f"{config} {'--no-monitor ' * rented}{head_flags}".rstrip()
    worker = f"{ray} start --address=$RAY_HEAD_IP:{PORT} --object-manager-port={OBJECT_PORT} {worker_flags}".rstrip()
    fallback = f"""
  # The autoscaler: after a refusal it turns to the next type, where Ray's own asks for the same one for ever.
  - pkill -f '[s]tudy.clusters.nodes.autoscaler' || true
  - >-
    {AUTHENTICATION}
{textwrap.indent(patient, "    ")}
    setsid -f {places.program("python")} -m study.clusters.nodes.autoscaler
    {config} --gcs-address=$(cat /tmp/ray/ray_current_cluster)
    --logs-dir=/tmp/ray/session_latest/logs
    >>/tmp/ray/autoscaler.log 2>&1 </dev/null"""
    watcher = f"""
  # Turns the notice that the node is about to be taken away into a drain with a deadline.
  - >-
    {AUTHENTICATION} setsid -f {places.program("python")} -m study.clusters.nodes.notices
    >>/tmp/ray/notices.log 2>&1 </dev/null"""
    patience = """ A node that is not there, or not set up, in 20 minutes is given
# up (Ray: 60 and 30), and one that is no longer needed before it is there, after five (Ray: never)."""
    return f"""\
# RAY_AUTH_MODE has to be equal everywhere: a node without it cannot join. Studies on the head read PARETOVL_..., what
# is true of the cluster and needs no flag.{patience if rented else ""}
head_start_ray_commands:
  - {ray} stop
  - >-
    ulimit -n 65536; {AUTHENTICATION} {statistics}
{textwrap.indent(found, "    ")}
    {head}
    {autoscaler}{fallback if rented else ""}
worker_start_ray_commands:
  - {ray} stop
  - >-
    ulimit -n 65536; {AUTHENTICATION} {statistics}
    {worker}{watcher if rented else ""}
"""


def folded(words: Iterable[str], width: int = 110) -> str:
    """Words in lines, none of them broken; for text that YAML folds."""
    return textwrap.fill(" ".join(words), width, break_long_words=False, break_on_hyphens=False)


def commented(text: str) -> str:
    """Paragraphs as comments of 120 columns; indented lines stay as they are, what is in backticks is not broken."""
    lines: list[str] = []
    for line in text.strip("\n").splitlines():
        whole = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), line)
        lines += [line] if line.startswith("  ") or not line else folded(whole.split(" "), 118).splitlines()
    return "\n".join(f"# {line}".rstrip() for line in lines).replace("\0", " ") + "\n"
