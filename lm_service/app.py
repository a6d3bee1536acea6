"""The composition root of the language service: `load` reads the model, `build` puts the parts together, `serve` runs
them until the process is told to stop."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from functools import partial
from typing import cast

import structlog

from lm_service.embeddings import EmbeddingResolver, TensorCache
from lm_service.engine.factory import builder_of, vector_builder_of
from lm_service.engine.grammar import Grammars
from lm_service.engine.types import Engine, VectorEngine
from lm_service.metrics import METRICS
from lm_service.peers import VisionPeers
from lm_service.prompt import AcceptedEncoders, ChatTemplate, PromptBuilder, load_template
from lm_service.servicer import LanguageServicer
from lm_service.settings import LanguageSettings
from lm_service.vectors import VectorMaker, VectorPrompts
from lm_service.wire import Replies
from lookonce.core.embedding_cache import EmbeddingCache
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.process import heap_frozen
from lookonce.core.rpc.client import VisionClient
from lookonce.core.rpc.server import Server
from lookonce.core.stores import Store, open_store
from lookonce.core.version import __version__
from lookonce.models.chat.chat_format import end_token_ids
from lookonce.models.chat.generation_config import GREEDY, SamplingDefaults, sampling_defaults
from lookonce.models.checkpoint import Checkpoint, Half
from lookonce.models.checkpoint.check import open_checked
from lookonce.models.omp_thread import run_in_omp_thread
from lookonce.models.vector_layout import VectorLayout, vector_layout
from protos.lookonce.v1 import common_pb2, language_pb2_grpc

log = structlog.get_logger(__name__)
SERVICE_NAME = "lookonce.v1.LanguageModel"


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's language half: what its files say, and the engine that has read its weights."""

    checkpoint: Checkpoint
    template: ChatTemplate
    engine: Engine
    end_ids: frozenset[int]  # end an answer
    defaults: SamplingDefaults  # of the parameters that a request leaves out
    vectors: VectorLayout | None = None  # of an embedding model, whose engine is a VectorEngine


@dataclass(frozen=True)
class LanguageService:
    """The parts, not started."""

    server: Server
    servicer: LanguageServicer
    engine: Engine
    resolver: EmbeddingResolver
    peers: VisionPeers
    store: Store


def load(settings: LanguageSettings) -> LoadedModel:
    """Read the checkpoint's language half (blocking). Raises CheckpointError or INVALID_ARGUMENT."""
    builder = builder_of(settings)
    checkpoint = open_checked(settings.model, Half.LANGUAGE, settings.revision, settings.adapter)
    family, config = checkpoint.family, checkpoint.config
    template = load_template(checkpoint.path, family, family.special_tokens(config).marker)
    end_ids = end_token_ids(checkpoint.path, family, config, template.chat)
    context_length = _context_length(checkpoint, settings.context_length)
    layout = vector_layout(checkpoint.path, family, config, settings.task)
    if layout is not None:
        pooled = run_in_omp_thread(vector_builder_of(settings).build_vectors, checkpoint, layout, context_length)
        return LoadedModel(checkpoint, template, pooled, end_ids, GREEDY, layout)
    engine = run_in_omp_thread(builder.build, checkpoint, template.table, end_ids, context_length)
    defaults = sampling_defaults(checkpoint.path) if settings.generation_config == "auto" else GREEDY
    return LoadedModel(checkpoint, template, engine, end_ids, defaults)


def build(settings: LanguageSettings, model: LoadedModel) -> LanguageService:
    """Put the parts together. Call on the event loop they will run on."""
    checkpoint, template, engine = model.checkpoint, model.template, model.engine
    accepted = AcceptedEncoders.of(
        checkpoint, settings.encoder_dtype, settings.encoder_quantization, settings.encoder_weights
    )
    if not accepted.are_known:
        log.warning("no image is taken until a vision service of this checkpoint has told its weights")
    store = open_store(settings.store, max_bytes=settings.store_bytes, ttl=settings.store_ttl, strict=True)
    clients = [VisionClient(address, tls=settings.vision_tls) for address in settings.vision_addresses]
    peers = VisionPeers(clients, accepted, fetch_timeout=settings.fetch_timeout)
    resolver = EmbeddingResolver(
        tensors=TensorCache(settings.tensor_cache_bytes),
        cache=EmbeddingCache(store),
        peers=peers,
        hidden_size=checkpoint.hidden_size,
        accepted=accepted,
        names=checkpoint.embedding_tensors,
    )
    prompts = PromptBuilder(
        template,
        checkpoint.family,
        checkpoint.config,
        context_length=engine.describe().model.context_length,
        max_images=settings.max_images,
        check_fingerprint=accepted.check,
    )
    replies = Replies(template.table, checkpoint.name)
    servicer = LanguageServicer(
        engine=engine,
        builder=prompts,
        resolver=resolver,
        replies=replies,
        model=_description(model),
        accepted=accepted,
        learn_encoders=peers.learn_encoders,
        max_tokens=settings.max_tokens,
        max_timeout=settings.max_timeout,
        defaults=model.defaults,
        grammars=Grammars(template.table.pieces, template.table.special, model.end_ids, template.continued_ids),
        vectors=_vector_maker(model, prompts, replies),
    )
    server = Server(settings.server)
    server.add(SERVICE_NAME, partial(language_pb2_grpc.add_LanguageModelServicer_to_server, servicer))
    METRICS.watch(engine.describe)
    return LanguageService(server, servicer, engine, resolver, peers, store)


async def serve(settings: LanguageSettings, model: LoadedModel) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises CONFLICT when the address can't be listened on, INTERNAL when a
    fault has left the engine unusable."""
    service = build(settings, model)
    server, engine = service.server, service.engine
    failures: list[str] = []

    def on_failure() -> None:
        failures.append("a fault has left the engine unusable; a new process is needed")  # the log says what happened
        server.stop()

    try:
        address = await server.start()
        await engine.start(service.resolver, on_failure)
        service.peers.start()
        with heap_frozen():
            await server.set_serving(True)
            facts, name = engine.describe().model, model.checkpoint.name
            run = {"device": facts.device, "engine": facts.engine or settings.engine}
            log.info("serving", address=address, model=name, **run, store=_kind(settings))
            await server.wait()
    finally:
        await server.grpc.stop(None)  # drained already, unless starting failed or this task was cancelled
        service.servicer.close()
        await service.peers.close()
        await engine.close()
        await service.store.close()
    for failure in failures:
        raise LookonceError(ErrorKind.INTERNAL, failure)
    log.info("stopped")


def _vector_maker(model: LoadedModel, prompts: PromptBuilder, replies: Replies) -> VectorMaker | None:
    if model.vectors is None:
        return None
    facts, checkpoint = model.engine.describe().model, model.checkpoint
    adapter = checkpoint.adapter.digest(Half.LANGUAGE) if checkpoint.adapter is not None else None
    digest = model.vectors.digest(checkpoint.identity, adapter or "", facts.dtype, facts.quantization)
    return VectorMaker(cast(VectorEngine, model.engine), VectorPrompts(prompts, model.vectors), replies, digest)


def _description(model: LoadedModel) -> common_pb2.ModelDescription:
    checkpoint, facts = model.checkpoint, model.engine.describe().model
    return common_pb2.ModelDescription(
        name=checkpoint.name,
        checkpoint=checkpoint.identity,
        family=checkpoint.family.model_type,
        dtype=facts.dtype,
        device=facts.device,
        hidden_size=checkpoint.hidden_size,
        merge_size=checkpoint.merge_size,
        weight_bytes=facts.weight_bytes,
        version=__version__,
        instance=uuid.uuid4().hex,
        started_at=time.time(),
        quantization=facts.quantization,
        vision_weights=checkpoint.vision_weights,
    )


def _context_length(checkpoint: Checkpoint, cap: int | None) -> int:
    own = int(checkpoint.family.text_config(checkpoint.config).get("max_position_embeddings", 32768))
    if cap is not None and cap > own:
        raise invalid(f"context_length {cap} is over the model's own {own}", param="context_length")
    return cap or own


def _kind(settings: LanguageSettings) -> str:
    """The store's schemes, without the passwords a URL may hold."""
    return " ".join(url.partition("://")[0] for url in settings.store.split())
