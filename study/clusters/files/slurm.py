"""A study as a batch job of Slurm: Ray runs on the nodes of its allocation, and the job queues itself again."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from study.clusters.files import common
from study.clusters.files.common import Cluster, Places, commented, fill_in
from study.clusters.files.typed import Folder
from trainables.execution.signals import RESUMABLE

NOTICE_SECONDS = 120
"""Before the time limit, or its end by preemption where Slurm gives as much, a job stops its study in order."""


class Settings(Cluster):
    """Write a batch script for Slurm. What is not known yet is marked FILL-IN."""

    model_config = SettingsConfigDict(cli_prog_name="python -m study.cluster --provider slurm")
    example_commands: ClassVar[tuple[str, ...]] = (
        "python -m study.cluster --provider slurm --shared /scratch/me > paretovl.sbatch",
        "python -m study.cluster --provider slurm --nodes 4 --gpus 8 --cpus 64 --hours 24",
    )

    provider: Literal["slurm"] = Field("slurm", description="whose machines")
    nodes: int = Field(2, ge=1, description="of the allocation")
    cpus: int = Field(8, ge=1, description="cores of each node")
    gpus: int = Field(1, ge=0, description="of each node")
    hours: float = Field(12, gt=0.1, description="time limit; the job queues itself again until the study is done")
    partition: str | None = Field(None, description="of the nodes; empty: the default one")
    shared: Folder = Field(Path("/shared-FILL-IN"), description="folder that all nodes share, such as NFS or Lustre")
    cache: Folder = Field(Path("/tmp/paretovl"), description="folder on each node's own disk")

    @property
    def places(self) -> Places:
        """On the nodes."""
        return Places(studies=f"{self.shared}/studies", data=f"{self.shared}/data", cache=str(self.cache))


def render(settings: Settings, _: None = None) -> str:
    """The batch script."""
    return "\n".join((_head(settings), _ray(), _study(settings)))


def _head(settings: Settings) -> str:
    seconds = round(settings.hours * 3600)
    asked = {
        "job-name": settings.cluster_name,
        "partition": settings.partition,
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": settings.cpus,
        "gpus-per-node": settings.gpus or None,
        "time": f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}",
        "signal": f"B:USR1@{NOTICE_SECONDS}",
        "output": "%x-%j.log",
        "open-mode": "append",
    }
    lines = "\n".join(f"#SBATCH --{name}={value}" for name, value in asked.items() if value is not None)
    return f"""\
#!/bin/bash
{_introduction(settings)}
{lines}
#SBATCH --requeue
set -u
"""


def _introduction(settings: Settings) -> str:
    return commented(f"""\
A study on an allocation of Slurm. Written by `python -m study.cluster --provider slurm`, and yours to edit; \
docs/slurm.md tells more. All nodes have the same kind of GPU: cost is measured in device-seconds.

{fill_in(str(settings.shared))}a folder that all nodes share: everything a study knows is below it. The project \
folder, with its environment in .venv, is shared as well, and the job submitted from there. Further flags of study.run \
may follow:

  sbatch paretovl.sbatch

When its time is up, or it is preempted, the job stops the study in order, is queued again under the same number, and \
goes on where it stopped. scancel ends it, in order as well, for good.""")


def _ray() -> str:
    return f"""\
# Ray, for this job alone: folder, port and token are its own, so that others may use the same nodes. What it says is in
# a file of its own. Head and nodes end together, so nothing is gained by draining one.
ulimit -n "$(ulimit -Hn)"
export {common.AUTHENTICATION} RAY_AUTH_TOKEN=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \\n')
export RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
folder=/tmp/ray-$SLURM_JOB_ID
# The head's first address; name another here if the nodes do not reach each other by it.
head=$(hostname -I | cut -d ' ' -f 1)
port=$((20000 + SLURM_JOB_ID % 10000))
log=$SLURM_JOB_NAME-$SLURM_JOB_ID-ray.log
step=(srun --quiet --overlap --cpus-per-task="$SLURM_CPUS_PER_TASK" --output="$log" --open-mode=append)
start=(.venv/bin/ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --min-worker-port=0 --max-worker-port=0
  --dashboard-agent-listen-port=0)

"${{step[@]}}" --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${{start[@]}}" --head --node-ip-address="$head" \\
  --port="$port" --temp-dir="$folder" --include-dashboard=false \\
  --resources='{{"trial_driver": {common.TRIAL_DRIVERS}}}' &
until .venv/bin/ray health-check --address="$head:$port" >/dev/null 2>&1; do
  kill -0 $! 2>/dev/null || {{ echo "Ray has not started; $log says why" >&2; exit 1; }}
  sleep 1
done
others=$((SLURM_JOB_NUM_NODES - 1))
[ "$others" = 0 ] || "${{step[@]}}" --nodes="$others" --ntasks="$others" --exclude="$SLURMD_NODENAME" \\
  "${{start[@]}}" --address="$head:$port" &
"""


def _study(settings: Settings) -> str:
    places = settings.places
    variables = common.study_variables(places, CLUSTER__ADDRESS="$head:$port")
    found = "\n".join(f"export {name}={value}" for name, value in variables.items())
    return f"""\
# The study. Its exit code {RESUMABLE} says that the same command goes on. Slurm sends USR1 before the time limit; TERM
# comes from scancel, or with a preemption, after which Slurm itself queues the job again.
{found}
.venv/bin/python -m study.run --preset {settings.preset} --data.root {places.data} "$@" &
driver=$! ends=
trap 'signal=USR1; kill "$driver"' USR1
trap 'signal=TERM ends=1; kill "$driver"' TERM
while signal=; wait "$driver"; code=$?; [ -n "$signal" ]; do echo "stopping the study after SIG$signal"; done
trap '' USR1 TERM
kill $(jobs -p) 2>/dev/null
wait
rm -rf "$folder"
if [ "$code" = {RESUMABLE} ] && [ -z "$ends" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""
