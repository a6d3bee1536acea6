"""Who may reach whom, as the rendered NetworkPolicies say, against who should."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]
PORTS = {"gateway": 8000, "vision": 50051, "language": 50052, "store": 6379}
MAY = {
    ("gateway", "vision"),
    ("gateway", "language"),
    ("language", "vision"),  # of the same model: fetches what the store has lost
    ("gateway", "store"),
    ("vision", "store"),
    ("language", "store"),
}


def check(items: list[Object]) -> Iterator[str]:
    """Every pair of pods of this release, and a stranger's pod, at every service's own port."""
    policies = [item["spec"] for item in items if item["kind"] == "NetworkPolicy"]
    pods = [item["spec"]["template"]["metadata"]["labels"] for item in items if item["kind"] == "Deployment"]
    if not policies:
        return
    for source in [*pods, {"app": "stranger"}]:
        for target in pods:
            if source is target or target["app.kubernetes.io/component"] not in PORTS:
                continue
            allowed = reaches(policies, source, target)
            if allowed != _should(source, target):
                verb = "reaches" if allowed else "cannot reach"
                yield f"NetworkPolicy: {_name(source)} {verb} {_name(target)}"


def reaches(policies: list[Object], source: dict[str, str], target: dict[str, str]) -> bool:
    """Whether a pod may connect to another's own port: let in there, and let out here."""
    port = PORTS[target["app.kubernetes.io/component"]]
    incoming = [policy for policy in policies if "Ingress" in policy["policyTypes"] and _selects(policy, target)]
    outgoing = [policy for policy in policies if "Egress" in policy["policyTypes"] and _selects(policy, source)]
    let_in = not incoming or any(
        _matches(rule, "from", source, port) for p in incoming for rule in p.get("ingress", ())
    )
    let_out = not outgoing or any(_matches(rule, "to", target, port) for p in outgoing for rule in p.get("egress", ()))
    return let_in and let_out


def _should(source: dict[str, str], target: dict[str, str]) -> bool:
    to = target["app.kubernetes.io/component"]
    by = source.get("app.kubernetes.io/component", "stranger")
    if to == "gateway":
        return by == "stranger"
    if by == "language-worker":  # of the group: Ray chooses ports
        return to == "language" and source.get("lookonce.dev/model") == target.get("lookonce.dev/model")
    same = by == "gateway" or to == "store" or source.get("lookonce.dev/model") == target.get("lookonce.dev/model")
    return (by, to) in MAY and same


def _selects(policy: Object, labels: dict[str, str]) -> bool:
    wanted: dict[str, str] = policy["podSelector"].get("matchLabels", {})
    return wanted.items() <= labels.items()


def _matches(rule: Object, side: str, labels: dict[str, str], port: int) -> bool:
    if not any(item["port"] == port for item in rule.get("ports", [{"port": port}])):
        return False
    peers = rule.get(side)
    if peers is None:
        return True
    stranger = "app.kubernetes.io/component" not in labels
    for peer in peers:
        if "podSelector" in peer and peer["podSelector"].get("matchLabels", {}).items() <= labels.items():
            return True
        if "namespaceSelector" in peer and "podSelector" not in peer and stranger:
            return True
    return False


def _name(labels: dict[str, str]) -> str:
    return " ".join(
        filter(None, (labels.get("lookonce.dev/model"), labels.get("app.kubernetes.io/component", "a stranger")))
    )
