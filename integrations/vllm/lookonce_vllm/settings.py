"""What the connector is told: `ec_connector_extra_config` of vLLM's `--ec-transfer-config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Settings(BaseModel):
    """Each field is a key of `ec_connector_extra_config`."""

    model_config = ConfigDict(extra="forbid")

    store: str = Field(description="URL of the store that the vision services write to: redis://host:port ...")
    fingerprint: str | None = Field(
        None, pattern=r"[0-9a-f]{64}", description="Of the encoder; embeddings of another are refused. None: of any."
    )
    vision: tuple[str, ...] = Field(
        (),
        description="gRPC addresses of vision services that are asked for what the store has lost: [HOST:PORT, ...].",
    )
    wait_s: float = Field(5.0, ge=0, le=600, description="Seconds that a request waits for an embedding to be stored.")
    only_references: bool = Field(
        True,
        description="Refuse requests that bring pixels or rows. vLLM takes a uuid's word for what an image is: one who "
        "brings rows under another image's key has them answer for it.",
    )
    shelf_bytes: int = Field(2 << 30, ge=1 << 20, description="Of rows kept in shared memory beside those in use.")
    shelf: Path = Field(Path("/dev/shm"), description="Directory, in memory, that all of a server's processes share.")


def read_settings(extra: dict[str, Any]) -> Settings:
    """Raises ValueError that names the key at fault."""
    try:
        return Settings.model_validate(extra)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"ec_connector_extra_config: {where}: {first['msg']}") from None
