"""From the settings of `lookonce up` to the command lines of the three services.

A service's value comes from, in this order: a flag of `up`, the service's own variable (LOOKONCE_VISION_DEVICE), the
general variable (LOOKONCE_DEVICE), the default of `up`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import quote

from lookonce.cli.health import GrpcProbe, HttpProbe
from lookonce.cli.model import BUNDLED, BUNDLED_POLICY, Model
from lookonce.cli.network import base_url, take_port
from lookonce.cli.rundir import DataDirectory
from lookonce.cli.supervisor import ServicePlan
from lookonce.cli.up import UpSettings
from lookonce.cli.vllm_environment import vllm_python
from lookonce.core.errors import invalid

PREFIXES = {"vision": "LOOKONCE_VISION_", "language": "LOOKONCE_LM_", "gateway": "LOOKONCE_GATEWAY_"}


@dataclass(frozen=True)
class SystemPlan:
    """The services, those that send requests first, and the URL of the gateway."""

    services: list[ServicePlan]
    url: str


class Arguments:
    """Builds one service's arguments, leaving a setting to the service's own variable where that one decides."""

    def __init__(self, prefix: str, settings: UpSettings, given: set[str], environment: Mapping[str, str]) -> None:
        self._prefix = prefix
        self._settings = settings
        self._given = given
        self._environment = environment
        self.values: list[str] = []

    def always(self, name: str, value: str) -> None:
        """A value that `up` alone decides."""
        self.values += [_flag(name), value]

    def own(self, name: str) -> str | None:
        """The service's own variable."""
        return self._environment.get(f"{self._prefix}{name.upper()}") or None

    def offer(self, name: str, *sources: str, default: Any = None) -> None:
        """`sources` are fields of UpSettings, the most specific first; `default` serves when none has a value."""
        value = next((v for s in sources if s in self._given and (v := getattr(self._settings, s)) is not None), None)
        if value is None and self.own(name) is not None:
            return
        if value is None:
            value = next((v for s in sources if (v := getattr(self._settings, s)) is not None), default)
        if value is not None:
            self.values += [_flag(name), str(value)]


def plan_system(
    settings: UpSettings,
    given: set[str],
    directory: DataDirectory,
    model: Model,
    environment: Mapping[str, str] | None = None,
) -> SystemPlan:
    """Addresses, arguments and probes of the three services, in the order in which they are drained."""
    environment = os.environ if environment is None else environment
    _refuse_own_doors(environment)
    vision_at, language_at = (
        directory.socket_address(name) or f"127.0.0.1:{take_port()}" for name in ("vision", "language")
    )
    child_environment = {**environment, "LOOKONCE_UP": "1", "PYTHONUNBUFFERED": "1"}
    store = f"file://{quote(str(directory.store))}"

    def arguments(name: str) -> Arguments:
        built = Arguments(PREFIXES[name], settings, given, environment)
        built.offer("store", "store", default=store)
        built.offer("log_level", "log_level")
        built.offer("log_format", default="json")
        return built

    def model_service(name: str, module: str, address: str, part: str) -> tuple[Arguments, ServicePlan]:
        built = arguments(name)
        built.always("model", model.source)
        if model.revision is not None:
            built.always("revision", model.revision)
        if model.adapter is not None:
            built.always("adapter", model.adapter)
        built.always("listen", address)
        if part == "lm" and settings.lm_device_map is not None and "lm_device" not in given:
            built.always("device", "auto")  # what is said of both is the vision service's alone
        else:
            built.offer("device", f"{part}_device", "device")
        built.offer("dtype", f"{part}_dtype", "dtype")
        built.offer("quantization", f"{part}_quantization")
        built.offer("threads", f"{part}_threads", "threads")
        built.offer("tensor_cache_bytes", f"{part}_tensor_cache_bytes")
        built.offer("store_bytes", "store_bytes")
        built.offer("grace", "grace")
        metrics = built.own("metrics_listen") or directory.socket_address(f"{name}-metrics")
        if metrics is not None:
            built.always("metrics_listen", metrics)
        probe = partial(GrpcProbe, address)
        plan = ServicePlan(name, module, built.values, child_environment, address, probe, metrics)
        return built, plan

    vision_arguments, vision = model_service("vision", "vision_service", vision_at, "vision")
    vision_arguments.offer("max_pixels", "max_pixels")
    language_arguments, language = model_service("language", "lm_service", language_at, "lm")
    encoders = vision_arguments.own("quantization")  # what the vision service goes by when no flag says otherwise
    language_arguments.offer("encoder_quantization", "vision_quantization", default=encoders)
    language_arguments.offer("device_map", "lm_device_map")
    language_arguments.offer("generation_config", "generation_config")
    language_arguments.offer("kv_bytes", "lm_kv_bytes")
    language_arguments.offer("prefix_bytes", "lm_prefix_bytes")
    language_arguments.always("vision", vision_at)
    for name in ("engine", "tensor_parallel", "pipeline_parallel", "gpu_memory_share", "engine_args"):
        language_arguments.offer(name, name)
    if (settings.engine if "engine" in given else language_arguments.own("engine") or settings.engine) == "vllm":
        language = replace(language, python=str(vllm_python(settings.vllm_python, environment)))

    gateway_arguments = arguments("gateway")
    host, port = _gateway_address(gateway_arguments, settings, given)
    gateway_arguments.always("host", host)
    gateway_arguments.always("port", str(port))
    gateway_arguments.always("vision", vision_at)
    gateway_arguments.always("lm", language_at)
    gateway_arguments.offer("data_dir", default=directory.path / "gateway")
    gateway_arguments.offer("policy", default=BUNDLED_POLICY if model.source == str(BUNDLED) else None)
    gateway_arguments.offer("image_ttl", "image_ttl")
    gateway_arguments.offer("drain_grace", "grace")
    url = base_url(host, port, tls=gateway_arguments.own("tls_certificate") is not None)
    gateway = ServicePlan(
        "gateway", "gateway", gateway_arguments.values, child_environment, url, lambda: HttpProbe(url)
    )
    return SystemPlan([gateway, language, vision], url)


def _refuse_own_doors(environment: Mapping[str, str]) -> None:
    """Services of `up` meet on private sockets; variables that would lock or move those doors are errors."""
    names = [f"LOOKONCE_{part}_TLS_{what}" for part in ("VISION", "LM") for what in ("CERTIFICATE", "KEY", "CA")]
    for name in (*names, "LOOKONCE_GATEWAY_UDS"):
        if environment.get(name):
            raise invalid(f"{name} is for services started one by one; unset it for `lookonce up`", param=name)


def _gateway_address(arguments: Arguments, settings: UpSettings, given: set[str]) -> tuple[str, int]:
    general = settings.model_fields_set
    host = settings.host if "host" in given else arguments.own("host") or settings.host
    if "port" in given or ("port" in general and arguments.own("port") is None):
        port = settings.port
    else:
        port = int(arguments.own("port") or settings.port)
    return host, port or take_port(host)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
