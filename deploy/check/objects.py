"""Rules that rendered Kubernetes objects must keep, beyond their schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deploy.check import tls, traffic
from deploy.check.settings import CLASSES, check_environment, check_keys
from deploy.check.tools import is_pinned, is_shut
from gateway.routing.variants import parse_variants
from lookonce.core.errors import LookonceError

Object = dict[str, Any]
_EMPTY_OK = (".args", ".emptyDir")
_DECLARED = (
    "lookonce-keys",
    "hub-token",
    "lookonce-store",
    "cache",
    "lookonce-ca",
    "lookonce-vision-tls",
    "lookonce-language-tls",
)
"""Secrets that the profiles say exist."""


def check(where: str, items: list[Object]) -> Iterator[str]:
    """All objects of one rendering."""
    items = [part for item in items for part in pods_of_group(item)]
    for item in items:
        name = f"{where}: {item['kind']}/{item['metadata']['name']}"
        yield from (f"{name}: {text}" for text in _unset(item))
        if item["kind"] == "Deployment":
            yield from _deployment(name, item, items)
        elif item["kind"] == "Secret" and "api-keys" in item["stringData"]:
            yield from check_keys(name, item["stringData"]["api-keys"])
        elif item["kind"] == "Service":
            yield from _service(name, item, items)
        elif item["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            yield from _target(name, item, items)
        elif item["kind"] == "ConfigMap" and "variants" in item["data"]:
            yield from _variants(name, item["data"]["variants"], items)
        elif item["kind"] == "PodDisruptionBudget" and not _selected(item["spec"]["selector"]["matchLabels"], items):
            yield f"{name}: protects nothing"
    yield from (f"{where}: {text}" for text in traffic.check(items))
    yield from (f"{where}: {text}" for text in tls.check(items, _DECLARED))


def pods_of_group(item: Object) -> list[Object]:
    """A group of pods as deployments of its leader and of its workers, so that the same rules hold; else the item."""
    if item["kind"] != "LeaderWorkerSet":
        return [item]
    found = []
    for which, suffix in (("leaderTemplate", ""), ("workerTemplate", "-worker")):
        template = item["spec"]["leaderWorkerTemplate"][which]
        spec = {"selector": {"matchLabels": template["metadata"]["labels"]}, "template": template}
        metadata = item["metadata"] | {"name": item["metadata"]["name"] + suffix}
        found.append({"kind": "Deployment", "metadata": metadata, "spec": spec})
    return found


def leader_worker_set(item: Object) -> Iterator[str]:
    """What LeaderWorkerSet would refuse: its schema is not among Kubernetes' own."""
    group = item["spec"].get("leaderWorkerTemplate", {})
    if not isinstance(group.get("size"), int) or group["size"] < 2:
        yield "leaderWorkerTemplate.size must be a number of pods, two at least"
    if not isinstance(item["spec"].get("replicas"), int):
        yield "replicas must be a number"
    if group.get("restartPolicy") != "RecreateGroupOnPodRestart":
        yield "a group whose pods are not started again together waits for ever for the one that is gone"
    yield from (f"{name} is missing" for name in ("leaderTemplate", "workerTemplate") if name not in group)


def scaled_object(item: Object) -> Iterator[str]:
    """What KEDA would refuse: its schema is not among Kubernetes' own."""
    spec = item.get("spec", {})
    if not isinstance(spec.get("scaleTargetRef", {}).get("name"), str):
        yield "scaleTargetRef.name is missing"
    counts = [spec.get("minReplicaCount"), spec.get("maxReplicaCount")]
    if not all(isinstance(count, int) for count in counts) or counts[0] > counts[1]:
        yield "minReplicaCount and maxReplicaCount must be numbers, in order"
    if not spec.get("triggers"):
        yield "has no trigger"
    for trigger in spec.get("triggers", ()):
        needed = {"serverAddress", "query", "threshold"} - trigger.get("metadata", {}).keys()
        if trigger.get("type") == "prometheus" and needed:
            yield f"trigger lacks {', '.join(sorted(needed))}"
        for key, value in trigger.get("metadata", {}).items():
            if not isinstance(value, str) or not value:
                yield f"trigger: {key} must be text, got {value!r}"


def _unset(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _unset(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _unset(item, path)
    elif value is None or (isinstance(value, str) and "<no value>" in value):
        yield f"{path.lstrip('.')} is unset"
    elif value == "" and not path.endswith(_EMPTY_OK):
        yield f"{path.lstrip('.')} is empty"


def _deployment(name: str, item: Object, items: list[Object]) -> Iterator[str]:
    template = item["spec"]["template"]
    pod = template["spec"]
    labels = template["metadata"]["labels"]
    if not item["spec"]["selector"]["matchLabels"].items() <= labels.items():
        yield f"{name}: its selector does not select its own pods"
    if pod.get("automountServiceAccountToken") is not False:
        yield f"{name}: pods hold a token of the cluster"
    if pod.get("securityContext", {}).get("runAsNonRoot") is not True:
        yield f"{name}: pods may run as root"
    part = labels["app.kubernetes.io/component"]
    for container in pod["containers"]:
        yield from _container(f"{name}: {container['name']}", container)
        yield from _secrets(f"{name}: {container['name']}", container, items)
        if part in CLASSES:
            given = {one["name"]: str(one.get("value", "key") or "") for one in container["env"]}
            yield from check_environment(name, part, given)
            grace = pod["terminationGracePeriodSeconds"]
            drain = given.get("LOOKONCE_GATEWAY_DRAIN_GRACE") or given.get(f"LOOKONCE_{_SHORT[part]}_GRACE", "20s")
            if float(drain.removesuffix("s")) + container["lifecycle"]["preStop"]["sleep"]["seconds"] >= grace:
                yield f"{name}: is killed after {grace} s, before its drain of {drain} is over"


_SHORT = {"gateway": "GATEWAY", "vision": "VISION", "language": "LM"}


def _container(name: str, container: Object) -> Iterator[str]:
    security = container.get("securityContext", {})
    if security.get("readOnlyRootFilesystem") is not True:
        yield f"{name}: its root must be read-only"
    if security.get("allowPrivilegeEscalation") is not False or security.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{name}: must drop all capabilities and gain none"
    if not is_pinned(container["image"]):
        yield f"{name}: image {container['image']} is not pinned to a version"
    if is_shut([*container.get("command", ()), *container.get("args", ())]):
        yield f"{name}: --protected-mode no must be said: else it depends on the image whether others are admitted"
    if not {"readinessProbe", "livenessProbe"} <= container.keys():
        yield f"{name}: needs a readiness and a liveness probe"
    ports = {port["containerPort"]: port["name"] for port in container.get("ports", ())}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        for how in ("grpc", "httpGet", "tcpSocket"):
            port = container.get(kind, {}).get(how, {}).get("port")
            if port is not None and port not in ports and port not in ports.values():
                yield f"{name}: {kind} asks port {port}, which is not open"
    resources = container.get("resources", {})
    if not resources.get("requests", {}).get("memory") or not resources.get("limits", {}).get("memory"):
        yield f"{name}: needs a request and a limit of memory"


def _secrets(name: str, container: Object, items: list[Object]) -> Iterator[str]:
    made = {item["metadata"]["name"]: item["stringData"] for item in items if item["kind"] == "Secret"}
    for variable in container.get("env", ()):
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        if reference is None:
            continue
        secret = made.get(reference["name"])
        if secret is None and reference["name"] not in _DECLARED:
            yield f"{name}: there is no Secret {reference['name']}"
        elif secret is not None and reference["key"] not in secret and not reference.get("optional"):
            yield f"{name}: Secret {reference['name']} has no key {reference['key']}"


def _service(name: str, item: Object, items: list[Object]) -> Iterator[str]:
    behind = _selected(item["spec"]["selector"], items)
    if not behind:
        yield f"{name}: selects no pods"
    open_ports = {
        port["name"]
        for one in behind
        for c in one["spec"]["template"]["spec"]["containers"]
        for port in c.get("ports", ())
    }
    for port in item["spec"]["ports"]:
        if port["targetPort"] not in open_ports:
            yield f"{name}: its pods have no port {port['targetPort']}"
    part = item["metadata"]["labels"]["app.kubernetes.io/component"]
    if part in ("vision", "language") and item["spec"].get("clusterIP") != "None":
        yield f"{name}: must be headless, so that the gateway sees every replica"


def _variants(name: str, text: str, items: list[Object]) -> Iterator[str]:
    try:
        specs = parse_variants(text, param="variants")
    except LookonceError as error:
        yield f"{name}: {error.message}"
        return
    services = {item["metadata"]["name"]: item["spec"]["ports"] for item in items if item["kind"] == "Service"}
    for spec in specs:
        for address in (*spec.vision, *spec.language):
            host, _, port = address.removeprefix("dns://").partition(":")
            if int(port) not in [open_port["port"] for open_port in services.get(host, ())]:
                yield f"{name}: {spec.name}: there is no Service {address}"


def _target(name: str, item: Object, items: list[Object]) -> Iterator[str]:
    target = item["spec"]["scaleTargetRef"]["name"]
    found = [one for one in items if one["kind"] == "Deployment" and one["metadata"]["name"] == target]
    if not found:
        yield f"{name}: scales {target}, which is not there"
    elif "replicas" in found[0]["spec"]:
        yield f"{name}: {target} states its replicas too: each rollout would undo the scaling"


def _selected(labels: dict[str, str], items: list[Object]) -> list[Object]:
    return [
        item
        for item in items
        if item["kind"] == "Deployment" and labels.items() <= item["spec"]["template"]["metadata"]["labels"].items()
    ]
