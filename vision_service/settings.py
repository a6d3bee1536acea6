"""Settings of the vision service."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from lookonce.core.service_settings import ModelServiceSettings
from lookonce.core.settings import Bytes, BytesOrNone, Seconds, formerly


class VisionSettings(ModelServiceSettings):
    """Encode images with a checkpoint's vision tower, and keep the embeddings."""

    model_config = SettingsConfigDict(env_prefix="LOOKONCE_VISION_")

    listen: str = Field("127.0.0.1:50051", description="host:port or unix:/path")
    store: str = Field("memory://", description="Store URL: memory://, file:///path, redis://host:port, ...")
    tensor_cache_bytes: BytesOrNone = Field(
        128 << 20,
        description="Bytes of memory before a store that is not memory; 0: none",
        json_schema_extra=formerly("l1_bytes"),
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="Weights of the blocks in int8; another fingerprint (see --encoder-quantization of lm_service)",
    )
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

    @model_validator(mode="after")
    def _check(self) -> VisionSettings:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"--min-pixels {self.min_pixels} is above --max-pixels {self.max_pixels}")
        return self

    @property
    def max_message_bytes(self) -> int:
        """Of one gRPC message: the largest image, tensors and some room."""
        return max(64 << 20, self.max_image_bytes + (1 << 20))
