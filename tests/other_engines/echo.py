"""An engine without a model: it says what it was asked. Needs neither torch nor weights."""

from __future__ import annotations

from lm_service.engine.answer import Answer
from lm_service.engine.types import EngineState, Finish, ModelFacts, Scores, Timings


class EchoBuilder:
    """See lm_service.engine.factory."""

    def __init__(self, settings):
        pass

    def build(self, checkpoint, table, end_ids, context_length):
        return EchoEngine(table, end_ids, context_length)


class Bytes:
    """Rows as they are stored."""

    def __init__(self, view):
        self.view, self.nbytes = view, view.data.nbytes


class EchoEngine:
    """An `Engine`."""

    def __init__(self, table, end_ids, context_length):
        self._table, self._end_ids = table, end_ids
        self._facts = ModelFacts(context_length, "none", "none")

    async def start(self, loader, on_failure=lambda: None):
        self._loader = loader

    async def generate(self, request):
        source = Timings().embedding
        for span in request.prompt.images:
            rows, source = await self._loader.load(span.reference, Bytes)
            assert rows.view.shape[0] == span.reference.tokens
        answer = Answer(0, request.sampling, self._table, self._end_ids, len(request.prompt.token_ids))
        for token in request.prompt.token_ids:
            answer.push(token)
            if answer.reason is not None:
                break
        yield answer.take()
        yield Finish(0, answer.reason, len(answer.tokens), Timings(embedding=source), answer.stop)

    async def score(self, request):
        sums = tuple(tuple(-float(len(choice)) for choice in item.choices) for item in request.items)
        return Scores(sums, tuple(0 for _ in request.items))

    async def forget(self, keys, image_digests):
        return 0

    def describe(self):
        return EngineState(self._facts, max_running=1, max_waiting=1)

    async def close(self):
        pass
