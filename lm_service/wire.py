"""Protobuf in and out: every field of a request checked, every refusal naming field and limit; and the replies."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from lm_service.engine.answer import TokenTable
from lm_service.engine.grammar import Grammar, Kind, Structure
from lm_service.engine.types import (
    Delta,
    EmbeddingSource,
    Finish,
    FinishReason,
    Prompt,
    Sampling,
    Timings,
    TokenLogprob,
)
from lm_service.prompt import Message, Rendering
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.identity import DIGEST_BYTES, EmbeddingReference
from lookonce.models.chat.generation_config import GREEDY, SamplingDefaults
from protos.lookonce.v1 import common_pb2, language_pb2

MAX_MESSAGES = 1024
MAX_PARTS = 4096
MAX_TEXT_CHARACTERS = 4_000_000
MAX_STOPS = 16
MAX_TOKEN_IDS, MAX_BAD_WORDS = 4096, 64  # of a request
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20
MAX_ANSWERS = 16
MAX_ITEMS = 1024
MAX_CHOICES = 64
MAX_CHOICE_CHARACTERS = 1024
MAX_ID_CHARACTERS = 256
MAX_FORGOTTEN = 10_000
SALT_BYTES = 32
RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
"""Variables of a chat template that no request sets by name."""
AnyRequest = language_pb2.GenerateRequest | language_pb2.ScoreRequest | language_pb2.EmbedRequest


def messages_of(
    messages: Sequence[language_pb2.Message],
    where: str = "messages",
    known: dict[bytes, EmbeddingReference] | None = None,
) -> list[Message]:
    """A conversation, its size bounded; its content is checked by PromptBuilder. Images that stand in `known`, by their
    serialised form, are not read again; new ones are added."""
    if len(messages) > MAX_MESSAGES:
        raise invalid(f"{where} may hold {MAX_MESSAGES} messages, got {len(messages)}", param=where)
    parts = sum(len(message.parts) for message in messages)
    if parts > MAX_PARTS:
        raise invalid(f"{where} may hold {MAX_PARTS} parts, got {parts}", param=where)
    known = {} if known is None else known
    read = [
        Message(
            message.role,
            parts_of(message.parts, f"{where}[{i}].parts", known),
            tuple(_call(call, f"{where}[{i}].tool_calls") for call in message.tool_calls),
        )
        for i, message in enumerate(messages)
    ]
    characters = sum(len(part) for message in read for part in message.parts if isinstance(part, str))
    characters += sum(len(call) for message in read for call in message.calls)
    if characters > MAX_TEXT_CHARACTERS:
        raise LookonceError(
            ErrorKind.PAYLOAD_TOO_LARGE,
            f"{where} may hold {MAX_TEXT_CHARACTERS} characters, got {characters}",
            param=where,
        )
    return read


def _call(call: language_pb2.ToolCall, where: str) -> str:
    """A call as JSON."""
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise invalid(f"{where}: the arguments of {call.name[:64]!r} are not JSON", param=where) from error
    return json.dumps({"name": call.name, "arguments": arguments}, ensure_ascii=False)


def parts_of(
    parts: Sequence[language_pb2.Part], where: str, known: dict[bytes, EmbeddingReference]
) -> tuple[str | EmbeddingReference, ...]:
    """Texts and references. Images in `known` as in `messages_of`."""
    read: list[str | EmbeddingReference] = []
    for number, part in enumerate(parts):
        kind = part.WhichOneof("content")
        if kind == "text":
            read.append(part.text)
        elif kind == "image":
            read.append(_reference(part.image, known))
        else:
            place = f"{where}[{number}]"
            raise invalid(f"{place} holds neither text nor an image", param=place)
    return tuple(read)


def _reference(image: common_pb2.ImageReference, known: dict[bytes, EmbeddingReference]) -> EmbeddingReference:
    serialised = image.SerializeToString()
    found = known.get(serialised)
    if found is None:
        found = known[serialised] = EmbeddingReference.from_proto(image)
    return found


def sampling_of(
    wanted: language_pb2.SamplingParameters,
    *,
    max_tokens: int,
    defaults: SamplingDefaults = GREEDY,
    word_ids: Callable[[str], Iterable[tuple[int, ...]]] = lambda word: (),
    grammar: Grammar | None = None,
) -> Sampling:
    """Sampling parameters within their bounds. `max_tokens` is the service's bound and default: who asks for more gets
    so many, as whoever asks for more than the context leaves. `defaults` are what is taken for those left out,
    `word_ids` the ways to write a word in tokens, `grammar` that of the structure asked for."""

    def number(name: str, default: float, low: float, high: float, *, above: bool = False) -> float:
        if not wanted.HasField(name):
            return default
        value = float(getattr(wanted, name))
        if math.isnan(value) or not low <= value <= high or (above and value == low):
            bounds = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
            raise invalid(f"{name} must be {bounds}, got {value:g}", param=name)
        return value

    if wanted.HasField("max_tokens"):
        if wanted.max_tokens < 1:
            raise invalid("max_tokens must be at least 1, got 0", param="max_tokens")
        if wanted.min_tokens > wanted.max_tokens:
            text = f"min_tokens must be at most max_tokens, {wanted.max_tokens}, got {wanted.min_tokens}"
            raise invalid(text, param="min_tokens")
        max_tokens = min(wanted.max_tokens, max_tokens)

    top_k = wanted.top_k if wanted.HasField("top_k") else defaults.top_k
    temperature = number("temperature", defaults.temperature, 0.0, 2.0)
    return Sampling(
        max_tokens=max_tokens,
        temperature=0.0 if top_k == 1 else temperature,  # the most probable token, without a draw
        top_p=number("top_p", defaults.top_p, 0.0, 1.0, above=True),
        top_k=top_k,
        min_p=number("min_p", defaults.min_p, 0.0, 1.0),
        repetition_penalty=number("repetition_penalty", defaults.repetition_penalty, 0.0, 10.0, above=True),
        presence_penalty=number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=number("frequency_penalty", 0.0, -2.0, 2.0),
        seed=wanted.seed if wanted.HasField("seed") else None,
        stop=_stops(wanted.stop),
        ignore_eos=wanted.ignore_eos,
        logprobs=_whole(wanted, "logprobs", 0, MAX_LOGPROBS) if wanted.HasField("logprobs") else None,
        n=_whole(wanted, "n", 1, MAX_ANSWERS) if wanted.n else 1,
        min_tokens=wanted.min_tokens,
        special_tokens=wanted.special_tokens,
        bias=_biases(wanted.logit_bias),
        allowed=_token_ids(wanted.allowed_token_ids, "allowed_token_ids"),
        bad_words=_bad_words(wanted.bad_words, word_ids),
        stop_ids=_token_ids(wanted.stop_token_ids, "stop_token_ids"),
        grammar=grammar,
    )


def rendering_of(wanted: language_pb2.TemplateOptions) -> Rendering:
    """How the prompt is rendered."""
    arguments = wanted.arguments
    if arguments:
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise invalid("chat_template_kwargs is not JSON", param="chat_template_kwargs") from error
        if not isinstance(value, dict) or not RESERVED.isdisjoint(value):
            text = f"chat_template_kwargs must be an object without {', '.join(sorted(RESERVED))}"
            raise invalid(text, param="chat_template_kwargs")
    return Rendering(arguments=arguments, header=not wanted.no_header, goes_on=wanted.continue_last_message)


def structure_of(wanted: language_pb2.SamplingParameters) -> tuple[Structure | None, str]:
    """What an answer must be, if it matters, and what errors call it."""
    if not wanted.HasField("structure"):
        return None, ""
    field = wanted.structure.field[:MAX_ID_CHARACTERS] or "structure"
    kind = wanted.structure.WhichOneof("kind")
    if kind is None:
        raise invalid(f"{field} must be a schema, an expression, choices or a grammar", param=field)
    value = getattr(wanted.structure, kind)
    source = json.dumps(list(value.texts)) if kind == "choices" else value
    return Structure(Kind(kind), source), field


def _biases(wanted: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    if len(wanted) > MAX_TOKEN_IDS:
        raise invalid(f"logit_bias may name {MAX_TOKEN_IDS} tokens, got {len(wanted)}", param="logit_bias")
    for token_id, value in wanted.items():
        if not -100.0 <= value <= 100.0:
            raise invalid(f"logit_bias must be from -100 to 100, got {value:g} for {token_id}", param="logit_bias")
    return tuple(sorted(wanted.items()))


def _token_ids(wanted: Sequence[int], name: str) -> tuple[int, ...]:
    if len(wanted) > MAX_TOKEN_IDS:
        raise invalid(f"{name} may name {MAX_TOKEN_IDS} tokens, got {len(wanted)}", param=name)
    return tuple(sorted(set(wanted)))


def _bad_words(
    words: Sequence[str], word_ids: Callable[[str], Iterable[tuple[int, ...]]]
) -> tuple[tuple[int, ...], ...]:
    if len(words) > MAX_BAD_WORDS:
        raise invalid(f"bad_words may hold {MAX_BAD_WORDS} words, got {len(words)}", param="bad_words")
    for i, word in enumerate(words):
        if not 1 <= len(word) <= MAX_STOP_CHARACTERS:
            text = f"bad_words[{i}] must have 1 to {MAX_STOP_CHARACTERS} characters, got {len(word)}"
            raise invalid(text, param=f"bad_words[{i}]")
    return tuple(sorted({ids for word in words for ids in word_ids(word) if ids}))


def _whole(wanted: language_pb2.SamplingParameters, name: str, low: int, high: int) -> int:
    value = int(getattr(wanted, name))
    if not low <= value <= high:
        raise invalid(f"{name} must be from {low} to {high}, got {value}", param=name)
    return value


def _stops(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise invalid(f"stop may hold {MAX_STOPS} strings, got {len(stops)}", param="stop")
    for i, stop in enumerate(stops):
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise invalid(
                f"stop[{i}] must have 1 to {MAX_STOP_CHARACTERS} characters, got {len(stop)}", param=f"stop[{i}]"
            )
    return tuple(stops)


def choices_of(item: language_pb2.ScoreItem) -> tuple[str, ...]:
    """The choices of an item: at least one, none empty, no two alike."""
    choices = tuple(item.choices)
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise invalid(f"choices must be 1 to {MAX_CHOICES} strings, got {len(choices)}", param="choices")
    for i, choice in enumerate(choices):
        if not 1 <= len(choice) <= MAX_CHOICE_CHARACTERS:
            raise invalid(
                f"choices[{i}] must have 1 to {MAX_CHOICE_CHARACTERS} characters, got {len(choice)}",
                param=f"choices[{i}]",
            )
    if len(set(choices)) != len(choices):
        raise invalid("choices must differ from each other", param="choices")
    return choices


def check_items(items: Sequence[language_pb2.ScoreItem]) -> None:
    """Raise unless there are 1 to MAX_ITEMS items, of no more text than one conversation may have."""
    if not 1 <= len(items) <= MAX_ITEMS:
        raise invalid(f"items must be 1 to {MAX_ITEMS}, got {len(items)}", param="items")
    characters = sum(
        sum(map(len, item.choices)) + sum(len(part.text) for message in item.messages for part in message.parts)
        for item in items
    )
    if characters > MAX_TEXT_CHARACTERS:
        raise LookonceError(
            ErrorKind.PAYLOAD_TOO_LARGE,
            f"items may hold {MAX_TEXT_CHARACTERS} characters in all, got {characters}: ask in several calls",
            param="items",
        )


def check_ids(request: AnyRequest) -> None:
    """Raise when an opaque name is longer than any client needs, or the salt is not of its size."""
    for name in ("request_id", "client"):
        if len(getattr(request, name)) > MAX_ID_CHARACTERS:
            raise invalid(f"{name} may have {MAX_ID_CHARACTERS} characters", param=name)
    if len(request.cache_salt) not in (0, SALT_BYTES):
        raise invalid(
            f"cache_salt must be {SALT_BYTES} bytes or empty, got {len(request.cache_salt)}", param="cache_salt"
        )


def timeout_of(request: AnyRequest, remaining: float | None, longest: float) -> float:
    """Seconds the request may take: the least of its own wish, of the call's deadline and of the service's cap."""
    wish = request.timeout if request.HasField("timeout") else longest
    if not 0 < wish < math.inf:
        raise invalid(f"timeout must be a number of seconds above 0, got {wish:g}", param="timeout")
    return min(wish, longest, math.inf if remaining is None else remaining)


def check_forget(request: common_pb2.ForgetRequest) -> None:
    """Raise unless keys and digests are 32 bytes each and not too many."""
    for name in ("keys", "image_digests"):
        values = getattr(request, name)
        if len(values) > MAX_FORGOTTEN:
            raise invalid(f"{name} may hold {MAX_FORGOTTEN} entries, got {len(values)}", param=name)
        if any(len(value) != DIGEST_BYTES for value in values):
            raise invalid(f"{name} must be {DIGEST_BYTES} bytes each", param=name)


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
        image_tokens=sum(span.tokens for span in prompt.images),
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
