"""TLS between the processes, as rendered: every file is mounted, every Secret comes from somewhere, and callers,
services and probes agree on what is asked of whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]
FILES = {"tls.crt", "tls.key", "ca.crt"}
"""What a Secret of cert-manager holds, and one of the operator's must."""
_SERVER = {"vision": "LOOKONCE_VISION_TLS", "language": "LOOKONCE_LM_TLS"}
_CALLERS = {
    ("gateway", "vision"): ("LOOKONCE_GATEWAY_RPC_TLS_CA", "LOOKONCE_GATEWAY_RPC_TLS_CERTIFICATE"),
    ("gateway", "language"): ("LOOKONCE_GATEWAY_RPC_TLS_CA", "LOOKONCE_GATEWAY_RPC_TLS_CERTIFICATE"),
    ("language", "vision"): ("LOOKONCE_LM_VISION_TLS_CA", "LOOKONCE_LM_TLS_CERTIFICATE"),
}
"""For each pair that talks: the caller's variables for the authority it trusts, and the certificate it shows."""


def check(items: list[Object], declared: tuple[str, ...]) -> Iterator[str]:
    """All objects of one rendering; `declared` are Secrets that are taken to exist."""
    made = {item["spec"]["secretName"]: item for item in items if item["kind"] == "Certificate"}
    for item in made.values():
        yield from certificate(item)
    pods = [item for item in items if item["kind"] == "Deployment"]
    for item in pods:
        yield from _mounts(item, {*made, *declared})
        yield from _probes(item)
        yield from _names(item, items, made)
    for caller in pods:
        for service in pods:
            yield from _agreement(caller, service)


def certificate(item: Object) -> Iterator[str]:
    """What cert-manager would refuse or make useless: its schema is not among Kubernetes' own."""
    name, spec = f"Certificate/{item['metadata']['name']}", item["spec"]
    for field in ("secretName", "dnsNames", "issuerRef"):
        if not spec.get(field):
            yield f"{name}: {field} is missing"
    if not spec.get("issuerRef", {}).get("name") or spec["issuerRef"].get("kind") not in ("Issuer", "ClusterIssuer"):
        yield f"{name}: issuerRef needs a name and a kind, Issuer or ClusterIssuer"
    if set(spec.get("usages", ())) != {"server auth", "client auth"}:
        yield f"{name}: must serve for server auth and client auth: a language service does both"


def _mounts(item: Object, secrets: set[str]) -> Iterator[str]:
    """Files named in variables and probes are files of a mounted Secret that exists."""
    pod, name = item["spec"]["template"]["spec"], _name(item)
    volumes = {volume["name"]: volume["secret"] for volume in pod["volumes"] if "secret" in volume}
    yield from (
        f"{name}: there is no Secret {secret['secretName']}"
        for secret in volumes.values()
        if secret["secretName"] not in secrets
    )
    for container in pod["containers"]:
        mounted = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in volumes}
        for file in _files(container):
            folder, _, leaf = file.rpartition("/")
            if folder not in mounted:
                yield f"{name}: {file} is not mounted"
            elif leaf not in FILES:
                yield f"{name}: no Secret for TLS holds {leaf}"


def _files(container: Object) -> list[str]:
    values = [one["value"] for one in container["env"] if "_TLS_" in one["name"]] if "env" in container else []
    commands = [part for kind in _kinds(container) for part in container[kind].get("exec", {}).get("command", ())]
    return values + [part.partition("=")[2] for part in commands if part.startswith("--tls-") and "/" in part]


def _probes(item: Object) -> Iterator[str]:
    """A service behind TLS is asked with TLS, and with a certificate if it wants one; others by the kubelet."""
    variables, part = _variables(item), _part(item)
    if part not in _SERVER:
        return
    served, mutual = f"{_SERVER[part]}_CERTIFICATE" in variables, f"{_SERVER[part]}_CA" in variables
    for container in item["spec"]["template"]["spec"]["containers"]:
        for kind in _kinds(container):
            command = container[kind].get("exec", {}).get("command", ())
            flags = {word.partition("=")[0] for word in command}
            if served and "grpc" in container[kind]:
                yield f"{_name(item)}: {kind}: the kubelet's gRPC probe speaks no TLS"
            elif command and not served:
                yield f"{_name(item)}: {kind}: speaks TLS to a service that does not"
            elif command and not {"--tls-ca", "--tls-name"} <= flags:
                yield f"{_name(item)}: {kind}: cannot check the certificate of a pod asked by its own address"
            elif command and mutual and not {"--tls-certificate", "--tls-key"} <= flags:
                yield f"{_name(item)}: {kind}: shows no certificate where one is demanded"


def _names(item: Object, items: list[Object], made: dict[str, Object]) -> Iterator[str]:
    """A service's certificate is for the names it is called by, and asked for by."""
    if _part(item) not in _SERVER:
        return
    labels, pod = item["spec"]["template"]["metadata"]["labels"], item["spec"]["template"]["spec"]
    called = {
        one["metadata"]["name"]
        for one in items
        if one["kind"] == "Service" and one["spec"]["selector"].items() <= labels.items()
    }
    commands = [part for one in pod["containers"] for kind in _kinds(one) for part in _command(one[kind])]
    called |= {part.partition("=")[2] for part in commands if part.startswith("--tls-name=")}
    for volume in pod["volumes"]:
        issued = made.get(volume.get("secret", {}).get("secretName", ""))
        missing = called - set(issued["spec"]["dnsNames"]) if issued is not None else set()
        if missing:
            yield f"{_name(item)}: its certificate is not for {', '.join(sorted(missing))}"


def _agreement(caller: Object, service: Object) -> Iterator[str]:
    wanted = _CALLERS.get((_part(caller), _part(service)))
    if wanted is None:
        return
    theirs, ours = _variables(service), _variables(caller)
    served = f"{_SERVER[_part(service)]}_CERTIFICATE" in theirs
    if served != (wanted[0] in ours):
        yield f"{_name(caller)}: {wanted[0]} must be set if, and only if, {_name(service)} serves TLS"
    if f"{_SERVER[_part(service)]}_CA" in theirs and wanted[1] not in ours:
        yield f"{_name(caller)}: {_name(service)} demands a certificate; {wanted[1]} is not set"


def _kinds(container: Object) -> list[str]:
    return [kind for kind in ("startupProbe", "readinessProbe", "livenessProbe") if kind in container]


def _command(probe: Object) -> list[str]:
    words: list[str] = probe.get("exec", {}).get("command", [])
    return words


def _variables(item: Object) -> set[str]:
    containers = item["spec"]["template"]["spec"]["containers"]
    return {variable["name"] for container in containers for variable in container.get("env", ())}


def _part(item: Object) -> str:
    part: str = item["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
    return part


def _name(item: Object) -> str:
    return f"Deployment/{item['metadata']['name']}"
