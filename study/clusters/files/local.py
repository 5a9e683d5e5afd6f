"""A cluster of one's own machines, which are there already: Ray is started on them and stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from study.clusters.files import common
from study.clusters.files.common import Cluster, Places, commented, fill_in
from study.clusters.files.typed import Address, Folder
from trainables.config.fields import Separated

FIRST_AUTOSCALER = "RAY_enable_autoscaler_v2"
"""0 for Ray's first autoscaler: the second takes the head for one of the workers, so that the last never joins."""


class Settings(Cluster):
    """Write the file of a cluster of your own machines. What is not known yet is marked FILL-IN."""

    model_config = SettingsConfigDict(cli_prog_name="python -m study.cluster --provider local")
    example_commands: ClassVar[tuple[str, ...]] = (
        "python -m study.cluster --provider local --head 10.0.0.1 --workers 10.0.0.2",
    )

    provider: Literal["local"] = Field("local", description="whose machines")
    head: Address = Field(
        "head-FILL-IN", description="address of the machine that runs the study; trials run there, too"
    )
    workers: Annotated[tuple[Address, ...], Separated] = Field(
        ("worker-FILL-IN",), description="addresses of the other machines"
    )
    user: str = Field("ubuntu", description="that ssh logs in as, on all of them")
    ssh_key: str = Field("~/.ssh/id_ed25519", description="file here with the key that lets it in")
    shared: Folder = Field(Path("/mnt/paretovl"), description="folder that all machines share, such as NFS")
    cache: Folder = Field(Path("/var/tmp/paretovl"), description="folder on each machine's own disk")

    @model_validator(mode="after")
    def _machines_are_apart(self) -> Settings:
        if self.head in self.workers:
            raise ValueError(f"workers: {self.head} is the head, on which trials run, too; leave it out")
        return self

    @property
    def places(self) -> Places:
        """On the machines."""
        home = "/root" if self.user == "root" else f"/home/{self.user}"
        return Places(home, f"{self.shared}/studies", f"{self.shared}/data", str(self.cache))


def render(settings: Settings, _: None = None) -> str:
    """The cluster file."""
    places = settings.places
    return "\n".join(
        (
            _introduction(settings, places),
            _cluster(settings),
            common.file_mounts(places),
            _initialization(settings, places),
            common.setup(places, [], "3.12", "~/.local/bin/ray"),
            common.start(
                places,
                {FIRST_AUTOSCALER: "0", **common.study_variables(places)},
                f"""--resources='{{"trial_driver": {common.TRIAL_DRIVERS}}}'""",
                "--include-log-monitor=false",  # `ray down` leaves the workers to find out; this one never would
                rented=False,
            ),
        )
    )


def _introduction(settings: Settings, places: Places) -> str:
    upload = f"ray rsync-up cluster.yaml ./coco/ {places.data}/"
    tracking_uri = f"sqlite:///{places.studies}/{settings.preset}/mlflow.db"
    told = ("docs/own-machines.md", "a key that ssh lets in everywhere", upload, tracking_uri)
    return commented(f"""\
A Ray cluster of your own machines for long studies. Everything a study knows is below {settings.shared}, which they \
share: a lost machine costs the minutes since its last checkpoint, and after a lost head, or on another day, the same \
commands go on where it stopped. All machines have the same kind of GPU: cost is measured in device-seconds.

{common.usage(settings, places, *told)}""")


def _cluster(settings: Settings) -> str:
    workers = "\n".join(f"    - {address}" for address in settings.workers)
    return f"""\
cluster_name: {settings.cluster_name}

provider:
  type: local
  # {fill_in(settings.head)}addresses by which the machines reach each other, and this one reaches them.
  head_ip: {settings.head}
  worker_ips: # {fill_in(" ".join(settings.workers))}none is named twice
{workers}

auth:
  ssh_user: {settings.user}
  ssh_private_key: {settings.ssh_key}
"""


def _initialization(settings: Settings, places: Places) -> str:
    return f"""\
initialization_commands:
  # Without the shared folder each machine would have studies of its own.
  - test -d {settings.shared} || {{ echo "{settings.shared} is not there" >&2; exit 1; }}
  - mkdir -p {places.studies} {places.data} {places.cache} ~/.local/bin
"""
