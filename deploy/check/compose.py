"""Compose files: the specification's schema, our rules, and each service's settings, for every way to combine them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from deploy.check import docker
from deploy.check.settings import CLASSES, check_environment
from deploy.check.tools import is_pinned, is_shut, run

FOLDER = Path("deploy/compose")
STACKS = (
    ("compose",),
    ("compose", "gpus"),
    ("compose", "monitoring"),
    ("compose", "gpus", "monitoring"),
    ("compose", "gpus", "vllm"),
)
_VARIABLE = re.compile(r"\$\{(\w+)(:-[^}]*|:\?[^}]*)?\}")
_GIVEN = {
    "LOOKONCE_MODEL": "Qwen/Qwen2-VL-2B-Instruct",
    "LOOKONCE_GATEWAY_API_KEYS": "key",
    "GRAFANA_PASSWORD": "password",
}


def check(root: Path) -> Iterator[str]:
    """All files, alone and combined."""
    for name in sorted({name for stack in STACKS for name in stack}):
        file = FOLDER / f"{name}.yaml"
        done = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", file, root=root)
        if done.returncode:
            yield from (done.stdout + done.stderr).splitlines()
        for match in _VARIABLE.finditer((root / file).read_text()):
            if match[2] is None:
                yield f"{file}: {match[0]} may be unset: give a default (:-) or demand it (:?)"
            elif match[2].startswith(":?") and match[1] not in _GIVEN:
                yield f"{file}: {match[0]}: a variable that must be set, unknown to this check"
    for stack in STACKS:
        yield from _rules(root, " + ".join(stack), merged(root, stack))


def merged(root: Path, stack: tuple[str, ...]) -> dict[str, Any]:
    """The files of a stack as one, variables filled in."""
    whole: dict[str, Any] = {}
    for name in stack:
        whole = _merge(whole, _filled(yaml.safe_load((root / FOLDER / f"{name}.yaml").read_text())))
    return whole


def _merge(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {key: _merge(below.get(key), above.get(key)) for key in below | above}
    if isinstance(below, list) and isinstance(above, list):
        return below + above
    return copy.deepcopy(below if above is None else above)


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item) for item in value]
    if isinstance(value, str):
        return _VARIABLE.sub(lambda m: _GIVEN.get(m[1]) or (m[2] or "")[2:] * (m[2] or "").startswith(":-"), value)
    return value


def _rules(root: Path, where: str, stack: dict[str, Any]) -> Iterator[str]:
    services = stack["services"]
    for name, service in services.items():
        at = f"deploy/compose ({where}): {name}"
        if not is_pinned(service.get("image", "")):
            yield f"{at}: image {service.get('image')!r} is not pinned to a version"
        if is_shut(service.get("command", ())):
            yield f"{at}: --protected-mode no must be said: else it depends on the image whether others are admitted"
        yield from _hardening(at, service)
        yield from _mounts(root, at, service, stack.get("volumes", {}))
        yield from _needs(root, at, service, services)
        for network in service.get("networks", ()):
            if network not in stack["networks"]:
                yield f"{at}: network {network} is not there"
        if name in CLASSES:
            given = docker.environment(root, name) | service.get("environment", {})
            yield from check_environment(at, name, given)
            yield from _addresses(at, given, services)


def _hardening(at: str, service: dict[str, Any]) -> Iterator[str]:
    if service.get("read_only") is not True:
        yield f"{at}: its root must be read-only"
    if service.get("cap_drop") != ["ALL"] or "no-new-privileges:true" not in service.get("security_opt", ()):
        yield f"{at}: must drop all capabilities and gain none"
    if service.get("privileged") or service.get("network_mode") == "host":
        yield f"{at}: must not be privileged or on the host's network"
    for port in service.get("ports", ()):
        if not str(port).startswith("127.0.0.1:"):
            yield f"{at}: port {port} must be published on 127.0.0.1 unless asked otherwise"


def _mounts(root: Path, at: str, service: dict[str, Any], volumes: dict[str, Any]) -> Iterator[str]:
    for mount in service.get("volumes", ()):
        source = mount.split(":")[0]
        if source.startswith(".") and not (root / FOLDER / source).exists():
            yield f"{at}: {source} is not there"
        elif not source.startswith((".", "/")) and source not in volumes:
            yield f"{at}: volume {source} is not declared"


def _needs(root: Path, at: str, service: dict[str, Any], services: dict[str, Any]) -> Iterator[str]:
    for needed in service.get("depends_on", {}):
        build = services.get(needed, {}).get("build")
        if needed not in services:
            yield f"{at}: needs {needed}, which is not there"
        elif "healthcheck" not in services[needed] and not build:
            yield f"{at}: waits for the health of {needed}, which has no health check"
    if "build" in service and not (root / service["build"]["dockerfile"]).is_file():
        yield f"{at}: {service['build']['dockerfile']} is not there"


def _addresses(at: str, environment: dict[str, str], services: dict[str, Any]) -> Iterator[str]:
    for name, value in environment.items():
        if name.startswith("LOOKONCE_") and name.endswith(("_VISION", "_LM", "_STORE")):
            for host in re.findall(r"(?:^|//|,)([a-z][a-z0-9-]*):\d+", str(value)):
                if host not in services:
                    yield f"{at}: {name} names {host}, which is not there"
