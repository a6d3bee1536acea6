"""Builds the language service from its settings, and runs it until it is told to stop."""

from __future__ import annotations

import math
import time
import uuid
from dataclasses import dataclass
from functools import partial

import structlog
import torch

from lm_service.embeddings import EmbeddingResolver
from lm_service.engine.packed.device_map import Home, place, wanted
from lm_service.engine.packed.engine import PackedEngine, unusable
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.types import Engine
from lm_service.fingerprints import AcceptedEncoders
from lm_service.metrics import METRICS
from lm_service.peers import VisionPeers
from lm_service.prompt import PromptBuilder
from lm_service.replies import Replies
from lm_service.servicer import LanguageServicer
from lm_service.settings import LanguageSettings
from lm_service.template import ChatTemplate, load_template
from lm_service.tensor_cache import TensorCache
from lm_service.validation import RecordRules
from lookonce.core.embedding_cache import EmbeddingCache
from lookonce.core.errors import invalid
from lookonce.core.process import heap_frozen
from lookonce.core.rpc.client import VisionClient
from lookonce.core.rpc.server import Server
from lookonce.core.stores import open_store
from lookonce.core.telemetry.logs import serve_metrics
from lookonce.core.version import __version__
from lookonce.models.chat.chat_format import end_token_ids
from lookonce.models.checkpoint import Checkpoint, Half
from lookonce.models.checkpoint.check import open_checked
from lookonce.models.devices import choose_dtype, dtype_name
from lookonce.models.quantization import check_usable, scheme
from lookonce.models.text_adapter import ModelAdapter
from protos.lookonce.v1 import common_pb2, language_pb2_grpc

log = structlog.get_logger(__name__)
SERVICE_NAME = "lookonce.v1.LanguageModel"


@dataclass(frozen=True)
class LoadedModel:
    """The language half on its devices, and what its checkpoint says about it."""

    checkpoint: Checkpoint
    template: ChatTemplate
    adapter: ModelAdapter
    home: Home
    dtype: torch.dtype
    context_length: int
    end_ids: frozenset[int]
    weight_bytes: int


def load_model(settings: LanguageSettings) -> LoadedModel:
    """Read the checkpoint's language half (blocking). Raises CheckpointError or INVALID_ARGUMENT."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    asked = wanted(settings.device, settings.device_map)
    check_usable(settings.quantization, asked.devices)
    checkpoint = open_checked(settings.model, Half.LANGUAGE, settings.revision)
    dtype = choose_dtype(settings.dtype, asked.devices, checkpoint.dtype)
    home = place(asked, checkpoint.half_entries(Half.LANGUAGE), dtype, settings.quantization)
    family, config = checkpoint.family, checkpoint.config
    template = load_template(checkpoint.path, family, family.special_tokens(config).marker)
    context_length = _context_length(checkpoint, settings.context_length)
    where = home.of if settings.quantization == "none" else home.of_unquantized
    entries = checkpoint.half_entries(Half.LANGUAGE)
    native = settings.kernels == "auto"
    return LoadedModel(
        checkpoint=checkpoint,
        template=template,
        adapter=family.load_text(
            checkpoint, dtype, where, home.of_layers, quantization=settings.quantization, native=native
        ),
        home=home,
        dtype=dtype,
        context_length=context_length,
        end_ids=end_token_ids(checkpoint.path, family, config, template.chat),
        weight_bytes=sum(math.prod(entry.shape) for entry in entries.values()) * dtype.itemsize,
    )


async def serve(settings: LanguageSettings, model: LoadedModel) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises CONFLICT when the address can't be listened on, INTERNAL when a
    fault has left the engine unusable."""
    accepted = AcceptedEncoders.of(model.checkpoint, settings.encoder_dtype, settings.encoder_quantization)
    store = open_store(settings.store, max_bytes=settings.store_bytes, ttl=settings.store_ttl, strict=True)
    clients = [VisionClient(address, tls=settings.vision_tls) for address in settings.vision_addresses]
    peers = VisionPeers(clients, accepted, fetch_timeout=settings.fetch_timeout)
    checkpoint = model.checkpoint
    resolver = EmbeddingResolver(
        l1=TensorCache(settings.l1_bytes),
        cache=EmbeddingCache(store),
        peers=peers,
        rules=RecordRules(checkpoint.hidden_size, model.dtype, model.home.devices[0]),
        accepted=accepted,
    )
    engine = _engine(settings, model, resolver)
    METRICS.watch(engine.describe)
    server = Server(settings.server)
    servicer = _servicer(settings, model, engine, resolver, accepted)
    register = partial(language_pb2_grpc.add_LanguageModelServicer_to_server, servicer)
    server.add(SERVICE_NAME, register)
    try:
        address = await server.start()
        await engine.start(on_failure=server.stop)
        peers.start()
        with heap_frozen():
            await server.set_serving(True)
            log.info("serving", address=address, model=checkpoint.name, device=str(model.home), store=_kind(settings))
            await server.wait()
    finally:
        await server.grpc.stop(None)  # drained already, unless starting failed or this task was cancelled
        servicer.close()
        await peers.close()
        await engine.close()
        await store.close()
    if engine.failed:
        raise unusable()
    log.info("stopped")


def start_metrics(settings: LanguageSettings) -> None:
    """Listen for Prometheus, if asked to."""
    if settings.metrics_listen:
        serve_metrics(settings.metrics_listen)


def _engine(settings: LanguageSettings, model: LoadedModel, resolver: EmbeddingResolver) -> PackedEngine:
    native = settings.kernels == "auto"
    options = PackedOptions(
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        kv_bytes=settings.kv_bytes,
        prefix_bytes=settings.prefix_bytes,
        context_tokens=model.context_length,
        step_seconds=settings.step_seconds,
        native=native,
    )
    return PackedEngine(model.adapter, model.template.table, model.end_ids, resolver, options)


def _servicer(
    settings: LanguageSettings,
    model: LoadedModel,
    engine: Engine,
    resolver: EmbeddingResolver,
    accepted: AcceptedEncoders,
) -> LanguageServicer:
    checkpoint = model.checkpoint
    builder = PromptBuilder(
        model.template,
        checkpoint.family,
        checkpoint.config,
        context_length=model.context_length,
        max_images=settings.max_images,
        check_fingerprint=resolver.check,
    )
    return LanguageServicer(
        engine=engine,
        builder=builder,
        resolver=resolver,
        replies=Replies(model.template.table, checkpoint.name),
        model=_description(settings, model),
        fingerprints=accepted.fingerprints,
        max_tokens=settings.max_tokens,
        max_timeout=settings.max_timeout,
    )


def _description(settings: LanguageSettings, model: LoadedModel) -> common_pb2.ModelDescription:
    checkpoint = model.checkpoint
    return common_pb2.ModelDescription(
        name=checkpoint.name,
        checkpoint=checkpoint.identity,
        family=checkpoint.family.model_type,
        dtype=dtype_name(model.dtype),
        device=str(model.home),
        hidden_size=checkpoint.hidden_size,
        merge_size=checkpoint.merge_size,
        weight_bytes=model.weight_bytes,
        version=__version__,
        instance=uuid.uuid4().hex,
        started_at=time.time(),
        quantization=scheme(settings.quantization, model.home.devices[0]),
    )


def _context_length(checkpoint: Checkpoint, cap: int | None) -> int:
    own = int(checkpoint.family.text_config(checkpoint.config).get("max_position_embeddings", 32768))
    if cap is not None and cap > own:
        raise invalid(f"context_length {cap} is over the model's own {own}", param="context_length")
    return cap or own


def _kind(settings: LanguageSettings) -> str:
    """The store's schemes, without the passwords a URL may hold."""
    return " ".join(url.partition("://")[0] for url in settings.store.split())
