"""infra/kubernetes: Kubernetes' own schemas, KubeRay's fields, and what no pod may do."""

import json
from collections.abc import Iterator
from functools import cache

import jsonschema
import kubernetes_validate
import pytest

from tests.infra.files import INFRA, answer, documents, program

VERSION = "1.33"
PLACES = ("overlays/cpu", "overlays/gpu", "job")
FILES = sorted(p for p in (INFRA / "kubernetes").rglob("*.yaml") if p.name not in ("kustomization.yaml", "workers.yaml"))


def fields(required: tuple[str, ...] = (), **known: dict) -> dict:
    return {"type": "object", "properties": known, "required": list(required), "additionalProperties": False}


TEXT, WHOLE, FLAG, LABELS = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}, {"type": "object"}
POD = {"type": "object", "required": ["spec"]}  # held against Kubernetes' own schema
START = {"type": "object", "additionalProperties": TEXT}  # KubeRay's parameters are strings, numbers too
# The fields of KubeRay 1.5's types RayCluster and RayJob that we use. Its own schema is in no package of PyPI, npm or Debian.
GROUP = fields(
    ("groupName", "maxReplicas", "minReplicas", "rayStartParams", "template"),
    groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, rayStartParams=START, template=POD,
)  # fmt: skip
SCALING = fields(
    idleTimeoutSeconds=WHOLE, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}, resources=LABELS, securityContext=LABELS
)
RAY = {
    "RayCluster": fields(
        ("headGroupSpec",),
        rayVersion=TEXT,
        authOptions=fields(mode={"enum": ["token"]}),
        enableInTreeAutoscaling=FLAG,
        autoscalerOptions=SCALING,
        headGroupSpec=fields(("rayStartParams", "template"), serviceType={"enum": ["ClusterIP"]}, rayStartParams=START, template=POD),
        workerGroupSpecs={"type": "array", "items": GROUP},
    ),
    "RayJob": fields(
        clusterSelector=START,
        entrypoint=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        submitterConfig=fields(backoffLimit=WHOLE),
        submitterPodTemplate=POD,
    ),
}


def templates(found: object) -> Iterator[dict]:
    """Every pod template, wherever it stands."""
    if isinstance(found, dict):
        if "containers" in found.get("spec", {}):
            yield found
        for value in found.values():
            yield from templates(value)
    elif isinstance(found, list):
        for value in found:
            yield from templates(value)


def check(found: dict) -> None:
    """Raises ValidationError where an object is not of its kind."""
    if found["kind"] in RAY:
        assert found["apiVersion"] == "ray.io/v1" and found.keys() == {"apiVersion", "kind", "metadata", "spec"}
        jsonschema.validate(found["spec"], RAY[found["kind"]])
        for template in templates(found):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "of-ray"}, "template": template}
            kubernetes_validate.validate(pod, VERSION, strict=True)
    else:
        kubernetes_validate.validate(found, VERSION, strict=True)


@cache
def merged() -> dict[str, list[dict]]:
    """The objects that each overlay makes, merged by kustomize."""
    if not (kubectl := program("kubectl")):
        pytest.skip("kubectl, which merges the layers, is not installed")
    return {place: documents(answer(kubectl, "kustomize", INFRA / "kubernetes" / place)) for place in PLACES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_are_of_their_kinds(path):
    for found in documents(path.read_text()):
        check(found)


def test_overlays_are_of_their_kinds():
    for objects in merged().values():
        for found in objects:
            check(found)
            assert found["kind"] == "Namespace" or found["metadata"]["namespace"] == "mmimpute"


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("RayCluster", lambda spec: spec.update(enableAutoscaling=True)),
        ("RayCluster", lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0})),
        ("RayCluster", lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"].update(toleration=[])),
        ("RayJob", lambda spec: spec.update(entryPoint="mmimpute")),
        ("Deployment", lambda spec: spec["template"]["spec"].update(runAsNonRoot=True)),
    ],
)
def test_a_misspelt_field_is_found(kind, wrong):
    found = next(d for path in FILES for d in documents(path.read_text()) if d["kind"] == kind)
    wrong(found["spec"])
    with pytest.raises(jsonschema.ValidationError):
        check(found)


def pods() -> list[tuple[str, dict]]:
    """(overlay, pod's spec) of every pod that is made."""
    return [(place, template["spec"]) for place, objects in merged().items() for template in templates(objects)]


def test_no_pod_may_do_more_than_it_needs():
    assert len(pods()) == 4 + 5 + 1
    for place, pod in pods():
        context = pod["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] > 0 and context["seccompProfile"] == {"type": "RuntimeDefault"}, place
        assert not any(pod.get(shared) for shared in ("hostNetwork", "hostPID", "hostIPC"))
        assert all(volume.keys() <= {"name", "emptyDir", "configMap", "secret"} for volume in pod["volumes"])
        for container in pod["containers"]:
            locked = container["securityContext"]
            assert locked == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
            assert container["resources"]["limits"]["memory"] and "@" not in container["image"].split("/")[0]
        needs_kubernetes = pod["serviceAccountName"] == "ray-head"  # its autoscaler
        assert needs_kubernetes or pod["automountServiceAccountToken"] is False


def test_the_autoscaler_is_as_locked_as_the_rest():
    (cluster,) = [o for o in merged()["overlays/cpu"] if o["kind"] == "RayCluster"]
    locked = cluster["spec"]["autoscalerOptions"]["securityContext"]
    assert locked["readOnlyRootFilesystem"] and locked["capabilities"] == {"drop": ["ALL"]} and not locked["allowPrivilegeEscalation"]
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['spec']['rayVersion']} " in (INFRA / "requirements.lock").read_text()


def test_secrets_are_references():
    words = ("PASSWORD", "SECRET", "TOKEN", "AUTH_STRING", "CONNECTION_URL")
    for objects in merged().values():
        assert not [o for o in objects if o["kind"] == "Secret"]
        assert not [o for o in objects if o["kind"] == "ConfigMap" and any(word in json.dumps(o) for word in words)]
    for _, pod in pods():
        secret = [v for c in pod["containers"] for v in c.get("env", []) if any(word in v["name"] for word in words)]
        assert all(v.keys() == {"name", "valueFrom"} and "secretKeyRef" in v["valueFrom"] for v in secret)


def test_gpu_workers_scale_from_none_and_bear_spot_nodes():
    (cluster,) = [o for o in merged()["overlays/gpu"] if o["kind"] == "RayCluster"]
    groups = {g["groupName"]: g for g in cluster["spec"]["workerGroupSpecs"]}
    gpu = groups["gpu"]
    assert (
        cluster["spec"]["enableInTreeAutoscaling"]
        and (gpu["minReplicas"], groups["cpu"]["minReplicas"]) == (0, 0) < (gpu["maxReplicas"],) * 2
    )
    (container,) = gpu["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1" and container["image"].endswith("-cuda")
    tolerated = {t["key"] for t in gpu["template"]["spec"]["tolerations"]}
    assert {"nvidia.com/gpu", "mmimpute/spot"} <= tolerated
    assert "tolerations" not in cluster["spec"]["headGroupSpec"]["template"]["spec"]  # the head is not to be lost


def test_nothing_is_reached_that_is_not_named():
    for place in ("overlays/cpu", "overlays/gpu"):
        objects = merged()[place]
        policies = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "NetworkPolicy"}
        assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        entries = [rule for spec in policies.values() for rule in spec.get("ingress", [])]
        assert all(
            rule["from"] and all(source.keys() <= {"podSelector", "namespaceSelector"} for source in rule["from"]) for rule in entries
        )
        exits = [to["ipBlock"] for spec in policies.values() for rule in spec.get("egress", []) for to in rule["to"] if "ipBlock" in to]
        assert all(b["cidr"] != "0.0.0.0/0" or "169.254.0.0/16" in b["except"] for b in exits)  # a node's credentials
        assert {o["spec"]["type"] for o in objects if o["kind"] == "Service"} == {"ClusterIP"}
        assert not [o for o in objects if o["kind"] in ("Ingress", "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")]


def test_every_budget_and_policy_selects_a_pod():
    objects = merged()["overlays/gpu"] + merged()["job"]
    labels = [
        t["metadata"]["labels"] | {"ray.io/cluster": "ray", "ray.io/node-type": kind} for t in templates(objects) for kind in ("head", "")
    ]
    for found in objects:
        if found["kind"] in ("NetworkPolicy", "PodDisruptionBudget", "Service"):
            selector = found["spec"].get("podSelector", found["spec"].get("selector", {}))
            wanted = selector.get("matchLabels", selector if found["kind"] == "Service" else {})
            among = {e["key"]: e["values"] for e in selector.get("matchExpressions", [])}
            assert any(wanted.items() <= of.items() and all(of[k] in values for k, values in among.items()) for of in labels), found[
                "metadata"
            ]
