"""The Helm chart: linted, rendered with every profile, and each object held to Kubernetes' schema and to our rules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from deploy.check import metrics, objects, tls
from deploy.check.tools import run

CHART = Path("deploy/helm/lookonce")
PROFILES = Path("deploy/helm/profiles")
VERSIONS = ("1.30", "1.34")
"""The oldest Kubernetes that the chart says it runs on, and a newer one."""


def check(root: Path) -> Iterator[str]:
    """The chart with each profile."""
    known = metrics.series(metrics.declared(root))
    for profile in sorted((root / PROFILES).glob("*.yaml")):
        where = f"deploy/helm ({profile.stem})"
        done = run("helm", "lint", "--strict", CHART, "-f", profile, root=root)
        if done.returncode:
            yield f"{where}: {(done.stdout + done.stderr).strip()}"
            continue
        rendered = render(root, profile)
        if isinstance(rendered, str):
            yield f"{where}: {rendered}"
            continue
        for item in rendered:
            yield from schema(where, item)
        yield from objects.check(where, rendered)
        yield from (f"{where}: {text}" for item in rendered for text in _scaling(item, known))


def render(root: Path, profile: Path) -> list[dict[str, Any]] | str:
    """The objects of the chart with a profile's values, or what went wrong."""
    done = run("helm", "template", "lookonce", CHART, "--namespace", "vision", "-f", profile, root=root)
    if done.returncode:
        return done.stderr.strip()
    try:
        return [item for item in yaml.safe_load_all(done.stdout) if item]
    except yaml.YAMLError as error:
        return f"renders no YAML: {error}"


def _scaling(item: dict[str, Any], known: dict[str, metrics.Metric]) -> Iterator[str]:
    """Whether the metrics that decide about replicas exist."""
    name = f"{item['kind']}/{item['metadata']['name']}"
    if item["kind"] == "HorizontalPodAutoscaler":
        for metric in item["spec"]["metrics"]:
            yield from metrics.check_query(name, metric["pods"]["metric"]["name"], known)
    elif item["kind"] == "ScaledObject":
        for trigger in item["spec"]["triggers"]:
            yield from metrics.check_query(name, trigger["metadata"]["query"], known)


def schema(where: str, item: dict[str, Any]) -> Iterator[str]:
    name = f"{item.get('kind')}/{item.get('metadata', {}).get('name')}"
    if item.get("apiVersion") == "keda.sh/v1alpha1":
        yield from (f"{where}: {name}: {text}" for text in objects.scaled_object(item))
        return
    if item.get("kind") == "LeaderWorkerSet":
        yield from (f"{where}: {name}: {text}" for text in objects.leader_worker_set(item))
        for pod in objects.pods_of_group(item):
            selector, template = pod["spec"]["selector"], pod["spec"]["template"]
            deployment = {"apiVersion": "apps/v1", **pod, "spec": {"selector": selector, "template": template}}
            yield from schema(where, deployment)
        return
    if item.get("apiVersion") == "cert-manager.io/v1":
        yield from (f"{where}: {text}" for text in tls.certificate(item))
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{where}: {name}: Kubernetes {version} has no such kind"
        except kubernetes_validate.ValidationError as error:
            path = ".".join(map(str, error.path))
            yield f"{where}: {name}: {path}: {error.message} (Kubernetes {version})"
