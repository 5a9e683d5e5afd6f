"""A cluster on Google Cloud: an on-demand head, spot GPU workers, on-demand ones where spot is refused."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field
from pydantic_settings import SettingsConfigDict

from study.clusters.files import common
from study.clusters.files.common import Cloud, commented, fill_in
from study.clusters.files.prices import Machine, cost, of_one_kind, plan_flags, see_that_it_holds
from study.clusters.files.typed import named_like
from study.costs.page import Plan
from trainables.config.fields import Separated

PRICED = "on-demand list prices in USD of us-central1, 2026, https://cloud.google.com/compute/vm-instance-pricing"
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("g2-standard-8", 8, 0.85, 1, "l4"),
        Machine("g2-standard-12", 12, 1.0, 1, "l4"),
        Machine("g2-standard-16", 16, 1.15, 1, "l4"),
        Machine("g2-standard-48", 48, 4.0, 4, "l4"),
        Machine("g2-standard-96", 96, 8.0, 8, "l4"),
    )
}
HEAD = Machine("n2-standard-8", 8, 0.39)


class Settings(Cloud):
    """Write the file of a cluster on Google Cloud. What is not known yet is marked FILL-IN."""

    model_config = SettingsConfigDict(cli_prog_name="python -m study.cluster --provider gcp")
    example_commands: ClassVar[tuple[str, ...]] = (
        "python -m study.cluster --provider gcp --project my-project",
        "python -m study.cluster --provider gcp --nodes 16",
    )
    scheme = "gs"

    provider: Literal["gcp"] = Field("gcp", description="whose machines")
    project: Annotated[str, named_like("[a-z][a-z0-9-]{4,28}[a-z0-9]", "the id of a project, as my-project-1")] = Field(
        "project-FILL-IN", description="id of the project that pays"
    )
    zone: Annotated[str, named_like(r"[a-z]+-[a-z]+\d+-[a-z]", "a zone, as us-central1-a")] = Field(
        "us-central1-a", description="of all nodes: Ray tries only one"
    )
    machines: Annotated[tuple[str, ...], Separated, AfterValidator(of_one_kind(MACHINES))] = Field(
        ("g2-standard-8", "g2-standard-12"), description="types of workers with one kind of GPU, tried in this order"
    )
    image: str = Field("image-FILL-IN", description="machine image, projects/.../global/images/...")
    file_system: str = Field("address-FILL-IN", description="address of a Filestore share that all nodes mount")

    @property
    def machine_types(self) -> list[Machine]:
        """Of the workers."""
        return [MACHINES[name] for name in self.machines]

    def plan_flags(self) -> list[str]:
        """See `Cluster`."""
        return plan_flags(self.preset, HEAD, self.machine_types, self.nodes)


def render(settings: Settings, found: Plan) -> str:
    """The cluster file.

    Args:
        settings: of the cluster.
        found: for its `plan_flags`.

    Raises:
        InputError: the head is too small for as many trials.
    """
    see_that_it_holds(HEAD, found)
    packages = ["google-api-python-client", "google-auth-httplib2", "cryptography", *settings.packages]
    return "\n".join(
        (
            _introduction(settings, found),
            _cluster(settings),
            common.file_mounts(settings.places, *settings.own_files),
            _initialization(settings),
            common.setup(settings.places, packages, "3.12", "sudo /usr/local/bin/ray"),
            common.start(settings.places, settings.variables()),
        )
    )


def _introduction(settings: Settings, found: Plan) -> str:
    shared = "on one Filestore share below /mnt/paretovl, which all nodes mount"
    upload = f"ray rsync-up cluster.yaml ./coco/ {settings.places.data}/"
    if settings.bucket:
        shared = f"in the bucket {settings.bucket}, but for its database"
        upload = f"gcloud storage rsync --recursive ./coco gs://{settings.bucket}/data"
    tools = "`uv pip install google-api-python-client google-auth-httplib2 cryptography`"
    concurrency = ("--cluster.concurrency", str(found.trials_at_once))
    told = ("README.md", tools, upload, settings.tracking_uri)
    region = settings.zone.rpartition("-")[0]
    return commented(f"""\
A Ray cluster on Google Cloud for long studies: an on-demand head, and GPU workers that come and go with the trials: \
spot where there is any, on demand where there is not. Everything a study knows is {shared}: a lost worker costs the \
minutes since its last checkpoint, and after a lost head, or on another day, the same commands go on where it stopped.

{common.usage(settings, settings.places, *told, *concurrency)}
A network whose port 22 is open to your own address alone, as the default network's is open to the world:

  gcloud compute networks create paretovl --subnet-mode=custom
  gcloud compute networks subnets create paretovl --network=paretovl --region={region} --range=10.7.0.0/20
  gcloud compute firewall-rules create paretovl-self --network=paretovl --allow=all --source-ranges=10.7.0.0/20
  gcloud compute firewall-rules create paretovl-ssh --network=paretovl --allow=tcp:22 --source-ranges=ADDRESS/32

Ray gives the head a service account with compute.admin and storage.objectAdmin of the project, which no setting \
changes: use a project for this alone. Nobody has brought this file up yet.

What it costs ({PRICED}; spot is less):
{cost(settings.preset, HEAD, settings.machine_types, settings.nodes, found)}""")


def _cluster(settings: Settings) -> str:
    machines = settings.machine_types
    spot = "\n".join(_spot(settings, place) for place in range(len(machines)))
    region = settings.zone.rpartition("-")[0]
    return f"""\
{common.size(settings)}
provider:
  type: gcp
  region: {region}
  availability_zone: {settings.zone}
  # {fill_in(settings.project)}the project that pays.
  project_id: {settings.project}
  # Nothing of value is on the nodes' disks.
  cache_stopped_nodes: false

auth:
  ssh_user: ubuntu

head_node_type: head
available_node_types:
  # Driver, Optuna and MLflow databases, and the controller of every trial: what a spot notice must not take away.
  head: # {HEAD.price:.2f} USD an hour
    # Trial functions ask for 0.01 trial_driver, which no other node has.
    resources: {{CPU: {HEAD.cpus}, trial_driver: {common.TRIAL_DRIVERS}}}
    max_workers: 0
    node_config:
      <<: &node
        networkInterfaces:
          - subnetwork: projects/{settings.project}/regions/{region}/subnetworks/paretovl # of the comment above
            accessConfigs: [{{name: External NAT, type: ONE_TO_ONE_NAT}}]
        disks:
          - boot: true
            autoDelete: true
            type: PERSISTENT
            initializeParams:
              diskSizeGb: 150
              # {fill_in(settings.image)}Ubuntu 24.04 with an NVIDIA driver for CUDA 13 (580 or newer):
              # gcloud compute images list --project deeplearning-platform-release --filter 'family~ubuntu-2404'
              sourceImage: {settings.image}
      machineType: {HEAD.name}

  # One kind of GPU only: cost is measured in device-seconds, which two kinds would make incomparable. Ray is told of as
  # many CPUs for each, as it would otherwise choose by these; so it takes the highest priority, and after a refusal,
  # the next. {settings.nodes} need a quota of {settings.nodes * machines[0].gpus} L4 GPUs, preemptible and not.
{spot}
  # What is taken when there is no spot: never interrupted. To wait for spot instead, set its max_workers to 0.
  gpu_on_demand: # {machines[0].price:.2f} USD an hour
    <<: *gpu
    priority: 0
    node_config:
      <<: *node
      machineType: {machines[0].name}
      scheduling: {{onHostMaintenance: TERMINATE}} # as all machines with GPUs
"""


def _spot(settings: Settings, place: int) -> str:
    """A type of spot workers; the first has what all share."""
    machines = settings.machine_types
    machine = machines[place]
    shared = f"""&gpu
      resources: {{CPU: {min(machine.cpus for machine in machines)}, GPU: {machine.gpus}}}
      min_workers: 0
      max_workers: {settings.nodes}"""
    size = machine.name.rpartition("-")[2]
    return f"""\
  gpu_spot{f"_{size}" if len(machines) > 1 else ""}: # less than {machine.price:.2f} USD an hour
    <<: {"*gpu" if place else shared}
    priority: {len(machines) - place}
    node_config:
      <<: *node
      machineType: {machine.name}
      scheduling: {{provisioningModel: SPOT, instanceTerminationAction: DELETE, onHostMaintenance: TERMINATE}}
"""


def _initialization(settings: Settings) -> str:
    places = settings.places
    mount = f"""\
  # {fill_in(settings.file_system)}the address of a Filestore instance in the same network, with a share named paretovl.
  # Its locks are what SQLite relies on; only the head opens the databases.
  - >-
    sudo mkdir -p /mnt/paretovl && (mountpoint -q /mnt/paretovl ||
    sudo mount -t nfs -o rsize=524288,wsize=524288,hard,timeo=600,retrans=3
    {settings.file_system}:/paretovl /mnt/paretovl)
  - sudo install -d -o ubuntu {places.studies} {places.data}
"""
    fetch = f"""\
  - mkdir -p {places.data} && gcloud storage rsync --recursive gs://{settings.bucket}/data {places.data}
"""
    return f"""\
initialization_commands:
  # Spot machines get their notice by the power button, which would end all processes at once.
  - >-
    sudo mkdir -p /etc/systemd/logind.conf.d && printf '[Login]\\nHandlePowerKey=ignore\\n' |
    sudo tee /etc/systemd/logind.conf.d/paretovl.conf && sudo systemctl restart systemd-logind
  # The image's own updater may hold the package lock for minutes after boot.
  - >-
    sudo apt-get -o DPkg::Lock::Timeout=600 update -qq &&
    sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq nfs-common python3-venv
  # Caches are on the node's own disk; on a local SSD, if its disks have one.
  - >-
    sudo mkdir -p {places.cache}; disk=/dev/disk/by-id/google-local-nvme-ssd-0;
    if [ -e "$disk" ] && ! mountpoint -q {places.cache}; then
    sudo mkfs.ext4 -q "$disk" && sudo mount -o noatime "$disk" {places.cache}; fi
  - sudo chown ubuntu {places.cache}
{fetch if settings.bucket else mount}"""
