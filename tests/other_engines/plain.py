"""transformers' own model and its `generate`, one request after the other: an engine in the fewest lines."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import torch
from transformers import GenerationConfig, Qwen2VLForConditionalGeneration
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from lm_service.engine.answer import Answer
from lm_service.engine.types import (
    DamagedRecord,
    EmbeddingSource,
    EngineState,
    Finish,
    ModelFacts,
    Scores,
    Timings,
)
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.tasks import start_task
from lookonce.models.tensors import tensor_of


class PlainBuilder:
    """See lm_service.engine.factory."""

    def __init__(self, settings):
        self._settings = settings

    def build(self, checkpoint, table, end_ids, context_length):
        model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
        return PlainEngine(model, table, end_ids, context_length)


class Watch(StoppingCriteria, BaseStreamer):
    """Hands every token over, and ends the answer once nobody wants more."""

    def __init__(self, put):
        self.put_token, self.over = put, False

    def put(self, value):
        for token in value.flatten().tolist():
            self.put_token(token)

    def end(self):
        pass

    def __call__(self, input_ids, scores, **rest):
        return torch.full((input_ids.shape[0],), self.over)


def rows_of(view):
    rows = tensor_of(view).to(torch.float32, copy=True)
    if not rows.isfinite().all():
        raise DamagedRecord("the embedding is not finite")
    return rows


class PlainEngine:
    """An `Engine`: greedy answers, one at a time."""

    def __init__(self, model, table, end_ids, context_length):
        self._model, self._table, self._end_ids = model, table, end_ids
        self._facts = ModelFacts(context_length, "float32", "cpu")
        self._turn, self._waiting, self._running, self._open = asyncio.Lock(), 0, 0, False
        self._tasks = set()

    async def start(self, loader, on_failure=lambda: None):
        self._loader, self._open = loader, True

    async def close(self):
        self._open = False
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def describe(self):
        return EngineState(self._facts, self._running, self._waiting, max_running=1, max_waiting=1000)

    async def forget(self, keys, image_digests):
        return 0  # it keeps nothing

    async def generate(self, request):
        sampling = request.sampling
        self._check(request.prompt, request.deadline)
        if sampling.n != 1 or sampling.temperature:
            raise invalid("this engine gives one greedy answer", param="n" if sampling.n != 1 else "temperature")
        began, events = time.monotonic(), asyncio.Queue()
        task = self._begin(self._generate(request, events))
        answer = Answer(
            0, sampling, self._table, self._end_ids, self._facts.context_length - len(request.prompt.token_ids)
        )
        timings = Timings()
        try:
            while answer.reason is None:
                answer.push(await self._next(events, task, request.deadline))
                if len(answer.tokens) == 1:
                    timings.ttft_ms = 1000 * (time.monotonic() - began)
                if not request.whole or answer.reason is not None:
                    yield answer.take()
        finally:
            task.cancel()
            await asyncio.wait([task])
        timings.total_ms = 1000 * (time.monotonic() - began)
        yield Finish(0, answer.reason, len(answer.tokens), timings, answer.stop)

    async def score(self, request):
        sums = []
        for item in request.items:
            self._check(item.prompt, request.deadline)
            if not item.choices or not all(item.choices):
                raise invalid("choices must be given, and none of them empty", param="choices")
        task = self._begin(self._score(request, sums))
        try:
            timeout = None if request.deadline is None else max(0.0, request.deadline - time.monotonic())
            await asyncio.wait([task], timeout=timeout)
            if not task.done():
                raise _late()
            if task.cancelled():
                raise _closed()
            await task
        finally:
            task.cancel()
        return Scores(tuple(sums), tuple(0 for _ in request.items))

    def _begin(self, work):
        task = start_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _next(self, events, task, deadline):
        wanted = start_task(events.get())
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        await asyncio.wait([wanted, task], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        wanted.cancel()
        if not task.done():
            raise _late()
        if task.cancelled():
            raise _closed()
        await task
        return await events.get()

    async def _generate(self, request, events):
        loop = asyncio.get_running_loop()
        watch = Watch(lambda token: loop.call_soon_threadsafe(events.put_nowait, token))
        config = GenerationConfig(do_sample=False, max_new_tokens=request.sampling.max_tokens, pad_token_id=0)

        def run(hidden):
            given = torch.from_numpy(request.prompt.positions)[:, None]
            text = torch.arange(given.shape[-1])[None, None]
            self._model._prepare_position_ids_for_generation = lambda *_: torch.cat([text, given])
            with torch.inference_mode():
                self._model.generate(
                    inputs_embeds=hidden, generation_config=config, streamer=watch, stopping_criteria=[watch]
                )

        await self._in_turn(request.prompt, run, watch)

    async def _score(self, request, sums):
        for item in request.items:
            found = []
            await self._in_turn(item.prompt, partial(self._sums, item, found))
            sums.append(tuple(found))

    @torch.inference_mode()
    def _sums(self, item, found, hidden):
        """One forward for each choice."""
        prompt = item.prompt
        for choice in item.choices:
            more = self._model.get_input_embeddings()(torch.tensor([choice]))
            further = torch.arange(len(choice)).expand(3, -1) + prompt.next_position
            positions = torch.cat([torch.from_numpy(prompt.positions), further], 1)[:, None]
            out = self._model(inputs_embeds=torch.cat([hidden, more], 1), position_ids=positions, use_cache=False)
            logits = out.logits[0, len(prompt.token_ids) - 1 : -1].log_softmax(-1)
            found.append(float(logits.gather(1, torch.tensor(choice)[:, None]).sum()))

    async def _in_turn(self, prompt, run, watch=None):
        """Embed a prompt and run it in a thread, when it is its turn."""
        self._waiting += 1
        try:
            rows = [(span, await self._loader.load(span.reference, rows_of)) for span in prompt.images]
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        self._running += 1
        try:
            hidden = self._model.get_input_embeddings()(torch.tensor([prompt.token_ids])).detach()
            for span, (tensor, source) in rows:
                assert source in EmbeddingSource
                for place, row, count in span.runs:
                    hidden[0, place : place + count] = tensor[row : row + count]
            work = asyncio.get_running_loop().run_in_executor(None, run, hidden)
            try:
                await asyncio.shield(work)
            finally:
                if watch is not None:
                    watch.over = True
                await asyncio.wait([work])
        finally:
            self._running -= 1
            self._turn.release()

    def _check(self, prompt, deadline):
        if not self._open:
            raise _closed()
        if deadline is not None and deadline <= time.monotonic():
            raise _late()
        if len(prompt.token_ids) >= self._facts.context_length:
            raise LookonceError(ErrorKind.CONTEXT_LENGTH_EXCEEDED, "the prompt is too long", param="prompt")


def _late():
    return LookonceError(ErrorKind.DEADLINE_EXCEEDED, "the deadline passed")


def _closed():
    return LookonceError(ErrorKind.UNAVAILABLE, "the engine is shutting down", retry_after=1.0)
