"""The gRPC face of the language service: translation only, and the counting of calls."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, cast

from lm_service.embeddings import EmbeddingResolver
from lm_service.engine.grammar import Grammars
from lm_service.engine.types import Delta, Engine, Finish, Generation
from lm_service.metrics import METRICS, TracePhases, counted, observe_answer
from lm_service.prompt import PLAIN, AcceptedEncoders, PromptBuilder, PromptThread
from lm_service.scoring import Scorer
from lm_service.tools import tools_of
from lm_service.vectors import VectorMaker, no_embedding_model
from lm_service.wire import (
    AnyRequest,
    Replies,
    check_forget,
    check_ids,
    messages_of,
    rendering_of,
    sampling_of,
    structure_of,
    timeout_of,
)
from lookonce.models.chat.generation_config import SamplingDefaults
from protos.lookonce.v1 import common_pb2, language_pb2, language_pb2_grpc


class LanguageServicer(language_pb2_grpc.LanguageModelServicer):
    """Serves LanguageModel (language.proto) over one engine."""

    def __init__(
        self,
        *,
        engine: Engine,
        builder: PromptBuilder,
        resolver: EmbeddingResolver,
        replies: Replies,
        model: common_pb2.ModelDescription,
        accepted: AcceptedEncoders,
        learn_encoders: Callable[[], Awaitable[None]],
        max_tokens: int,
        max_timeout: float,
        defaults: SamplingDefaults,
        grammars: Grammars,
        vectors: VectorMaker | None = None,
    ) -> None:
        """`learn_encoders` has vision services asked which encoders are `accepted`, where that is not known.
        `defaults` are those of sampling parameters that a request leaves out, `grammars` compile the structures that
        answers must have. `vectors`: of an embedding model."""
        self._engine = engine
        self._builder = builder
        self._resolver = resolver
        self._replies = replies
        self._prompt_thread = PromptThread()
        self._scorer = Scorer(engine, builder, replies, self._prompt_thread)
        self._model = model
        self._accepted = accepted
        self._learn_encoders = learn_encoders
        self._max_tokens = min(max_tokens, builder.context_length)
        self._max_timeout = max_timeout
        self._defaults = defaults
        self._grammars = grammars
        self._vectors = vectors

    def close(self) -> None:
        """Begin no prompt any more."""
        self._prompt_thread.close()

    async def Generate(  # the contract's name
        self, request: language_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[language_pb2.GenerateEvent]:
        with counted("Generate"):
            generation = await self._generation(request, context)
            METRICS.prompt_tokens.inc(len(generation.prompt.token_ids))
            trace_phases = TracePhases()
            stream = cast(AsyncGenerator[Delta | Finish, None], self._engine.generate(generation))
            async with aclosing(stream) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        yield self._replies.delta(event, generation.prompt)
                    else:
                        observe_answer(event.timings, event.completion_tokens, first=event.index == 0)
                        trace_phases.answered(event)
                        yield self._replies.finish(event, generation.prompt)

    async def Score(self, request: language_pb2.ScoreRequest, context: Any) -> language_pb2.ScoreResponse:
        with counted("Score"):
            deadline = self._deadline(request, context)
            await self._know_encoders(message for item in request.items for message in item.messages)
            return await self._scorer.score(request, deadline)

    async def Embed(self, request: language_pb2.EmbedRequest, context: Any) -> language_pb2.EmbedResponse:
        with counted("Embed"):
            if self._vectors is None:
                raise no_embedding_model()
            deadline = self._deadline(request, context)
            await self._know_encoders(request.items)
            return await self._vectors.embed(request, deadline, self._prompt_thread)

    async def Forget(self, request: common_pb2.ForgetRequest, context: Any) -> common_pb2.ForgetResponse:
        """See language.proto. The embeddings first, so that no KV is made of them again while it is dropped."""
        with counted("Forget"):
            check_forget(request)
            keys, digests = list(request.keys), list(request.image_digests)
            dropped, complete = await self._resolver.forget(keys, digests)
            dropped += await self._engine.forget(keys, digests)
            return common_pb2.ForgetResponse(forgotten=dropped, complete=complete)

    async def Describe(self, request: common_pb2.DescribeRequest, context: Any) -> language_pb2.LanguageDescription:
        if not self._accepted.are_known:
            await self._learn_encoders()
        state = self._engine.describe()
        return language_pb2.LanguageDescription(
            model=self._model,
            fingerprints=self._accepted.fingerprints,
            context_length=self._builder.context_length,
            max_tokens=self._max_tokens,
            max_running=state.max_running,
            max_waiting=state.max_waiting,
            running=state.running,
            waiting=state.waiting,
            generated_tokens=state.generated_tokens,
            sampling_defaults=language_pb2.SamplingParameters(**self._defaults.stated),  # type: ignore[arg-type]
            engine=state.model.engine,
            engine_note=state.model.engine_note,
            vectors=None if self._vectors is None else self._vectors.describe(),
        )

    async def _generation(self, request: language_pb2.GenerateRequest, context: Any) -> Generation:
        deadline = self._deadline(request, context)
        await self._know_encoders(request.messages)
        words = self._builder.template.word_ids
        grammar, field = structure_of(request.sampling)
        rendering = rendering_of(request.template)
        if request.HasField("tools"):
            tools = tools_of(request.tools, grammar)
            rendering = replace(rendering, functions=tools.functions)
            if tools.grammar is not None:
                grammar, field = tools.grammar, "tools"
        sampling = sampling_of(
            request.sampling,
            max_tokens=self._max_tokens,
            defaults=self._defaults,
            word_ids=words,
            grammar=None if grammar is None else await asyncio.to_thread(self._grammars.compile, grammar, field),
        )
        messages = messages_of(request.messages)
        build = partial(
            self._builder.build,
            messages,
            salt=request.cache_salt,
            special_tokens=sampling.special_tokens,
            rendering=rendering,
        )
        is_short = self._builder.is_short(messages) and rendering == PLAIN
        prompt = build() if is_short else await self._prompt_thread.run(build)
        name = request.request_id or uuid.uuid4().hex
        return Generation(
            name, prompt, sampling, request.client, deadline, whole=request.whole, salt=request.cache_salt
        )

    async def _know_encoders(self, messages: Iterable[language_pb2.Message | language_pb2.EmbedItem]) -> None:
        if not self._accepted.are_known and any(part.HasField("image") for each in messages for part in each.parts):
            await self._learn_encoders()

    def _deadline(self, request: AnyRequest, context: Any) -> float:
        check_ids(request)
        return time.monotonic() + timeout_of(request, context.time_remaining(), self._max_timeout)
