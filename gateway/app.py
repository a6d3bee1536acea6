"""Builds the gateway from its settings, and runs it until it is told to stop."""

from __future__ import annotations

from gateway.answers import Answers
from gateway.auth import Keyring, Quota, read_keys
from gateway.batches.worker import Batches
from gateway.core import Gateway
from gateway.http.asgi import create_app
from gateway.http.batch_routes import BatchEndpoints
from gateway.http.listener import listen
from gateway.images.encoder import Encoder
from gateway.images.image_store import ImageStores, StoreWithSpare
from gateway.images.library import ImageLibrary
from gateway.routing.replicas import open_replicas
from gateway.routing.variants import EMBED, ServedModel, Variant, Variants, VariantSpec
from gateway.settings import GatewaySettings, distinct
from gateway.vectors import VectorMaker
from lookonce.core.http_fetch.fetcher import Fetcher
from lookonce.core.process import heap_frozen
from lookonce.core.rpc.client import LanguageClient, VisionClient
from lookonce.core.stores import Store, open_store
from lookonce.core.stores.wrappers import SealedStore
from lookonce.core.telemetry.logs import serve_metrics
from lookonce.moderation.policy import read_policy

SPARE_BYTES = 64 << 20
"""Image files kept in memory while the image store is out of order."""

INDEX_BYTES = 512 << 20
"""Lists and names of all images, records of pinned ones: of millions of them."""


def build(settings: GatewaySettings) -> Gateway:
    """The gateway of these settings. Call within the event loop that will run it.

    Raises INVALID_ARGUMENT for a bad policy, that or CONFLICT for a data directory that can't be used."""
    policy = read_policy(settings.policy) if settings.policy is not None else None
    tls = settings.rpc_tls
    interval = settings.dns_interval

    def connect(spec: VariantSpec) -> Variant:
        vision, vision_names = open_replicas(
            spec.vision, lambda address, name: VisionClient(address, tls=tls, server_name=name), interval=interval
        )
        language, language_names = open_replicas(
            spec.language, lambda address, name: LanguageClient(address, tls=tls, server_name=name), interval=interval
        )
        return Variant(spec, vision, language, (vision_names, language_names))

    variants = Variants(settings.variant_specs(), connect)
    ttl = settings.image_ttl
    spare = open_store("memory://", namespace="images-spare", max_bytes=SPARE_BYTES, ttl=ttl)
    kept = StoreWithSpare(_open_image_store(settings), spare)
    encoder = Encoder(timeout=settings.encode_timeout, reconnect_wait=settings.reconnect_wait)
    images = ImageLibrary(kept, variants, encoder, ttl=ttl, response_ttl=settings.response_ttl)
    answers = Answers(images, variants, reconnect_wait=settings.reconnect_wait)
    model = ServedModel(variants, names=distinct(settings.model_name))
    embedding_model = ServedModel(variants, names=distinct(settings.embed_model_name), task=EMBED)
    vectors = VectorMaker(images, variants, reconnect_wait=settings.reconnect_wait)
    fetcher = Fetcher(settings.fetch_policy)
    batches = Batches(settings.data_dir, settings) if settings.data_dir is not None else None
    return Gateway(
        settings, variants, images, answers, model, fetcher, vectors, embedding_model, policy=policy, batches=batches
    )


def _open_image_store(settings: GatewaySettings) -> Store:
    url = settings.store
    passing = open_store(url, namespace="images", max_bytes=settings.store_bytes, ttl=settings.image_ttl, strict=True)
    pinned = open_store(url, namespace="images-pinned", max_bytes=settings.pinned_bytes, evicts=False, strict=True)
    index = open_store(url, namespace="images-index", max_bytes=INDEX_BYTES, evicts=False, strict=True)
    return SealedStore(ImageStores(passing, pinned, index), "images", settings.secret.get_secret_value())


def _start_batches(gateway: Gateway, keyring: Keyring) -> None:
    async def reachable() -> bool:
        vision, language = await gateway.variants.health()
        return any(vision.values()) and any(language.values())

    if gateway.batches is not None:
        endpoints = BatchEndpoints(gateway, keyring)
        gateway.batches.start(endpoints, interactive=lambda: gateway.answers.interactive, reachable=reachable)


async def serve(settings: GatewaySettings) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises what `build` does, and CONFLICT when it can't listen."""
    keys = read_keys(settings.api_keys.get_secret_value(), settings.api_keys_file)
    secret = settings.secret.get_secret_value()
    quota = Quota(settings.key_rate, settings.key_concurrency)
    keyring = Keyring(
        keys,
        secret=secret,
        share_embeddings=settings.share_embeddings,
        share_prefixes=settings.share_prefixes,
        quota=quota,
        tenant_quota=settings.tenant_quota,
    )
    gateway = build(settings)
    try:
        if settings.metrics_listen is not None:
            serve_metrics(settings.metrics_listen)
        if settings.variants_file is not None:
            gateway.variants.watch(settings.variants_file)
        app, routes = create_app(gateway, keyring)

        def drain() -> None:
            routes.state.draining = True
            if gateway.batches is not None:
                gateway.batches.drain()

        await gateway.variants.start()
        _start_batches(gateway, keyring)
        with heap_frozen():
            await listen(app, settings, drain)
    finally:
        await gateway.close()
