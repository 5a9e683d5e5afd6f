"""The RayJob: what KubeRay, Ray's autoscaler for Kubernetes and the study make of it."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from study import cluster
from study.arguments import parse
from study.config import StudyConfig
from tests.study.clusters.files.kuberay_schema import mistakes
from tests.study.clusters.files.ray_launcher import Decision, RayLauncher
from trainables.errors import InputError

VARIANTS = {
    "eks": [],
    "gke": ["--spot", "cloud.google.com/gke-spot=true", "--notice-seconds", "15", "--nodes", "3", "--device", "h100"],
    "eight-gpus": ["--gpus", "8", "--nodes", "2", "--preset", "coco_clip_b16_8gpu", "--image", "here/paretovl:1"],
}
TRIAL = {"CPU": 0.1, "trial_driver": 0.01}
WORKER = {"CPU": 0.8, "GPU": 1.0}
CLUSTER = ("rayClusterSpec",)
SPOT = (*CLUSTER, "workerGroupSpecs", 0)


@pytest.fixture(scope="module", params=VARIANTS)
def text(request: pytest.FixtureRequest) -> str:
    return cluster.text(cluster.parse(["--provider", "kuberay", *VARIANTS[request.param]]))


@pytest.fixture(scope="module")
def job(text: str) -> dict[str, Any]:
    (found,) = yaml.safe_load_all(text)
    return dict(found)


@pytest.fixture(scope="module")
def spec(job: dict[str, Any]) -> dict[str, Any]:
    """Of the cluster."""
    return dict(job["spec"]["rayClusterSpec"])


@pytest.fixture(scope="module")
def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in spec["workerGroupSpecs"]}


@pytest.fixture(scope="module")
def pods(job: dict[str, Any], spec: dict[str, Any], groups: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Specifications of all pods by what they are."""
    templates = {"submitter": job["spec"]["submitterPodTemplate"], "head": spec["headGroupSpec"]["template"]}
    templates |= {name: group["template"] for name, group in groups.items()}
    return {name: template["spec"] for name, template in templates.items()}


@pytest.fixture(scope="module")
def autoscaler(spec: dict[str, Any]) -> RayLauncher:
    """Ray's, with what it makes of the cluster."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "x", "namespace": "y"}, "spec": spec})
    return RayLauncher(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def study(job: dict[str, Any], pods: dict[str, dict[str, Any]]) -> StudyConfig:
    """As the entry point begins it, with the head's variables."""
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "study.run"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(pods["head"]).items():
            patch.setenv(name, value)
        return parse(words[3:])


def environment(pod: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}


def mounted(pod: dict[str, Any], path: Path) -> dict[str, Any]:
    """The volume that a path of a pod is on."""
    mounts = {Path(mount["mountPath"]): mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    (name,) = [mounts[folder] for folder in (path, *path.parents) if folder in mounts]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == name]
    return dict(volume)


def test_kuberay_accepts_it(job: dict[str, Any]) -> None:
    assert mistakes(job) == []


@pytest.mark.parametrize(
    ("place", "value", "where"),
    [
        (["backOffLimit"], 3, "$.spec: "),
        ([*CLUSTER, "auth"], "token", "$.spec.rayClusterSpec: "),
        ([*CLUSTER, "authOptions", "mode"], "tokens", "$.spec.rayClusterSpec.authOptions.mode: "),
        ([*CLUSTER, "headGroupSpec"], {"rayStartParams": {}}, "$.spec.rayClusterSpec.headGroupSpec: "),
        ([*SPOT, "maxReplicas"], "8", "$.spec.rayClusterSpec.workerGroupSpecs[0].maxReplicas: "),
        ([*SPOT, "rayStartParams"], {"num-cpus": 3}, "workerGroupSpecs[0].rayStartParams"),
        ([*SPOT, "template", "spec", "tolerance"], [], "workerGroupSpecs[0].template.spec: "),
        ([*SPOT, "template", "spec", "containers", 0, "user"], 1, "template.spec.containers[0]: "),
    ],
)
def test_what_kuberay_does_not_know_is_found(place: list[Any], value: object, where: str) -> None:
    job = json.loads(json.dumps(yaml.safe_load(cluster.text(cluster.parse(["--provider", "kuberay"])))))
    part = job["spec"]
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    (mistake,) = mistakes(job)
    assert where in mistake


def test_the_job_ends_and_takes_its_cluster_with_it(job: dict[str, Any]) -> None:
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["ttlSecondsAfterFinished"] <= 600
    assert spec["activeDeadlineSeconds"] == 72 * 3600
    assert spec["backoffLimit"] > 0, "a lost head is another cluster that goes on"
    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__, "of the image, which has the same packages"


def test_workers_come_from_zero_as_spot_and_otherwise_on_demand(
    autoscaler: RayLauncher, groups: dict[str, dict[str, Any]]
) -> None:
    most = groups["spot"]["maxReplicas"]
    gpus = int(groups["spot"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert autoscaler.decide() == Decision({})
    assert autoscaler.decide([WORKER] * gpus * most) == Decision({"spot": most})
    assert autoscaler.decide([WORKER], availability={"spot": 0.0}) == Decision({"on-demand": 1})
    assert autoscaler.decide([WORKER, {"CPU": 1.0}, TRIAL]) == Decision({"spot": 1})
    assert autoscaler.decide([{"CPU": 1.0}] * 8) == Decision({}), "the head has room for them"
    assert autoscaler.decide([TRIAL] * 3, head_free={"CPU": 8}) == Decision({}, 3), "trial functions are on the head"
    assert autoscaler.decide(idle_minutes=[("spot", 5)]) == Decision({})
    assert autoscaler.decide(idle_minutes=[("spot", 60)]) == Decision({}, 0, 1)


def test_a_pod_that_waits_for_spot_gives_way(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private import constants
    from ray.autoscaler.v2.instance_manager import config

    for variable in spec["autoscalerOptions"]["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    try:
        importlib.reload(constants)
        assert constants.RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S == 300
        assert importlib.reload(config).InstanceReconcileConfig().allocate_status_timeout_s == 900
    finally:
        monkeypatch.undo()
        importlib.reload(constants)
        importlib.reload(config)


def test_only_workers_are_where_they_may_be_taken_away(pods: dict[str, dict[str, Any]]) -> None:
    ((key, value),) = pods["spot"]["nodeSelector"].items()
    assert {"key": key, "operator": "Exists"} in pods["spot"]["tolerations"]
    never = [{"key": key, "operator": "NotIn", "values": [value]}]
    for name in ("head", "on-demand"):
        required = pods[name]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert required == {"nodeSelectorTerms": [{"matchExpressions": never}]}
        assert key not in str(pods[name].get("tolerations", ""))
    assert all(pods[name]["containers"] == pods["spot"]["containers"] for name in ("spot", "on-demand"))


def test_an_evicted_worker_is_drained_before_it_is_ended(pods: dict[str, dict[str, Any]]) -> None:
    from ray._private import ray_constants

    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert getattr(ray_constants, name) == 30, "still what Ray does at SIGTERM"
    for pod in ("spot", "on-demand"):
        assert 15 <= int(environment(pods[pod])[name]) == pods[pod]["terminationGracePeriodSeconds"] - 10


def test_nobody_is_root_and_nothing_is_open(spec: dict[str, Any], pods: dict[str, dict[str, Any]]) -> None:
    confined = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for name, pod in pods.items():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert [container["securityContext"] for container in pod["containers"]] == [confined]
        assert name == "head" or pod["automountServiceAccountToken"] is False, "only its autoscaler asks Kubernetes"
    assert spec["autoscalerOptions"]["securityContext"] == confined
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in spec["headGroupSpec"]
    assert spec["authOptions"] == {"mode": "token"}


def test_studies_are_on_the_shared_volume_and_caches_on_the_machine(
    study: StudyConfig, pods: dict[str, dict[str, Any]]
) -> None:
    for name in ("head", "spot", "on-demand"):
        assert "persistentVolumeClaim" in mounted(pods[name], Path(str(study.studies_dir)))
        assert "persistentVolumeClaim" in mounted(pods[name], Path(str(study.data.root)))
        assert mounted(pods[name], Path(str(study.cache_dir)))["emptyDir"] == {}
        assert mounted(pods[name], Path("/dev/shm"))["emptyDir"]["medium"] == "Memory"


def test_the_study_asks_for_no_more_than_there_may_be(study: StudyConfig, groups: dict[str, dict[str, Any]]) -> None:
    resources = groups["spot"]["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"]
    gpus = groups["spot"]["maxReplicas"] * int(resources["limits"]["nvidia.com/gpu"])
    assert study.cluster.address == "auto"
    assert study.cluster.concurrency == gpus // study.trial.workers.count


def test_what_is_not_known_is_marked(text: str) -> None:
    assert text.count("# FILL-IN: ") == len({word for word in ("image-FILL-IN", "claim-FILL-IN") if word in text})
    assert not [line for line in text.splitlines() if len(line) > 120 and not line.startswith("#   ")]


def test_mistakes_are_told_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)2 mistakes.*nodes.*spot"):
        cluster.parse(["--provider", "kuberay", "--nodes", "0", "--spot", "yes"])
    with pytest.raises(InputError, match=r"a trial needs 8; give as many"):
        cluster.text(cluster.parse(["--provider", "kuberay", "--nodes", "1", "--preset", "coco_clip_b16_8gpu"]))
