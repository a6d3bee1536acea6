"""Settings that the two model services have alike."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from lookonce.core.rpc.messages import DEFAULT_MAX_MESSAGE_BYTES
from lookonce.core.rpc.server import ServerOptions
from lookonce.core.rpc.tls import Tls
from lookonce.core.settings import Bytes, Seconds, Settings
from lookonce.core.telemetry.logs import LogFormat


class ModelServiceSettings(Settings):
    """Which checkpoint a service runs and how, where its store is, and how it is reached and watched.

    A service adds its own settings, and says of `listen`, `store` and `quantization` what they are for it.
    """

    model: str = Field(description="Checkpoint: local directory (whole, or the service's half) or hub id.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    adapter: str | None = Field(None, description="LoRA adapter merged into it at start: local directory or hub id.")
    listen: str  # given a default, and its words, by the service; so is the next
    store: str
    store_bytes: Bytes | None = Field(None, description="Byte budget of a memory or file store; unset: its own.")
    store_ttl: Seconds | None = Field(
        None, description="How long embeddings are kept, such as 7d; unset: until evicted."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Compute dtype (auto: float32 on CPUs; bfloat16 on fast GPUs, unless stored as float32).",
    )
    quantization: Literal["none", "int8"] = "none"
    kernels: Literal["auto", "torch"] = Field(
        "auto",
        description="auto: kernels compiled at start for this CPU, where it computes in float32; torch: its own.",
    )
    self_check: Literal["on", "off"] = Field(
        "on", description="on: serve only what equals the weights' plain form, or their record, on a small input."
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of the model; unset: torch's choice.")
    tls_certificate: Path | None = Field(None, description="PEM certificate of this service.")
    tls_key: Path | None = Field(None, description="PEM key of this service.")
    tls_ca: Path | None = Field(None, description="PEM certificates that clients must be signed by (mTLS).")
    reflection: bool = Field(False, description="Offer gRPC reflection.")
    grace: Seconds = Field(20.0, description="How long calls under way may go on after SIGTERM.")
    linger: Seconds = Field(0.5, description="How long of it new calls are still taken, health saying NOT_SERVING.")
    metrics_listen: str | None = Field(None, description="host:port or unix:/path for Prometheus; unset: none.")
    trace_endpoint: str | None = Field(
        None, description="OTLP collector that spans are sent to over gRPC, such as http://otel:4317; unset: none."
    )
    trace_share: float = Field(1.0, ge=0, le=1, description="Share of the traces begun here that are recorded.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity logged.")
    log_format: LogFormat = Field("auto", description="auto, console or json.")

    @model_validator(mode="after")
    def _check_doors(self) -> ModelServiceSettings:
        if bool(self.tls_certificate) != bool(self.tls_key) or (self.tls_ca and not self.tls_key):
            raise ValueError("--tls-certificate and --tls-key go together, and --tls-ca needs both")
        listen = self.metrics_listen or "unix:"
        if not (listen.startswith("unix:") or listen.rpartition(":")[2].isdigit()):
            raise ValueError(f"--metrics-listen must be host:port or unix:/path, got {listen!r}")
        return self

    @property
    def max_message_bytes(self) -> int:
        """Of one gRPC message."""
        return DEFAULT_MAX_MESSAGE_BYTES

    @property
    def server(self) -> ServerOptions:
        """What the gRPC server needs."""
        tls = Tls(self.tls_certificate, self.tls_key, self.tls_ca)
        return ServerOptions(
            self.listen, tls, self.max_message_bytes, self.reflection, grace=self.grace, linger=self.linger
        )
