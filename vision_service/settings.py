"""Settings of the vision service."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from lookonce.core.rpc.server import ServerOptions
from lookonce.core.rpc.tls import Tls
from lookonce.core.settings import Bytes, BytesOrNone, Seconds, Settings, formerly
from lookonce.core.telemetry.logs import LogFormat


class VisionSettings(Settings):
    """Encode images with a checkpoint's vision tower, and keep the embeddings."""

    model_config = SettingsConfigDict(env_prefix="LOOKONCE_VISION_")

    model: str = Field(description="Checkpoint: a directory (whole or its vision half) or a hub id")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id")
    adapter: str | None = Field(None, description="LoRA adapter merged into it at start: a directory or a hub id")
    listen: str = Field("127.0.0.1:50051", description="host:port or unix:/path")
    store: str = Field("memory://", description="Store URL: memory://, file:///path, redis://host:port, ...")
    store_bytes: Bytes | None = Field(None, description="Byte budget of a memory or file store (its own default)")
    store_ttl: Seconds | None = Field(None, description="How long embeddings are kept, such as 7d (until evicted)")
    tensor_cache_bytes: BytesOrNone = Field(
        128 << 20,
        description="Bytes of memory before a store that is not memory; 0: none",
        json_schema_extra=formerly("l1_bytes"),
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Compute dtype (auto: float32 on CPUs; bfloat16 on fast GPUs, unless stored as float32).",
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="Weights of the blocks in int8; another fingerprint (see --encoder-quantization of lm_service)",
    )
    kernels: Literal["auto", "torch"] = Field(
        "auto",
        description="auto: kernels compiled at start for this CPU, where it computes in float32; torch: its own",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of the encoder (all cores)")
    min_pixels: int | None = Field(None, ge=1, description="Fewest pixels of a resized image (the checkpoint's own)")
    max_pixels: int | None = Field(
        None, ge=1, description="Most pixels of a resized image (the model's own; on a CPU fewer)"
    )
    max_image_bytes: Bytes = Field(20 << 20, description="Largest encoded image file")
    max_source_pixels: int = Field(100_000_000, ge=1, description="Most pixels of an image before resizing")
    batch_patches: int | None = Field(
        None,
        ge=1,
        description="Patches of a batch, unless one image has more; unset: 2048 on a CPU, else 16384",
    )
    batch_wait_ms: float = Field(3.0, ge=0, le=1000, description="How long an image waits for company")
    decode_workers: int = Field(2, ge=1, le=64, description="Threads that decode and resize")
    max_waiting: int = Field(256, ge=1, description="Images under way at once; more are refused (OVERLOADED)")
    queue_patches: int = Field(65536, ge=1, description="Patches waiting for a batch, beyond which decoding pauses")
    stream_window: int = Field(32, ge=1, le=1024, description="Images of one stream under way at once")
    lease_seconds: Seconds = Field(10.0, description="How long a dead process can hold up an image others ask for")
    tls_certificate: Path | None = Field(None, description="PEM certificate of this server")
    tls_key: Path | None = Field(None, description="PEM key of this server")
    tls_ca: Path | None = Field(None, description="PEM authorities whose client certificates are demanded (mTLS)")
    reflection: bool = Field(False, description="Offer gRPC reflection")
    grace: Seconds = Field(20.0, description="How long calls under way get after SIGTERM")
    linger: Seconds = Field(0.5, description="How long of it new calls are still taken, health saying NOT_SERVING")
    metrics_listen: str | None = Field(None, description="host:port or unix:/path of Prometheus metrics (off)")
    trace_endpoint: str | None = Field(
        None, description="OTLP collector that spans are sent to over gRPC, such as http://otel:4317; unset: none"
    )
    trace_share: float = Field(1.0, ge=0, le=1, description="Share of the traces begun here that are recorded")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged")
    log_format: LogFormat = Field("auto", description="auto: readable in a terminal, JSON elsewhere")

    @model_validator(mode="after")
    def _check(self) -> VisionSettings:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"--min-pixels {self.min_pixels} is above --max-pixels {self.max_pixels}")
        if bool(self.tls_certificate) != bool(self.tls_key) or (self.tls_ca and not self.tls_key):
            raise ValueError("--tls-certificate and --tls-key go together, and --tls-ca needs both")
        listen = self.metrics_listen or "unix:"
        if not (listen.startswith("unix:") or listen.rpartition(":")[2].isdigit()):
            raise ValueError(f"--metrics-listen must be host:port or unix:/path, got {listen!r}")
        return self

    @property
    def server(self) -> ServerOptions:
        """What the gRPC server needs."""
        tls = Tls(self.tls_certificate, self.tls_key, self.tls_ca)
        return ServerOptions(
            self.listen, tls, self.max_message_bytes, self.reflection, grace=self.grace, linger=self.linger
        )

    @property
    def max_message_bytes(self) -> int:
        """Of one gRPC message: the largest image, tensors and some room."""
        return max(64 << 20, self.max_image_bytes + (1 << 20))
