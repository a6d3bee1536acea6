"""Dashboards and alert rules: every query parses, and asks for metrics and labels that docs/metrics.md lists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser as promql
import yaml

RULES = Path("deploy/prometheus/rules.yaml")
DASHBOARDS = Path("deploy/grafana/dashboards")
PAGE = Path("docs/metrics.md")
_ROW = re.compile(r"\| `(lookonce_\w+)` \| ([^|]*) \| (.*) \|")
_TARGET = {"instance", "job", "service", "le"}
"""Labels that Prometheus itself or a histogram adds."""
_STANDARD = re.compile(r"up|process_\w+|python_\w+|DCGM_FI_\w+")
_SEVERITIES = {"page", "warn"}


@dataclass(frozen=True)
class Metric:
    """One row of the page of metrics, which a test holds to what running processes expose."""

    name: str
    kind: str  # counter, gauge, histogram
    labels: frozenset[str]


def declared(root: Path) -> dict[str, Metric]:
    """Every metric that docs/metrics.md lists, by name."""
    found: dict[str, Metric] = {}
    common: frozenset[str] = frozenset()
    for line in (root / PAGE).read_text().splitlines():
        if line.startswith("## "):
            common = frozenset()
        elif line.startswith("All by ["):
            common = _labels(line)
        elif row := _ROW.fullmatch(line):
            kind = (
                "histogram"
                if "histogram" in row[2]
                else "gauge"
                if "now" in row[2] or "0 or 1" in row[2]
                else "counter"
            )
            found[row[1]] = Metric(row[1], kind, common | _labels(row[3]))
    return found


def series(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """Every name a query may ask for."""
    endings = {"histogram": ("_bucket", "_sum", "_count")}
    return {metric.name + ending: metric for metric in metrics.values() for ending in endings.get(metric.kind, ("",))}


def check(root: Path) -> Iterator[str]:
    """Names on the page, then every rule and every dashboard."""
    metrics = declared(root)
    for metric in metrics.values():
        yield from _named_well(metric)
    known = series(metrics)
    yield from _rules(root, known)
    for file in sorted((root / DASHBOARDS).glob("*.json")):
        yield from _dashboard(file.relative_to(root), json.loads(file.read_text()), known)


def queries(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and expression of every query, with Grafana's interval filled in."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")


def check_query(where: str, query: str, known: dict[str, Metric]) -> Iterator[str]:
    """What is wrong with one expression."""
    try:
        tree = promql.parse(query)
    except ValueError as error:
        yield f"{where}: {error}"
        return
    nodes: list[Any] = []
    promql.walk(tree, nodes.append)
    selectors = [node for node in nodes if isinstance(node, promql.VectorSelector)]
    labels = set(_TARGET)
    for selector in selectors:
        metric = known.get(selector.name or "")
        if metric is not None:
            labels |= metric.labels
            asked = {matcher.name for matcher in selector.matchers.matchers}
            for label in sorted(asked - metric.labels - _TARGET - {"namespace", "pod"}):
                yield f"{where}: {selector.name} has no label {label}"
        elif not _STANDARD.fullmatch(selector.name or ""):
            yield f"{where}: no service has a metric {selector.name}"
    for node in nodes:
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            for label in sorted(set(node.modifier.labels) - labels):
                yield f"{where}: nothing summed here has a label {label}"


def _rules(root: Path, known: dict[str, Metric]) -> Iterator[str]:
    names: set[str] = set()
    for group in yaml.safe_load((root / RULES).read_text())["groups"]:
        for rule in group["rules"]:
            where = f"{RULES}: {rule.get('alert')}"
            if rule.get("alert") in names:
                yield f"{where}: there are two of this name"
            names.add(rule.get("alert"))
            if rule.get("labels", {}).get("severity") not in _SEVERITIES:
                yield f"{where}: severity must be one of {', '.join(sorted(_SEVERITIES))}"
            if not {"summary", "description"} <= rule.get("annotations", {}).keys():
                yield f"{where}: needs a summary and a description"
            yield from check_query(where, rule["expr"], known)


def _dashboard(file: Path, dashboard: dict[str, Any], known: dict[str, Metric]) -> Iterator[str]:
    ids = [panel["id"] for panel in dashboard["panels"]]
    if len(set(ids)) != len(ids):
        yield f"{file}: two panels have one id"
    for panel in dashboard["panels"]:
        if panel["type"] != "row" and not panel.get("targets"):
            yield f"{file}: {panel['title']}: asks nothing"
    for title, query in queries(dashboard):
        yield from check_query(f"{file}: {title}", query, known)


def _named_well(metric: Metric) -> Iterator[str]:
    """As promtool's own lint has it: https://prometheus.io/docs/practices/naming/."""
    if not re.fullmatch(r"lookonce_[a-z0-9]+(_[a-z0-9]+)*", metric.name):
        yield f"{PAGE}: {metric.name}: names are lookonce_words_with_underscores"
    if (metric.kind == "counter") != metric.name.endswith("_total"):
        yield f"{PAGE}: {metric.name}: counters, and they alone, end in _total"
    if re.search(r"_(ms|milliseconds|minutes|kb|mb|mib)(_|$)", metric.name):
        yield f"{PAGE}: {metric.name}: seconds and bytes are the units"


def _labels(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", (re.findall(r"\[([^\]]*)\]", text) or [""])[0]))
