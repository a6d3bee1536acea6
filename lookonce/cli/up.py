"""`lookonce up`: the three processes as one system on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from lookonce.cli.console import fail, note, say
from lookonce.cli.rundir import DataDirectory, RunningSystem, default_data_dir
from lookonce.core.errors import LookonceError
from lookonce.core.settings import Bytes, BytesOrNone, Seconds, Settings, formerly, load

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

HELP = """Start the vision service, the language service and the gateway, and keep them running.

\b
  lookonce up                                         the bundled shapes model, for a first look
  lookonce up --model Qwen/Qwen2-VL-2B-Instruct       from the hub (only once)
  lookonce up --model ./my-finetune --port 9000
  lookonce up --model ./m --vision-device cuda:0 --lm-device cuda:1 --store redis://localhost:6379
  lookonce up --model ./m --engine vllm --tensor-parallel 2     language half by vLLM, in its own environment

Prints a line at each change of state and the URL when everything is ready. A process that dies is started again.
SIGTERM or Ctrl-C drains and ends; a second one ends at once.

Every setting of the services can be given through its variable too: LOOKONCE_VISION_..., LOOKONCE_LM_...,
LOOKONCE_GATEWAY_... (docs/settings.md lists them). A flag given here wins over them.
"""


class UpSettings(Settings):
    """`lookonce up`: all three processes on this machine, supervised."""

    model_config = SettingsConfigDict(env_prefix="LOOKONCE_")

    model: str | None = Field(None, description="Checkpoint: local directory or hub id; unset: the bundled one.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    adapter: str | None = Field(None, description="LoRA adapter merged into it at start: local directory or hub id.")
    host: str = Field("127.0.0.1", description="Address the gateway listens on; a public one needs API keys.")
    port: int = Field(8000, ge=0, le=65535, description="Port the gateway listens on; 0: any free one.")
    data_dir: Path | None = Field(
        None, description="Embedded store, logs and sockets; unset: $XDG_DATA_HOME/lookonce or ~/.local/share/lookonce."
    )
    store: str | None = Field(
        None, description="Store of embeddings and images: redis://..., file:///path; unset: file://DATA_DIR/store."
    )
    device: str = Field("auto", description="Device of both models: auto, cpu, cuda, cuda:1 ...")
    vision_device: str | None = Field(None, description="Device of the vision service; unset: --device.")
    lm_device: str | None = Field(None, description="Device of the language service; unset: --device.")
    lm_device_map: str | None = Field(
        None,
        description="Devices over which the language service's layers are spread, instead of --lm-device: auto, "
        "cuda:0,cuda:1 or cuda:0=0-39,cuda:1=40-79; unset: one device.",
    )
    dtype: Dtype = Field(
        "auto",
        description="Compute dtype of both (auto: float32 on CPUs, bfloat16 on fast GPUs, unless stored in float32).",
    )
    vision_dtype: Dtype | None = Field(None, description="Compute dtype of the vision service; unset: --dtype.")
    lm_dtype: Dtype | None = Field(None, description="Compute dtype of the language service; unset: --dtype.")
    vision_quantization: Literal["none", "int8"] | None = Field(
        None, description="Weights of the vision service: none or int8; unset: none."
    )
    lm_quantization: Literal["none", "int8"] | None = Field(
        None, description="Weights of the language service: none or int8; unset: none."
    )
    generation_config: Literal["auto", "none"] | None = Field(
        None,
        description="Sampling parameters that a request leaves out: auto (the checkpoint's generation_config.json) or "
        "none (greedy); unset: auto.",
    )
    engine: str | None = Field(
        None, description="Engine of the language service: auto, packed, plain or vllm (in its own environment)."
    )
    vllm_python: Path | None = Field(
        None,
        description="Python of the environment that vLLM is in; unset: this one if vLLM is here, else VENV_VLLM or "
        ".venv-vllm, which scripts/setup_vllm.sh makes.",
    )
    tensor_parallel: int | None = Field(None, ge=1, description="With vllm: GPUs that share each layer; unset: 1.")
    pipeline_parallel: int | None = Field(
        None, ge=1, description="With vllm: groups of GPUs that the layers are dealt out to; unset: 1."
    )
    gpu_memory_share: float | None = Field(
        None, gt=0, le=1, description="With vllm: share of a GPU that it may fill; unset: 0.9."
    )
    engine_args: str | None = Field(
        None, description='With vllm: further arguments of its engine, as JSON: {"enforce_eager": true}.'
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of each model; unset: torch's choice.")
    vision_threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of the vision service; unset: --threads."
    )
    lm_threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of the language service; unset: --threads."
    )
    vision_tensor_cache_bytes: BytesOrNone | None = Field(
        None,
        description="Embeddings the vision service keeps in its own memory, 0: none; unset: 128 MiB.",
        json_schema_extra=formerly("vision_l1_bytes"),
    )
    lm_tensor_cache_bytes: Bytes | None = Field(
        None,
        description="Embeddings the language service keeps on its device; unset: 256 MiB.",
        json_schema_extra=formerly("lm_l1_bytes"),
    )
    lm_kv_bytes: Bytes | None = Field(
        None, description="KV of answers under way, beyond shared prefixes; unset: a quarter of the free memory."
    )
    lm_prefix_bytes: Bytes | None = Field(
        None, description="KV of image and text prefixes kept between requests; unset: a quarter of the free memory."
    )
    max_pixels: int | None = Field(
        None, ge=1, description="Most pixels an image is resized to; unset: the model's own, on a CPU fewer."
    )
    store_bytes: Bytes | None = Field(None, description="Byte budget of the embedding store; unset: the store's own.")
    image_ttl: Seconds = Field(7 * 86400.0, description="How long an image is kept after its last upload.")
    grace: Seconds = Field(20.0, description="How long requests under way may go on after SIGTERM, in each process.")
    start_attempts: int = Field(
        3, ge=1, le=100, description="Failures in a row of a service that was never ready, after which `up` gives up."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity logged.")
    show_logs: bool = Field(False, description="Print every log line of the services, not only warnings.")

    @property
    def directory(self) -> Path:
        return self.data_dir or default_data_dir()


def up(flags: dict[str, Any]) -> int:
    """Check what can be checked first, then supervise until told to end. `flags`: None where not given."""
    from lookonce.cli.model import resolve_model
    from lookonce.cli.network import check_port_free

    settings = load(UpSettings, flags)
    given = {name for name, value in flags.items() if value is not None}
    try:
        with DataDirectory(settings.directory) as directory:
            model = resolve_model(settings.model, settings.revision, settings.adapter)
            check_port_free(settings.host, settings.port)
            return asyncio.run(_supervise(settings, given, directory, model))
    except LookonceError as error:
        for line in getattr(error, "lines", ()):
            note(f"  {line}")
        fail(error.message)


async def _supervise(settings: UpSettings, given: set[str], directory: DataDirectory, model: Any) -> int:
    from lookonce.cli.supervisor import RestartPolicy, Service, Supervisor
    from lookonce.cli.system_plan import plan_system
    from lookonce.models.family import served_plain

    system = plan_system(settings, given, directory, model)
    report = Reporter([plan.name for plan in system.services])
    policy = RestartPolicy(start_attempts=settings.start_attempts)
    services: list[Service] = []

    def publish() -> None:
        ready = bool(services) and all(service.ready.is_set() for service in services)
        state = {
            s.plan.name: {"address": s.plan.address, "metrics": s.plan.metrics, "pid": s.pid, "state": s.state}
            for s in services
        }
        with contextlib.suppress(OSError):  # on a full disk other commands see an older state
            directory.write_up_file(RunningSystem(os.getpid(), system.url, model.name, ready, state))

    def changed(name: str, text: str) -> None:
        report(name, text)
        publish()

    for plan in system.services:
        log_file = directory.log / f"{plan.name}.log"
        services.append(Service(plan, log_file, changed, report, policy=policy, show_logs=settings.show_logs))
    note(f"lookonce: {model.name} from {model.source}; data in {directory.path}")
    if model.unpacked is not None:
        note(f"lookonce: {served_plain(model.unpacked)}")
    publish()
    supervisor = Supervisor(services, grace=settings.grace, on_ready=lambda: say(f"lookonce is ready: {system.url}"))
    return await supervisor.run()


class Reporter:
    """Prints one line per change of state: seconds since the start, service, what happened."""

    def __init__(self, names: Sequence[str]) -> None:
        self._width = max(map(len, names))
        self._start = time.monotonic()

    def __call__(self, name: str, text: str) -> None:
        note(f"{time.monotonic() - self._start:7.1f}s  {name:<{self._width}}  {text}")
