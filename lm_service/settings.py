"""Settings of the language service: every field is a flag, an environment variable and a line of --help."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from lookonce.core.identity import WEIGHTS_DIGEST
from lookonce.core.rpc.server import ServerOptions
from lookonce.core.rpc.tls import Tls
from lookonce.core.settings import Bytes, Seconds, Settings, formerly
from lookonce.core.telemetry.logs import LogFormat
from lookonce.core.units import split_list


class LanguageSettings(Settings):
    """The language service: text and image references in, answers out. Loads no vision weight."""

    model_config = SettingsConfigDict(env_prefix="LOOKONCE_LM_")

    model: str = Field(description="Checkpoint: local directory (whole or language half) or hub id.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    adapter: str | None = Field(None, description="LoRA adapter merged into it at start: local directory or hub id.")
    listen: str = Field("127.0.0.1:50052", description="host:port (port 0: any free one) or unix:/path.")
    store: str = Field("memory://", description="Where the vision service puts embeddings: file:///path, redis://...")
    store_bytes: Bytes | None = Field(None, description="Byte budget of memory and file stores.")
    store_ttl: Seconds | None = Field(None, description="How long the store keeps an embedding it is given back.")
    vision: str = Field("", description="Vision services, comma separated, asked for what the store has lost.")
    encoder_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Compute dtype of the encoders whose embeddings are accepted (auto: any of the three)."
    )
    engine: str = Field(
        "auto",
        description="auto (packed; plain for a model that can't be run packed), packed, plain (one request at a time), "
        "or the name of an installed engine.",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 ...")
    device_map: str | None = Field(
        None,
        description="Layers over several devices, instead of device: auto (all GPUs, by free memory), cuda:0,cuda:1, "
        "or with their layers cuda:0=0-39,cuda:1=40-79; unset: one device.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Compute dtype (auto: float32 on CPUs; bfloat16 on fast GPUs, unless stored as float32).",
    )
    quantization: Literal["none", "int8"] = Field(
        "none", description="Weights of the layers in int8: half to a quarter of the memory, answers nearly the same."
    )
    encoder_quantization: Literal["none", "int8"] = Field(
        "none", description="Quantization of the encoders whose embeddings are accepted."
    )
    encoder_weights: str | None = Field(
        None,
        pattern=f"^{WEIGHTS_DIGEST}$",
        description="Digest of the weights of the encoders whose embeddings are accepted, as `lookonce split` shows "
        "it: blake3:...; unset: those of this checkpoint.",
    )
    kernels: Literal["auto", "torch"] = Field(
        "auto",
        description="auto: kernels compiled at start for this CPU, where it computes in float32; torch: its own.",
    )
    self_check: Literal["on", "off"] = Field(
        "on", description="on: serve only what equals the weights' plain form, or their record, on a small question."
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of the model; unset: torch's choice.")
    tensor_cache_bytes: Bytes = Field(
        256 << 20, description="Embeddings kept on the device.", json_schema_extra=formerly("l1_bytes")
    )
    kv_bytes: Bytes | None = Field(
        None, description="KV of answers under way, beyond shared prefixes; unset: a quarter of the free memory."
    )
    prefix_bytes: Bytes | None = Field(
        None, description="KV of image and text prefixes, kept between requests; unset: a quarter of the free memory."
    )
    max_running: int = Field(128, ge=1, le=4096, description="Answers decoded at once.")
    max_waiting: int = Field(1024, ge=1, le=100_000, description="Requests that may wait; more are refused at once.")
    step_seconds: Seconds = Field(
        1.0, description="Longest a step should take: long prompts are cut so that others' tokens need not wait longer."
    )
    context_length: int | None = Field(None, ge=16, description="Most tokens of prompt and answer; unset: the model's.")
    generation_config: Literal["auto", "none"] = Field(
        "auto",
        description="Sampling parameters that a request leaves out: auto (the checkpoint's generation_config.json), "
        "none (greedy).",
    )
    max_tokens: int = Field(8192, ge=1, description="Most tokens of one answer, and how many when none is asked for.")
    max_images: int = Field(64, ge=1, le=4096, description="Most images in one prompt.")
    max_timeout: Seconds = Field(600.0, description="Longest a request may take.")
    fetch_timeout: Seconds = Field(15.0, description="Longest a fetch from a vision service may take.")
    tls_certificate: Path | None = Field(None, description="PEM certificate of this service.")
    tls_key: Path | None = Field(None, description="PEM key of this service.")
    tls_ca: Path | None = Field(None, description="PEM certificates that clients must be signed by (mTLS).")
    vision_tls_ca: Path | None = Field(None, description="PEM certificates that vision services are signed by.")
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

    @property
    def vision_addresses(self) -> tuple[str, ...]:
        """The vision services, in the order they are asked."""
        return split_list(self.vision)

    @property
    def server(self) -> ServerOptions:
        """What the gRPC server needs."""
        tls = Tls(self.tls_certificate, self.tls_key, self.tls_ca)
        return ServerOptions(self.listen, tls=tls, reflection=self.reflection, grace=self.grace, linger=self.linger)

    @property
    def vision_tls(self) -> Tls | None:
        """How vision services are called: this service's own certificate is shown to them when they ask."""
        return Tls(self.tls_certificate, self.tls_key, self.vision_tls_ca) if self.vision_tls_ca else None
