"""Settings of the language service: every field is a flag, an environment variable and a line of --help."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from lookonce.core.identity import WEIGHTS_DIGEST
from lookonce.core.rpc.tls import Tls
from lookonce.core.service_settings import ModelServiceSettings
from lookonce.core.settings import Bytes, Seconds, formerly
from lookonce.core.units import split_list
from lookonce.models.vector_layout import Task


class LanguageSettings(ModelServiceSettings):
    """The language service: text and image references in, answers out. Loads no vision weight."""

    model_config = SettingsConfigDict(env_prefix="LOOKONCE_LM_")

    listen: str = Field("127.0.0.1:50052", description="host:port (port 0: any free one) or unix:/path.")
    store: str = Field("memory://", description="Where the vision service puts embeddings: file:///path, redis://...")
    vision: str = Field("", description="Vision services, comma separated, asked for what the store has lost.")
    task: Task = Field(
        "auto",
        description="generate: write text; embed: make vectors for /v1/embeddings; auto: as its files say.",
    )
    encoder_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Compute dtype of the encoders whose embeddings are accepted (auto: any of the three)."
    )
    engine: str = Field(
        "auto",
        description="auto (vllm on CUDA where it is installed, else packed; plain for a model that can't be packed), "
        "packed, plain (one request at a time), vllm, or the name of an installed engine.",
    )
    tensor_parallel: int = Field(1, ge=1, description="With vllm: GPUs (or CPU processes) that share each layer.")
    pipeline_parallel: int = Field(1, ge=1, description="With vllm: groups of GPUs that the layers are dealt out to.")
    gpu_memory_share: float = Field(
        0.9,
        gt=0,
        le=1,
        description="With vllm: share of a GPU that it may fill; kv_bytes and prefix_bytes overrule it.",
    )
    engine_args: str | None = Field(
        None, description='With vllm: further arguments of its engine, as JSON: {"enforce_eager": true}.'
    )
    device_map: str | None = Field(
        None,
        description="Layers over several devices, instead of device: auto (all GPUs, by free memory), cuda:0,cuda:1, "
        "or with their layers cuda:0=0-39,cuda:1=40-79; unset: one device.",
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
    vision_tls_ca: Path | None = Field(None, description="PEM certificates that vision services are signed by.")

    @property
    def vision_addresses(self) -> tuple[str, ...]:
        """The vision services, in the order they are asked."""
        return split_list(self.vision)

    @property
    def vision_tls(self) -> Tls | None:
        """How vision services are called: this service's own certificate is shown to them when they ask."""
        return Tls(self.tls_certificate, self.tls_key, self.vision_tls_ca) if self.vision_tls_ca else None
