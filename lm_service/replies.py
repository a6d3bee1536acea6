"""From our types to protobuf."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lm_service.engine.detokenizer import TokenTable
from lm_service.engine.types import Delta, EmbeddingSource, Finish, FinishReason, Prompt, Timings, TokenLogprob
from protos.lookonce.v1 import language_pb2

_REASONS = {FinishReason.STOP: language_pb2.STOP, FinishReason.LENGTH: language_pb2.LENGTH}
_SOURCES = {
    EmbeddingSource.NONE: language_pb2.EMBEDDING_SOURCE_UNSPECIFIED,
    EmbeddingSource.NOT_NEEDED: language_pb2.NOT_NEEDED,
    EmbeddingSource.TENSOR_CACHE: language_pb2.L1,
    EmbeddingSource.STORE: language_pb2.STORE,
    EmbeddingSource.FETCHED: language_pb2.FETCHED,
}


class Replies:
    """Writes the replies of one model."""

    def __init__(self, table: TokenTable, model: str) -> None:
        self._table = table
        self._model = model

    def delta(self, delta: Delta, prompt: Prompt) -> language_pb2.GenerateEvent:
        """New tokens."""
        return language_pb2.GenerateEvent(
            delta=language_pb2.Delta(
                index=delta.index,
                text=delta.text,
                token_ids=delta.token_ids,
                logprobs=[self._logprob(entry) for entry in delta.logprobs],
                prompt_tokens=len(prompt.token_ids),
            )
        )

    def finish(self, finish: Finish, prompt: Prompt) -> language_pb2.GenerateEvent:
        """The end of one answer."""
        return language_pb2.GenerateEvent(
            finish=language_pb2.Finish(
                index=finish.index,
                reason=_REASONS[finish.reason],
                stop=finish.stop or "",
                usage=usage(prompt, finish.completion_tokens, finish.timings.cached_tokens),
                receipt=self.receipt(finish.timings, [prompt]),
            )
        )

    def receipt(self, timings: Timings, prompts: Sequence[Prompt]) -> language_pb2.LanguageReceipt:
        """What it took. The fingerprint is that of the first image's encoder."""
        fingerprints = [span.reference.fingerprint for prompt in prompts for span in prompt.images]
        return language_pb2.LanguageReceipt(
            embedding=_SOURCES[timings.embedding],
            prefix_hit=timings.prefix_hit,
            prefill_tokens=timings.prefill_tokens,
            cached_tokens=timings.cached_tokens,
            queue_ms=timings.queue_ms,
            load_ms=timings.load_ms,
            ttft_ms=timings.ttft_ms,
            total_ms=timings.total_ms,
            fingerprint=fingerprints[0] if fingerprints else "",
            model=self._model,
        )

    def _logprob(self, entry: TokenLogprob) -> language_pb2.TokenLogprob:
        reply = self._one(entry.token_id, entry.logprob)
        reply.top.extend(self._one(token, logprob) for token, logprob in entry.top)
        return reply

    def _one(self, token_id: int, logprob: float) -> language_pb2.TokenLogprob:
        piece = self._table.piece(token_id)
        return language_pb2.TokenLogprob(
            token_id=token_id, token=self._table.text(token_id), token_bytes=piece, logprob=logprob
        )


def usage(prompt: Prompt, completion_tokens: int, cached_tokens: int) -> language_pb2.Usage:
    """Token counts of one answer."""
    return language_pb2.Usage(
        prompt_tokens=len(prompt.token_ids),
        completion_tokens=completion_tokens,
        cached_tokens=cached_tokens,
        image_tokens=sum(span.reference.tokens for span in prompt.images),
    )


def item_scores(
    choices: Sequence[str], lengths: Sequence[int], logprobs: Sequence[float], prompt: Prompt, cached_tokens: int
) -> language_pb2.ItemScores:
    """Scores of one item: `probability` is the softmax of the choices' log-probabilities."""
    best = max(logprobs)
    weights = [math.exp(logprob - best) for logprob in logprobs]
    return language_pb2.ItemScores(
        choices=[
            language_pb2.ChoiceScore(choice=choice, probability=weight / sum(weights), logprob=logprob, tokens=length)
            for choice, weight, logprob, length in zip(choices, weights, logprobs, lengths, strict=True)
        ],
        usage=usage(prompt, 0, cached_tokens),
    )
