"""What KubeRay accepts as a RayJob, strictly: an unknown field is a mistake, as it is to `kubectl apply`.

KubeRay's fields are those of its types `RayJobSpec` and `RayClusterSpec` as of version 1.7 (ray-project/kuberay,
`ray-operator/apis/ray/v1/rayjob_types.go` and `raycluster_types.go`, Apache-2.0), listed here by name and kind; left
out are those of features that are off unless an operator is told otherwise. Kubernetes' own types come from its
OpenAPI, as the package kubernetes-validate carries it.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator

KUBERNETES = "1.33"
TYPES: dict[str, dict[str, Any]] = {
    "RayJob": {"apiVersion": ["ray.io/v1"], "kind": ["RayJob"], "metadata": "ObjectMeta", "spec": "RayJobSpec"},
    "RayJobSpec": {
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "clusterSelector": {"": str},
        "entrypoint": str,
        "entrypointNumCpus": float,
        "entrypointNumGpus": float,
        "entrypointResources": str,
        "jobId": str,
        "metadata": {"": str},
        "rayClusterSpec": "RayClusterSpec",
        "runtimeEnvYAML": str,
        "shutdownAfterJobFinishes": bool,
        "submissionMode": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"],
        "submitterConfig": {"backoffLimit": int},
        "submitterPodTemplate": "PodTemplateSpec",
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
    },
    "RayClusterSpec": {
        "authOptions": {"enableK8sTokenAuth": bool, "mode": ["disabled", "token"], "secretName": str},
        "autoscalerOptions": "AutoscalerOptions",
        "enableInTreeAutoscaling": bool,
        "headGroupSpec": "HeadGroupSpec",
        "headServiceAnnotations": {"": str},
        "rayVersion": str,
        "suspend": bool,
        "upgradeStrategy": {"type": ["Recreate", "None"]},
        "workerGroupSpecs": ("WorkerGroupSpec",),
    },
    "AutoscalerOptions": {
        "args": (str,),
        "command": (str,),
        "env": ("EnvVar",),
        "envFrom": ("EnvFromSource",),
        "idleTimeoutSeconds": int,
        "image": str,
        "imagePullPolicy": ["Always", "IfNotPresent", "Never"],
        "resources": "ResourceRequirements",
        "securityContext": "SecurityContext",
        "upscalingMode": ["Default", "Aggressive", "Conservative"],
        "version": ["v1", "v2"],
        "volumeMounts": ("VolumeMount",),
    },
    "HeadGroupSpec": {
        "enableIngress": bool,
        "headService": "Service",
        "labels": {"": str},
        "rayStartParams": {"": str},
        "resources": {"": str},
        "serviceType": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"],
        "template": "PodTemplateSpec",
    },
    "WorkerGroupSpec": {
        "groupName": str,
        "idleTimeoutSeconds": int,
        "labels": {"": str},
        "maxReplicas": int,
        "minReplicas": int,
        "numOfHosts": int,
        "priority": int,
        "rayStartParams": {"": str},
        "replicas": int,
        "resources": {"": str},
        "template": "PodTemplateSpec",
    },
}
"""Fields by type. A kind is a type by name, a list of what is accepted, a tuple for a list, or fields within, where the
name "" stands for any."""
REQUIRED = {
    "RayJob": ["apiVersion", "kind", "metadata", "spec"],
    "RayClusterSpec": ["headGroupSpec"],
    "HeadGroupSpec": ["template"],
    "WorkerGroupSpec": ["groupName", "minReplicas", "maxReplicas", "template"],
}


@cache
def validator() -> Draft202012Validator:
    """Of one RayJob."""
    package = files("kubernetes_validate") / f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/_definitions.json"
    known = json.loads(package.read_text())["$defs"]
    names = {name.rpartition(".")[2]: name for name in known if ".core.v1." in name or name.endswith("ObjectMeta")}
    own = {name: {**_schema(fields, names), "required": REQUIRED.get(name, [])} for name, fields in TYPES.items()}
    return Draft202012Validator({"$ref": "#/$defs/RayJob", "$defs": known | own})


def mistakes(job: object) -> list[str]:
    """Where a RayJob is wrong, as paths, and how."""
    return [f"{error.json_path}: {error.message[:200]}" for error in validator().iter_errors(job)]


def _schema(kind: Any, names: dict[str, str]) -> dict[str, Any]:
    match kind:
        case str():
            return {"$ref": f"#/$defs/{kind if kind in TYPES else names[kind]}"}
        case list():
            return {"enum": kind}
        case tuple():
            return {"type": "array", "items": _schema(kind[0], names)}
        case {"": inner}:
            return {"type": "object", "additionalProperties": _schema(inner, names)}
        case dict():
            fields = {name: _schema(inner, names) for name, inner in kind.items()}
            return {"type": "object", "properties": fields, "additionalProperties": False}
    return {"type": {int: "integer", float: "number", str: "string", bool: "boolean"}[kind]}
