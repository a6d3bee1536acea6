"""Settings of `lookonce moderate`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from lookonce.core.settings import Bytes, Seconds, Settings


class ModerateSettings(Settings):
    """`lookonce moderate`: many images through a policy."""

    model_config = SettingsConfigDict(env_prefix="LOOKONCE_MODERATE_")

    policy: Path = Field(description="YAML file with the rules (docs/moderation.md).")
    out: Path = Field(description="Results: FILE.parquet, FILE.jsonl, FILE.csv, or a folder for parts.")
    format: Literal["parquet", "jsonl", "csv"] | None = Field(None, description="Of a folder's parts; unset: parquet.")
    vision: str = Field("", description="Vision services, host:port or unix:/path, comma separated.")
    lm: str = Field("", description="Language services, likewise; both unset: those of `lookonce up`.")
    data_dir: Path | None = Field(None, description="Where `lookonce up` runs; unset: its own default.")
    tls_ca: Path | None = Field(None, description="PEM certificates that the services are signed by.")
    tls_certificate: Path | None = Field(None, description="PEM certificate shown to services that ask for one.")
    tls_key: Path | None = Field(None, description="PEM key of --tls-certificate.")
    column: str | None = Field(None, description="Column of a table that holds paths, URLs or bytes; unset: by name.")
    id_column: str | None = Field(None, description="Column that names rows in the results; unset: path or number.")
    root: str = Field("", description="What relative paths in a list are relative to; unset: the list's own folder.")
    part_rows: int = Field(1000, ge=1, le=1_000_000, description="Inputs in one durable part.")
    connections: int = Field(2, ge=1, le=64, description="Connections to each vision service.")
    scores: int = Field(16, ge=1, le=1024, description="Images that each language service scores at once.")
    reproducible: bool = Field(
        True, description="Score each image so that others change nothing of it: the same scores to the last bit in "
        "every run. Off: packed with others, which can be faster on accelerators.",
    )  # fmt: skip
    under_way: int | None = Field(
        None, ge=1, le=65536, description="Images under way; unset: as many as keep the services busy."
    )
    read_threads: int = Field(8, ge=1, le=1024, description="Files read at once.")
    memory_bytes: Bytes = Field(256 << 20, description="Bytes of images held at once.")
    patience: Seconds = Field(1800.0, description="How long a service may be away before the run ends, resumably.")
    call_timeout: Seconds = Field(300.0, description="Longest that one image may take in a service.")
    fetch_networks: str = Field("", description="Networks that URLs may lead to although not public: 10.1.0.0/16,...")
    fetch_ports: str = Field("80,443", description="Ports that URLs may have, comma separated.")
    restart: bool = Field(False, description="Begin again, whatever lies at --out.")
    dry_run: bool = Field(False, description="Judge a sample, estimate the time, write nothing.")
    sample: int = Field(48, ge=1, le=10_000, description="Images in the sample of --dry-run.")
    ray: str | None = Field(None, description="Run on this Ray cluster: auto, local, host:port, ray://host:10001.")
    ray_actors: int = Field(4, ge=1, le=4096, description="Workers on the cluster.")
    progress_seconds: Seconds = Field(10.0, description="Between two lines of progress outside a terminal.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity logged.")
