"""A study as a `RayJob` of KubeRay: the operator makes a cluster for it, runs it there, and takes the cluster away."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from study.clusters.files import common
from study.clusters.files.common import Elastic, Places, commented, fill_in
from study.clusters.files.typed import named_like
from study.costs.page import Plan

PLACES = Places(home="/home/paretovl")
"""In the containers; what is below /mnt is mounted there."""
HEAD_CPUS, HEAD_MEMORY = 8, "32Gi"
SPOT_WAIT_SECONDS = 900
"""That a pod may wait for a machine, and the machine for its image, before pods of another kind are asked for."""
STOPPING_SECONDS = 10
"""Of what is left after a drain, to end Ray."""


JobName = Annotated[
    str, named_like("[a-z]([a-z0-9-]{0,45}[a-z0-9])?", "lower-case letters, digits, dashes, a letter first, 47 at most")
]
"""KubeRay takes no longer ones, as the names of pods begin with it."""
ClaimName = Annotated[str, named_like("[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", "lower-case letters, digits, dots and -")]


class Settings(Elastic):
    """Write a RayJob for Kubernetes. What is not known yet is marked FILL-IN."""

    model_config = SettingsConfigDict(cli_prog_name="python -m study.cluster --provider kuberay")
    example_commands: ClassVar[tuple[str, ...]] = (
        "python -m study.cluster --provider kuberay --image registry.example/paretovl:1 > study.yaml",
        "python -m study.cluster --provider kuberay --spot cloud.google.com/gke-spot=true --notice-seconds 15",
    )

    provider: Literal["kuberay"] = Field("kuberay", description="whose machines")
    cluster_name: JobName = Field("paretovl", description="of the study and of its pods")
    image: str = Field("image-FILL-IN", description="that was built from Dockerfile, with its registry")
    claim: ClaimName = Field("claim-FILL-IN", description="ReadWriteMany volume claim that all pods share")
    device: Literal["a100-80g", "h100", "l4"] = Field("l4", description="kind of GPU of all workers")
    gpus: int = Field(1, ge=1, description="of each worker")
    cpus: int = Field(7, ge=1, description="of each worker; somewhat less than its machine has")
    memory_gib: int = Field(26, ge=4, description="of each worker; somewhat less than its machine has")
    spot: str = Field(
        "karpenter.sh/capacity-type=spot",
        pattern="^[^=]+=[^=]+$",
        description="label that spot machines have, and their taint if they have one",
    )
    notice_seconds: int = Field(
        100, ge=10, description="that a spot machine stays after its notice: 100 on AWS, 15 on Google Cloud"
    )
    hours: float = Field(72, ge=0.1, description="after which the job is ended, so that none is forgotten")

    def plan_flags(self) -> list[str]:
        """See `Cluster`."""
        return ["--preset", self.preset, "--device", self.device, "--devices", str(self.nodes * self.gpus)]


def render(settings: Settings, found: Plan) -> str:
    """The RayJob.

    Args:
        settings: of the cluster.
        found: for its `plan_flags`.
    """
    import ray

    return "\n".join(
        (
            _introduction(settings, found),
            _job(settings, found),
            _cluster(settings, ray.__version__),
            _head(settings),
            _workers(settings),
        )
    )


def _introduction(settings: Settings, found: Plan) -> str:
    return commented(f"""\
A study on Kubernetes, for KubeRay 1.7 or newer: a head that is not taken away, and GPU workers that come and go with \
the trials: spot where there is any, on demand where there is not. Everything a study knows is on a volume that all \
share: a lost worker costs the minutes since its last checkpoint, and after a lost head, or on another day, the same \
file goes on where the study stopped.

Written by `python -m study.cluster --provider kuberay`, and yours to edit; docs/kubernetes.md tells more. The study \
{settings.preset}: {found.trials} trials on {found.devices} x {found.device} in {found.wall_hours:.1f} hours, \
{found.device_hours:.1f} device-hours.

  kubectl replace --force -f study.yaml
  kubectl logs -f -l job-name={settings.cluster_name}
""")


def _job(settings: Settings, found: Plan) -> str:
    flags = f"--preset {settings.preset} --data.root {PLACES.data} --cluster.concurrency {found.trials_at_once}"
    return f"""\
apiVersion: ray.io/v1
kind: RayJob
metadata:
  name: {settings.cluster_name}
spec:
  entrypoint: python -m study.run {flags}
  # Each try has a new cluster, and goes on from what is on the volume.
  backoffLimit: 5
  # The cluster goes with the job, also with one that hangs.
  shutdownAfterJobFinishes: true
  ttlSecondsAfterFinished: 300
  activeDeadlineSeconds: {round(settings.hours * 3600)}
  submitterPodTemplate:
    spec:
      restartPolicy: Never
      automountServiceAccountToken: false
      securityContext: &user
        runAsNonRoot: true
        runAsUser: 1000
        runAsGroup: 1000
        fsGroup: 1000
        fsGroupChangePolicy: OnRootMismatch
        seccompProfile: {{type: RuntimeDefault}}
      containers:
        - name: submitter
          # {fill_in(settings.image)}made from the Dockerfile of this project.
          image: &image {settings.image}
          resources:
            limits: &small {{cpu: "1", memory: 1Gi}}
            requests: *small
          securityContext: &confined
            allowPrivilegeEscalation: false
            capabilities: {{drop: [ALL]}}
"""


def _cluster(settings: Settings, version: str) -> str:
    return f"""\
  rayClusterSpec:
    # Of the image: the operator tells from it that Ray knows tokens. They are in a secret that it makes.
    rayVersion: "{version}"
    authOptions: {{mode: token}}
    enableInTreeAutoscaling: true
    autoscalerOptions:
      version: v2
      # A trial's end and the start of the next are seconds apart; a new machine takes minutes.
      idleTimeoutSeconds: {round(settings.idle_minutes * 60)}
      resources:
        limits: *small
        requests: *small
      securityContext: *confined
      env:
        # A worker that waits longer for its machine is given up, and one of the other group asked for. Ray would wait
        # for an hour; and for ever for one that is no longer needed.
        - {{name: RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S, value: "{SPOT_WAIT_SECONDS}"}}
        - {{name: RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S, value: "300"}}
"""


def _head(settings: Settings) -> str:
    variables = {"RAY_USAGE_STATS_ENABLED": "0", **common.study_variables(PLACES)}
    environment = "\n".join(
        f'                - {{name: {name}, value: "{value}"}}' for name, value in variables.items()
    )
    return f"""\
    # Driver, Optuna and MLflow databases, and the controller of every trial: what a spot notice must not take away.
    headGroupSpec:
      serviceType: ClusterIP
      rayStartParams: {{}}
      # Trial functions ask for 0.01 trial_driver, which no other node has.
      resources: {{CPU: "{HEAD_CPUS}", trial_driver: "{common.TRIAL_DRIVERS}"}}
      template:
        metadata:
          annotations:
            cluster-autoscaler.kubernetes.io/safe-to-evict: "false"
            karpenter.sh/do-not-disrupt: "true"
        spec:
          affinity: &never_spot
            nodeAffinity:
              requiredDuringSchedulingIgnoredDuringExecution:
                nodeSelectorTerms:
                  - matchExpressions:
                      - {{key: {_spot(settings)[0]}, operator: NotIn, values: ["{_spot(settings)[1]}"]}}
          securityContext: *user
          containers:
            - name: head
              image: *image
              resources:
                limits: &head {{cpu: "{HEAD_CPUS}", memory: {HEAD_MEMORY}}}
                requests: *head
              securityContext: *confined
              env:
{environment}
              volumeMounts: &mounts
                - {{name: shared, mountPath: /mnt/paretovl}}
                - {{name: cache, mountPath: {PLACES.cache}}}
                - {{name: memory, mountPath: /dev/shm}}
          volumes: &volumes
            # {fill_in(settings.claim)}with file locks, such as NFS 4.1; only the head opens the databases.
            - {{name: shared, persistentVolumeClaim: {{claimName: {settings.claim}}}}}
            - {{name: cache, emptyDir: {{}}}} # on the machine's own disk
            - {{name: memory, emptyDir: {{medium: Memory, sizeLimit: 8Gi}}}}
"""


def _workers(settings: Settings) -> str:
    key, value = _spot(settings)
    resources = f'cpu: "{settings.cpus}", memory: {settings.memory_gib}Gi, nvidia.com/gpu: "{settings.gpus}"'
    return f"""\
    # One kind of GPU only: cost is measured in device-seconds, which two kinds would make incomparable.
    workerGroupSpecs:
      - groupName: spot
        <<: &group
          replicas: 0
          minReplicas: 0
          maxReplicas: {settings.nodes}
          rayStartParams: {{}}
        priority: 1
        template:
          spec:
            <<: &worker
              # When its machine is taken away, or drained, Kubernetes signals the pod. Ray then drains the node: trials
              # there write a checkpoint and go on elsewhere.
              terminationGracePeriodSeconds: {settings.notice_seconds + STOPPING_SECONDS}
              automountServiceAccountToken: false
              securityContext: *user
              containers:
                - name: worker
                  image: *image
                  resources:
                    limits: &size {{{resources}}}
                    requests: *size
                  securityContext: *confined
                  env:
                    - {{name: RAY_USAGE_STATS_ENABLED, value: "0"}}
                    - {{name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: "{settings.notice_seconds}"}}
                  volumeMounts: *mounts
              volumes: *volumes
            nodeSelector: {{{key}: "{value}"}}
            tolerations:
              - &gpu {{key: nvidia.com/gpu, operator: Exists}}
              - {{key: {key}, operator: Exists}}
      # What is taken while no spot machine comes: never interrupted. To wait for spot instead, remove this group.
      - groupName: on-demand
        <<: *group
        priority: 0
        template:
          spec:
            <<: *worker
            affinity: *never_spot
            tolerations: [*gpu]
"""


def _spot(settings: Settings) -> tuple[str, str]:
    """Name and value of the label."""
    key, _, value = settings.spot.partition("=")
    return key, value
