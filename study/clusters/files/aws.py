"""A cluster on AWS: an on-demand head, spot GPU workers in several zones, on-demand ones where spot is refused."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import SettingsConfigDict

from study.clusters.files import common
from study.clusters.files.common import Cloud, Places, commented, fill_in
from study.clusters.files.prices import Machine, cost, of_one_kind, plan_flags, see_that_it_holds
from study.clusters.files.typed import named_like
from study.costs.page import Plan
from trainables.config.fields import Separated
from trainables.errors import InputError

PRICED = "on-demand list prices in USD of us-east-1 and us-west-2, August 2026, https://aws.amazon.com/ec2/pricing/"
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("g6.2xlarge", 8, 0.9776, 1, "l4"),
        Machine("g6.4xlarge", 16, 1.3232, 1, "l4"),
        Machine("g6.8xlarge", 32, 2.0144, 1, "l4"),
        Machine("g6.12xlarge", 48, 4.6016, 4, "l4"),
        Machine("g6.24xlarge", 96, 6.6752, 4, "l4"),
        Machine("g6.48xlarge", 192, 13.3504, 8, "l4"),
    )
}
HEADS = {
    machine.name: machine
    for machine in (
        Machine("m6i.2xlarge", 8, 0.384),
        Machine("m6i.4xlarge", 16, 0.768),
        Machine("m6i.8xlarge", 32, 1.536),
    )
}
REGION = "us-west-2"
OUTPUTS = {
    "ClusterName": "cluster_name",
    "Image": "image",
    "SecurityGroup": "security_group",
    "FileSystem": "file_system",
    "Zones": "zones",
}
"""Of `docs/aws-stack.yaml`, with the fields that they fill in."""


def _head(name: str) -> str:
    if name not in HEADS:
        raise ValueError(f"known are {', '.join(HEADS)}; for another edit the file that is made")
    return name


class Settings(Cloud):
    """Write the file of a cluster on AWS. What is not known yet is marked FILL-IN."""

    model_config = SettingsConfigDict(cli_prog_name="python -m study.cluster --provider aws")
    example_commands: ClassVar[tuple[str, ...]] = (
        "python -m study.cluster",
        "python -m study.cluster --provider aws --stack paretovl",
        "python -m study.cluster --machines g6.48xlarge --nodes 2",
    )

    scheme = "s3"

    provider: Literal["aws"] = Field("aws", description="whose machines")
    stack: str | None = Field(
        None, description="the stack of docs/aws-stack.yaml, which fills in all that is not given"
    )
    region: Annotated[str, named_like(r"[a-z]{2}(-[a-z]+)+-\d+", "a region, as us-west-2")] = Field(
        REGION, description="of everything"
    )
    zones: Annotated[tuple[str, ...], Separated] = Field(
        (), description="availability zones, tried in this order; empty: a, b and c of the region"
    )
    head: Annotated[str, AfterValidator(_head)] = Field("m6i.2xlarge", description="type of the head")
    machines: Annotated[tuple[str, ...], Separated, AfterValidator(of_one_kind(MACHINES))] = Field(
        ("g6.2xlarge", "g6.4xlarge"), description="types of workers with one kind of GPU, tried in this order"
    )
    image: str = Field("ami-FILL-IN", description="machine image")
    security_group: str = Field("sg-FILL-IN", description="of all nodes")
    file_system: str = Field("fs-FILL-IN", description="EFS that all nodes share")

    @model_validator(mode="after")
    def _zones_are_there(self) -> Settings:
        if away := [zone for zone in self.zones if not zone.startswith(self.region)]:
            raise ValueError(f"zones: {', '.join(away)} is not in the region {self.region}; give --region, too")
        return self

    @property
    def zone_names(self) -> tuple[str, ...]:
        """As they are tried."""
        return self.zones or tuple(self.region + letter for letter in "abc")

    @property
    def machine_types(self) -> list[Machine]:
        """Of the workers."""
        return [MACHINES[name] for name in self.machines]

    def plan_flags(self) -> list[str]:
        """See `Cluster`."""
        return plan_flags(self.preset, HEADS[self.head], self.machine_types, self.nodes)


def filled_in(settings: Settings) -> Settings:
    """With the outputs of the stack, which is asked for them.

    Raises:
        InputError: boto3 is not there, or there is no such stack.
    """
    if settings.stack is None:
        return settings
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        raise InputError("stack: boto3 is not installed; `uv pip install boto3`, or give what it would tell") from None
    try:
        client = boto3.client("cloudformation", region_name=settings.region)
        (stack,) = client.describe_stacks(StackName=settings.stack)["Stacks"]
    except (BotoCoreError, ClientError) as error:
        raise InputError(f"stack {settings.stack!r} in {settings.region}: {error}") from None
    outputs = {output["OutputKey"]: output["OutputValue"] for output in stack.get("Outputs", ())}
    found = {field: outputs[output] for output, field in OUTPUTS.items() if output in outputs}
    zones = {"zones": tuple(found["zones"].split(","))} if "zones" in found else {}
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    return settings.model_copy(update={**found, **zones, **given})


def render(settings: Settings, found: Plan) -> str:
    """The cluster file.

    Args:
        settings: of the cluster.
        found: for its `plan_flags`.

    Raises:
        InputError: the stack cannot be read, or the head is too small.
    """
    settings = filled_in(settings)
    machines, head = settings.machine_types, HEADS[settings.head]
    see_that_it_holds(head, found)
    return "\n".join(
        (
            _introduction(settings, machines, head, found),
            _cluster(settings, machines, head),
            common.file_mounts(settings.places, *settings.own_files),
            _initialization(settings, settings.places),
            common.setup(
                settings.places, ["boto3", *settings.packages], "/usr/bin/python3.12", "sudo /usr/local/bin/ray"
            ),
            common.start(settings.places, settings.variables()),
        )
    )


def _introduction(settings: Settings, machines: list[Machine], head: Machine, found: Plan) -> str:
    shared = "on one EFS file system below /mnt/paretovl, which all nodes share"
    upload = f"ray rsync-up cluster.yaml ./coco/ {settings.places.data}/"
    if settings.bucket:
        shared = f"in the bucket {settings.bucket}, but for its database"
        upload = f"aws s3 sync ./coco s3://{settings.bucket}/data"
    concurrency = ("--cluster.concurrency", str(found.trials_at_once))
    tools = ("docs/aws.md", "`uv pip install boto3`", upload, settings.tracking_uri)
    return commented(f"""\
A Ray cluster on AWS for long studies: an on-demand head, and GPU workers that come and go with the trials: spot \
where there is any, on demand where there is not. Everything a study knows is {shared}: a lost worker costs the \
minutes since its last checkpoint, and after a lost head, or on another day, the same commands go on where it stopped.

{common.usage(settings, settings.places, *tools, *concurrency)}
What it costs ({PRICED}; spot is never dearer):
{cost(settings.preset, head, machines, settings.nodes, found)}""")


def _cluster(settings: Settings, machines: list[Machine], head: Machine) -> str:
    name, quota = settings.cluster_name, settings.nodes * max(machine.cpus for machine in machines)
    spot = "\n".join(_spot(settings, machines, place) for place in range(len(machines)))
    return f"""\
{common.size(settings)}
provider:
  type: aws
  region: {settings.region}
  # Tried in this order. EFS needs a mount target in each.
  availability_zone: {",".join(settings.zone_names)}
  # Nothing of value is on the nodes' disks: terminate them instead of keeping stopped ones.
  cache_stopped_nodes: false

auth:
  ssh_user: ubuntu

head_node_type: head
available_node_types:
  # Driver, Optuna and MLflow databases, and the controller of every trial: what a spot notice must not take away.
  head: # {head.price:.2f} USD an hour
    # Trial functions ask for 0.01 trial_driver, which no other node has.
    resources: {{CPU: {head.cpus}, trial_driver: {common.TRIAL_DRIVERS}}}
    max_workers: 0
    node_config:
      <<: &node
        # {fill_in(settings.image)}Ubuntu 24.04 with an NVIDIA driver for CUDA 13 (580 or newer), such as the AWS
        # Deep Learning Base OSS Nvidia Driver GPU AMI. Ray's own default image is too old.
        ImageId: {settings.image}
        # {fill_in(settings.security_group)}a security group that admits all traffic from itself, port 22 from your
        # own address, and nothing else. Without this line Ray makes a group whose port 22 is open to the world.
        SecurityGroupIds: [{settings.security_group}]
        BlockDeviceMappings:
          - DeviceName: /dev/sda1
            Ebs: {{VolumeSize: 150, VolumeType: gp3, Encrypted: true}}
        # Keys of the node's role only for whoever can send a PUT from the node itself.
        MetadataOptions: {{HttpTokens: required, HttpPutResponseHopLimit: 1, HttpEndpoint: enabled}}
      InstanceType: {head.name}
      # May start and end nodes of this cluster. Without this line Ray makes a role with all rights on EC2 and S3.
      IamInstanceProfile: {{Name: {name}-head}}

  # One kind of GPU only: cost is measured in device-seconds, which two kinds would make incomparable. Ray is told of as
  # many CPUs for each, as it would otherwise choose by these; so it takes the highest priority, and after a refusal in
  # all zones, the next. {settings.nodes} need a quota of {quota} vCPUs for G instances, spot and on demand.
{spot}
  # What is taken when no zone has spot: never interrupted. To wait for spot instead, set its max_workers to 0.
  gpu_on_demand: # {machines[0].price:.2f} USD an hour
    <<: *gpu
    priority: 0
    node_config:
      <<: *worker
      InstanceType: {machines[0].name}
"""


def _spot(settings: Settings, machines: list[Machine], place: int) -> str:
    """A type of spot workers; the first has what all share."""
    machine = machines[place]
    shared = f"""&gpu
      resources: {{CPU: {min(machine.cpus for machine in machines)}, GPU: {machine.gpus}}}
      min_workers: 0
      max_workers: {settings.nodes}"""
    worker = f"""&worker
        <<: *node
        IamInstanceProfile: {{Name: {settings.cluster_name}-worker}} # no rights on EC2"""
    size = machine.name.partition(".")[2].removesuffix("large")
    return f"""\
  gpu_spot{f"_{size}" if len(machines) > 1 else ""}: # at most {machine.price:.2f} USD an hour
    <<: {shared if place == 0 else "*gpu"}
    priority: {len(machines) - place}
    node_config:
      <<: {worker if place == 0 else "*worker"}
      InstanceType: {machine.name}
      InstanceMarketOptions: {{MarketType: spot}}
"""


def _initialization(settings: Settings, places: Places) -> str:
    mount = f"""\
  # {fill_in(settings.file_system)}the id of an EFS file system with a mount target in every zone above, in the
  # security group above. NFS 4.1 has the byte-range locks SQLite relies on; only the head opens the databases.
  - >-
    sudo mkdir -p /mnt/paretovl && (mountpoint -q /mnt/paretovl ||
    sudo mount -t nfs4 -o nfsvers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2,noresvport
    {settings.file_system}.efs.{settings.region}.amazonaws.com:/ /mnt/paretovl)
  - sudo install -d -o ubuntu {places.studies} {places.data}
"""
    fetch = f"""\
  - mkdir -p {places.data} && aws s3 sync --only-show-errors s3://{settings.bucket}/data {places.data}
"""
    return f"""\
initialization_commands:
  # The image's own updater may hold the package lock for minutes after boot.
  - >-
    sudo apt-get -o DPkg::Lock::Timeout=600 update -qq &&
    sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq nfs-common python3-venv
  # Caches are on the node's own NVMe, which the image's service has mounted, or this does; without one, on its disk.
  - >-
    sudo mkdir -p {places.cache}; sudo systemctl start dlami-nvme 2>/dev/null;
    if mountpoint -q {places.cache}; then :;
    elif mountpoint -q /opt/dlami/nvme; then sudo mount --bind /opt/dlami/nvme {places.cache};
    else disk=$(lsblk -dnpo NAME,MODEL | awk '/Instance Storage/ {{print $1; exit}}');
    [ -z "$disk" ] || {{ sudo mkfs.ext4 -q "$disk" && sudo mount -o noatime "$disk" {places.cache}; }}; fi
  - sudo chown ubuntu {places.cache}
{fetch if settings.bucket else mount}"""
