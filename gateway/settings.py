"""What the gateway can be told: addresses, limits, keys. Every limit has a name, a default and a variable."""

from __future__ import annotations

from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from gateway.auth import Quota
from gateway.json_text import JsonLimits
from gateway.routing.replicas import split_targets
from gateway.routing.variants import DEFAULT, EMBED, VariantSpec, parse_variants, read_variants
from lookonce.core.errors import LookonceError
from lookonce.core.http_fetch.fetch_policy import FetchMode, FetchPolicy, parse_hosts, parse_networks, parse_ports
from lookonce.core.rpc.tls import Tls
from lookonce.core.settings import Bytes, Seconds, Settings
from lookonce.core.telemetry.logs import LogFormat
from lookonce.core.units import split_list


class GatewaySettings(Settings):
    """The gateway: the public REST API in front of the vision and language services."""

    model_config = SettingsConfigDict(env_prefix="LOOKONCE_GATEWAY_")

    host: str = Field("127.0.0.1", description="address to listen on; a public one needs API keys")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    uds: Path | None = Field(None, description="listen on this unix socket instead of host and port")
    vision: str = Field(
        "127.0.0.1:50051",
        description="addresses of vision services, separated by commas; dns://NAME:PORT: every address the name has",
    )
    lm: str = Field("127.0.0.1:50052", description="addresses of language services, likewise")
    dns_interval: Seconds = Field(10.0, gt=0, description="time between two look-ups of the names in dns:// addresses")
    variants: str = Field(
        "",
        description="versions of the model side by side, instead of --vision and --lm: "
        "NAME weight=N vision=ADDRESS,... lm=ADDRESS,... separated by semicolons",
    )
    variants_file: Path | None = Field(
        None, description="file with one such variant on each line; what changes in it holds within seconds"
    )
    embed_lm: str = Field(
        "",
        description="addresses of language services of an embedding model, beside the model that writes text; "
        "in --variants write task=embed instead; empty: --lm answers /v1/embeddings, if its model makes vectors",
    )
    embed_vision: str = Field("", description="addresses of its vision services; empty: those of --vision")
    embed_model_name: str = Field(
        "", description="names of the embedding model in the API, separated by commas; empty: that of the checkpoint"
    )
    model_name: str = Field(
        "",
        description="names of the model in the API, separated by commas; receipts show the first; "
        "empty: that of the checkpoint",
    )

    store: str = Field(
        "memory://", description="where image files are kept: memory://, file:///path, redis://host:port"
    )
    store_bytes: Bytes = Field(1 << 30, description="budget of kept image files")
    pinned_bytes: Bytes = Field(1 << 30, description="budget of pinned image files, beside the other; not for Redis")
    image_ttl: Seconds = Field(7 * 86400.0, description="how long an image is kept after its last upload")
    response_ttl: Seconds = Field(86400.0, description="how long a response is kept for a next turn (`store`)")
    max_image_ttl: Seconds = Field(366 * 86400.0, description="longest time that a client may have an image kept for")
    pinning: bool = Field(True, description="let clients pin images: kept until erased")
    share_embeddings: bool = Field(False, description="let tenants share embeddings of equal files")
    share_prefixes: bool = Field(
        False, description="let tenants share KV of equal prompts: cached_tokens and timing then tell what others asked"
    )
    secret: SecretStr = Field(
        SecretStr(""), description="secret of tenants' image ids and of what keeps their KV apart"
    )

    max_image_bytes: Bytes = Field(20 << 20, description="largest image file")
    max_body_bytes: Bytes = Field(64 << 20, description="largest request body")
    max_images: int = Field(32, ge=1, description="most images in one request")
    max_request_image_bytes: Bytes = Field(48 << 20, description="most bytes of image files in one request")
    max_questions: int = Field(1000, ge=1, description="most questions in one request")
    max_choices: int = Field(64, ge=1, description="most choices of one question")
    max_inputs: int = Field(1024, ge=1, description="most inputs or documents of one request for vectors or ranks")
    max_searched: int = Field(1000, ge=1, le=10_000, description="most kept images that one search looks at")
    max_n: int = Field(16, ge=1, description="most answers to one prompt")
    max_text_chars: int = Field(1_000_000, ge=1, description="most characters of text in one request")
    max_json_depth: int = Field(32, ge=4, description="most lists and objects within each other in a JSON body")
    max_json_items: int = Field(100_000, ge=1, description="most values in all lists and objects of a JSON body")
    max_json_keys: int = Field(256, ge=1, description="most fields of one object in a JSON body")
    max_json_number: int = Field(64, ge=20, description="most characters of a number in a JSON body")
    image_first: bool = Field(
        False, description="lay images of a chat's only user turn before its text, unless the request says otherwise"
    )
    low_detail_pixels: int = Field(
        200_704, ge=3136, description='pixels an image of detail "low" is resized to at most'
    )

    max_concurrency: int = Field(1024, ge=1, description="requests worked on at once; more are answered 429")
    tenant_concurrency: int | None = Field(
        None,
        ge=0,
        description="requests at once of one tenant; unset: half of --max-concurrency where there are several tenants; "
        "0: no limit",
    )
    max_connections: int = Field(
        4096, ge=1, description="connections at once; for one more the client that was silent for longest loses its own"
    )
    max_pipelined: int = Field(16, ge=1, description="most requests sent on one connection before an earlier answer")
    max_header_bytes: Bytes = Field(32 << 10, description="largest request line and headers together")
    header_timeout: Seconds = Field(10.0, gt=0, description="longest time for a request's headers to come")
    body_timeout: Seconds = Field(30.0, gt=0, description="longest silence within a request body")
    body_rate: Bytes = Field(128 << 10, ge=1, description="bytes a second that a request body comes at least with")
    max_bodies_bytes: Bytes = Field(256 << 20, description="most bytes of the bodies of all requests under way")
    send_timeout: Seconds = Field(60.0, gt=0, description="longest time in which a client takes nothing of its answer")
    question_concurrency: int = Field(64, ge=1, description="questions of one request under way at once")
    request_timeout: Seconds = Field(600.0, description="longest time from a request to its last token")
    encode_timeout: Seconds = Field(120.0, description="longest time to encode one image")
    reconnect_wait: Seconds = Field(3.0, description="how long a request waits for a service to come back")
    drain_grace: Seconds = Field(20.0, description="time requests under way get after SIGTERM")

    api_keys: SecretStr = Field(
        SecretStr(""),
        description="TENANT=KEY or TENANT=sha256:HEX, separated by commas; a bare KEY is tenant default; "
        "' rate=60' (a minute) and ' concurrency=4' after it limit it",
    )
    api_keys_file: Path | None = Field(None, description="file with one key of the same form on each line")
    key_rate: int = Field(
        0, ge=0, description="requests a minute of one API key without a rate of its own; 0: no limit"
    )
    key_concurrency: int = Field(
        0, ge=0, description="requests at once of one API key without a concurrency of its own; 0: no limit"
    )
    heartbeat: Seconds = Field(15.0, gt=0, description="silence of an event stream after which a comment is sent")
    playground: bool = Field(True, description="serve the playground, a page for trying things out, at /")
    samples: Path | None = Field(None, description="folder of images the playground offers; unset: bundled ones")
    allowed_hosts: str = Field(
        "",
        description="names, beside localhost and --host, that requests without API keys may be addressed to, separated "
        "by commas; .example.org: all names below it",
    )
    cors_origins: str = Field("", description="origins that browsers may call from, separated by commas")
    tls_certificate: Path | None = Field(None, description="PEM certificate chain, to serve https")
    tls_key: Path | None = Field(None, description="PEM private key")
    rpc_tls_ca: Path | None = Field(None, description="PEM roots that the services' certificates are checked against")
    rpc_tls_certificate: Path | None = Field(None, description="PEM client certificate for the services (mTLS)")
    rpc_tls_key: Path | None = Field(None, description="PEM private key of the client certificate")

    fetch_urls: FetchMode = Field(
        "public",
        description="whether clients may give URLs: off, allowlist (of --fetch-hosts), or public (any public address)",
    )
    fetch_hosts: str = Field(
        "", description="hosts of --fetch-urls allowlist, separated by commas; .example.org: all names below it"
    )
    fetch_ports: str = Field("80,443", description="ports that URLs may have, separated by commas")
    fetch_allow_networks: str = Field(
        "", description="networks that are fetched from although not public, such as 10.1.0.0/16, separated by commas"
    )
    fetch_ca: Path | None = Field(None, description="PEM roots for the servers of URLs, beside the system's")
    fetch_timeout: Seconds = Field(15.0, gt=0, description="longest time to fetch one URL, redirects included")
    fetch_connect_timeout: Seconds = Field(5.0, gt=0, description="longest time to look a host up, and to connect")
    fetch_read_timeout: Seconds = Field(5.0, gt=0, description="longest silence of a server that is fetched from")
    fetch_redirects: int = Field(3, ge=0, le=10, description="most redirects of one URL")
    fetch_concurrency: int = Field(32, ge=1, description="URLs fetched at once in the whole process")
    fetch_tenant_concurrency: int = Field(16, ge=1, description="URLs fetched at once for one tenant")
    max_urls: int = Field(16, ge=1, description="most URLs to fetch in one request")

    policy: Path | None = Field(None, description="YAML file with the rules of /v1/moderations")
    data_dir: Path | None = Field(None, description="where files and batches are kept; unset: there are none")
    max_file_bytes: Bytes = Field(64 << 20, description="largest file for batches (see --max-body-bytes too)")
    max_stored_bytes: Bytes = Field(2 << 30, description="most bytes of files of one tenant")
    file_ttl: Seconds = Field(30 * 86400.0, description="how long files are kept when their owner says nothing else")
    max_batch_lines: int = Field(50_000, ge=1, description="most requests in one batch")
    max_batches: int = Field(64, ge=1, description="most batches of one tenant under way")
    batch_concurrency: int = Field(
        4, ge=1, description="batch requests worked on at once; one while others wait for answers"
    )
    batch_window: Seconds = Field(86400.0, ge=1, description="time after which what is undone of a batch expires")

    metrics_listen: str | None = Field(
        None, description="host:port or unix:/path that answers Prometheus without a key, beside /metrics; unset: none"
    )
    trace_endpoint: str | None = Field(
        None, description="OTLP collector that spans are sent to over gRPC, such as http://otel:4317; unset: none"
    )
    trace_share: float = Field(1.0, ge=0, le=1, description="share of the traces begun here that are recorded")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log line written")
    log_format: LogFormat = Field("auto", description="console, json, or auto (json unless in a terminal)")
    access_log: bool = Field(True, description="one log line for each request")

    @model_validator(mode="after")
    def _consistent(self) -> GatewaySettings:
        if not (self.vision_addresses and self.lm_addresses):
            raise ValueError("--vision and --lm need at least one address each")
        both = (("--vision", self.vision_addresses), ("--lm", self.lm_addresses))
        embedding = (("--embed-vision", distinct(self.embed_vision)), ("--embed-lm", distinct(self.embed_lm)))
        for option, targets in (*both, *embedding):
            try:
                split_targets(targets)
            except LookonceError as error:
                raise ValueError(f"{option}: {error.message}") from None
        if self.variants and self.variants_file:
            raise ValueError("--variants and --variants-file exclude each other")
        if self.embed_lm and (self.variants or self.variants_file):
            raise ValueError("--embed-lm goes with --lm: in --variants or --variants-file write task=embed")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("--tls-certificate and --tls-key go together")
        if (self.fetch_urls == "allowlist") != bool(distinct(self.fetch_hosts)):
            raise ValueError("--fetch-urls allowlist and --fetch-hosts go together")
        if self.uds is None and not is_loopback(self.host) and not self.has_keys:
            raise ValueError(
                f"--host {self.host} is reachable from outside: set LOOKONCE_GATEWAY_API_KEYS or --api-keys-file first"
            )
        return self

    @field_validator("variants")
    @classmethod
    def _variants_readable(cls, value: str) -> str:
        if value:
            parse_variants(value, param="variants")
        return value

    @field_validator("fetch_hosts", "fetch_ports", "fetch_allow_networks")
    @classmethod
    def _readable(cls, value: str, info: ValidationInfo) -> str:
        parse = {"fetch_hosts": parse_hosts, "fetch_ports": parse_ports}.get(info.field_name or "", parse_networks)
        parse(distinct(value))
        return value

    @property
    def fetch_policy(self) -> FetchPolicy:
        """The rules of fetching clients' URLs."""
        return FetchPolicy(
            mode=self.fetch_urls,
            hosts=parse_hosts(distinct(self.fetch_hosts)),
            ports=parse_ports(distinct(self.fetch_ports)),
            networks=parse_networks(distinct(self.fetch_allow_networks)),
            ca=self.fetch_ca,
            max_redirects=self.fetch_redirects,
            timeout=self.fetch_timeout,
            connect_timeout=self.fetch_connect_timeout,
            read_timeout=self.fetch_read_timeout,
            concurrency=self.fetch_concurrency,
            per_owner=self.fetch_tenant_concurrency,
        )

    def tenant_quota(self, tenants: int) -> Quota:
        """What each of so many tenants may ask for: by default none can take all places."""
        if self.tenant_concurrency is not None:
            return Quota(concurrency=self.tenant_concurrency)
        return Quota(concurrency=max(1, self.max_concurrency // 2) if tenants > 1 else 0)

    @cached_property
    def json_limits(self) -> JsonLimits:
        """What JSON bodies and lines of batches may hold."""
        return JsonLimits(
            depth=self.max_json_depth,
            items=self.max_json_items,
            keys=self.max_json_keys,
            number_chars=self.max_json_number,
            text_chars=self.max_text_chars,
        )

    @property
    def has_keys(self) -> bool:
        """Whether API keys were given."""
        return bool(self.api_keys.get_secret_value().strip() or self.api_keys_file)

    @property
    def vision_addresses(self) -> tuple[str, ...]:
        """Addresses of the vision services."""
        return distinct(self.vision)

    @property
    def lm_addresses(self) -> tuple[str, ...]:
        """Addresses of the language services."""
        return distinct(self.lm)

    def variant_specs(self) -> tuple[VariantSpec, ...]:
        """What is served: the variants, or the one of --vision and --lm. Raises INVALID_ARGUMENT."""
        if self.variants_file is not None:
            return read_variants(self.variants_file)
        if self.variants:
            return parse_variants(self.variants, param="variants")
        main = VariantSpec(DEFAULT, 1.0, self.vision_addresses, self.lm_addresses)
        if not self.embed_lm:
            return (main,)
        vision = distinct(self.embed_vision) or self.vision_addresses
        return (main, VariantSpec(EMBED, 1.0, vision, distinct(self.embed_lm), EMBED))

    @property
    def rpc_tls(self) -> Tls:
        """TLS towards the services."""
        return Tls(self.rpc_tls_certificate, self.rpc_tls_key, self.rpc_tls_ca)


def distinct(text: str) -> tuple[str, ...]:
    """Items of a comma-separated list, blank ones dropped, repeated ones once."""
    return tuple(dict.fromkeys(split_list(text)))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
