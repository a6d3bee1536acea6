"""What the API answers, for the OpenAPI document: the routes build their JSON by hand, tests hold it against these."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")


class Answered(BaseModel):
    """Base of answers: fields that are not here are not sent."""

    model_config = ConfigDict(extra="forbid")


class Listed(Answered, Generic[T]):
    """A page of items."""

    object: Literal["list"]
    data: list[T]
    first_id: str | None
    last_id: str | None = Field(description="the `after` of the next page")
    has_more: bool


class ErrorDetail(Answered):
    """What went wrong."""

    message: str
    type: str
    param: str | None = Field(description="the request field at fault")
    code: str


class ErrorBody(Answered):
    """Every error has this form (OpenAI's)."""

    error: ErrorDetail


class ImageObject(Answered):
    """An image that is kept."""

    id: str = Field(
        description="made from the file's bytes: the same file has the same id", pattern="^img_[a-z2-7]{52}$"
    )
    object: Literal["image"]
    bytes: int = Field(ge=0, description="size of the file")
    width: int | None = Field(description="pixels, as the model sees the image")
    height: int | None = Field(description="pixels, as the model sees the image")
    tokens: int | None = Field(description="tokens of the image in a prompt")
    status: Literal["ready"]
    created_at: int = Field(description="Unix seconds")
    expires_at: int | None = Field(description="Unix seconds; null when pinned")
    pinned: bool = Field(description="whether it is kept until it is erased")
    aliases: list[str] = Field(description="names given to it")
    cached: bool | None = Field(None, description="only on upload: whether nothing had to be encoded")
    encode_ms: float | None = Field(None, description="only on upload: milliseconds of encoding")
    prefilled: bool | None = Field(None, description="only on upload with `prefill`: the prefix of questions is filled")
    notice: str | None = Field(
        None, description="only on upload: why the image was made smaller, and the setting that changes that"
    )


class ImageList(Listed[ImageObject]):
    """A page of images, newest first."""


class ErasedImage(Answered):
    """An image that is gone."""

    id: str
    object: Literal["image"]
    deleted: Literal[True]
    complete: bool = Field(description="false when a process could not confirm: erasure then goes on by itself")


class PromptTokensDetails(Answered):
    """Parts of the prompt."""

    cached_tokens: int = Field(description="tokens whose KV was reused")
    image_tokens: int


class RunningUsage(Answered):
    """Tokens so far."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Usage(RunningUsage):
    """Tokens, as OpenAI counts them."""

    prompt_tokens_details: PromptTokensDetails


class Receipt(Answered):
    """What an answer took and what was reused for it."""

    embedding: Literal["hit", "miss", "coalesced"] | None = Field(description="null without images")
    prefix: Literal["hit", "miss"] = Field(description="whether KV of the image's prefix was reused")
    encode_ms: float
    prefill_tokens: int
    cached_tokens: int
    queue_ms: float
    ttft_ms: float = Field(description="milliseconds to the first token, in the language service")
    model: str
    fingerprint: str = Field(description="of the encoder")
    text_first: bool | None = Field(
        None, description="true: text before the image kept its KV from being shared (see `image_first`)"
    )
    variant: str | None = Field(None, description="of the model, where several are served side by side")


class Answer(Answered):
    """The answer to one question, or its error."""

    id: str = Field(description="the question's own, or its position")
    text: str | None = Field(None, description="the answer; of a closed type the likeliest one")
    type: str | None = Field(None, description="of the question, unless that is text")
    value: Any = Field(
        None, description="of JSON; yes or no as a boolean; the expected value on a scale; labels that hold"
    )
    probability: float | None = Field(None, description="of yes")
    choices: dict[str, float] | None = Field(
        None, description="probability of each choice, or of each place on a scale"
    )
    labels: dict[str, float] | None = Field(None, description="probability of each label, by itself")
    prompts: int | None = Field(None, description="that were scored for it, if more than one")
    logprobs: dict[str, float] | None = Field(None, description="log-probability of each choice's tokens")
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    usage: Usage | None = None
    receipt: Receipt | None = None
    error: ErrorDetail | None = None


class Answers(Answered):
    """The answers in the order asked."""

    object: Literal["list"]
    image: str
    model: str
    answers: list[Answer]


class TopLogprob(Answered):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, with the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(Answered):
    """Of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


class FunctionCall(Answered):
    """Of a function of the request; `arguments` are a JSON object's text."""

    name: str
    arguments: str


class AnsweredCall(Answered):
    """A call that the answer wants made."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(Answered):
    """What the model said; `content` is null where that is calls alone."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(Answered):
    """One of n answers."""

    index: int
    message: ChatMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Answered):
    """OpenAI's chat completion, with a receipt."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None
    receipt: Receipt


class FunctionDelta(Answered):
    """What a chunk adds to a call; the name comes with the first."""

    name: str | None = None
    arguments: str


class CallDelta(Answered):
    """Of call number `index`; id and type come with the first."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Answered):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(Answered):
    """A chunk of one of n answers."""

    index: int
    delta: ChatDelta
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatCompletionChunk(Answered):
    """OpenAI's chunk; the last one has the receipt, and the usage when asked for; each has it so far when asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | RunningUsage | None = None
    receipt: Receipt | None = None


class ModerationResult(Answered):
    """The verdict on one input. Maps have the policy's category ids as keys."""

    flagged: bool = Field(description="whether any category is")
    categories: dict[str, bool]
    category_scores: dict[str, float] = Field(description="probability of the category's positive choices")
    category_applied_input_types: dict[str, list[Literal["image", "text"]]]
    severity: Literal["low", "medium", "high", "critical"] | None = Field(description="the highest that is flagged")
    follow_ups: dict[str, list[str]] = Field(description="answers to the follow-up questions of flagged categories")
    receipt: dict[str, Any] | None = Field(description="as in chat completions, over all calls for this result")


class ModerationObject(Answered):
    """OpenAI's moderation object."""

    id: str
    model: str
    results: list[ModerationResult]


class VectorFacts(Answered):
    """Of an embedding model."""

    width: int = Field(description="numbers of a vector")
    of_tokens: bool = Field(description="a vector of each token, compared by MaxSim; else one of each input")


class Model(Answered):
    """OpenAI's model, with its limits."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    family: str = Field(description="model_type of its config.json; empty: not known")
    context_length: int = Field(description="tokens of prompt and answer together")
    max_tokens: int = Field(description="most tokens of an answer")
    sampling_defaults: dict[str, float] = Field(
        default={}, description="sampling parameters of a request that leaves them out, as the model's files say"
    )
    engine: str = Field(default="", description="packed, or plain: one request at a time, no shared prefix")
    engine_note: str = Field(default="", description="why the plain engine serves it")
    vectors: VectorFacts | None = Field(None, description="only of an embedding model")


class ModelList(Answered):
    """The names of the one model."""

    object: Literal["list"]
    data: list[Model]


class Health(Answered):
    """The process runs."""

    status: Literal["ok"]


class Version(Answered):
    """What runs."""

    version: str


class ServiceCount(Answered):
    """How many endpoints answer."""

    serving: int
    configured: int


class ReadinessParts(Answered):
    """What the gateway leans on."""

    language: ServiceCount
    vision: ServiceCount
    image_store: Literal["ok", "degraded"]


class Readiness(Answered):
    """Whether requests can be answered."""

    status: Literal["ready", "degraded", "unavailable"]
    parts: ReadinessParts


class ResponseUsage(Answered):
    """Of a response."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(Answered):
    """OpenAI's response; `output` has messages and calls of functions in order."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress"]
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, str]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: str
    usage: ResponseUsage | None
    user: str | None
    receipt: Receipt | None = None


class ResponseEvent(Answered):
    """An event of a streamed response: what it holds follows from its type, as in OpenAI's API."""

    type: str
    sequence_number: int | None = None
    response: ResponseObject | None = None


class ErasedResponse(Answered):
    """A response that was erased."""

    id: str
    object: Literal["response"]
    deleted: bool


class MessageUsage(Answered):
    """Of a message; input that was read from a cache is counted apart."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class MessageObject(Answered):
    """Anthropic's message; `content` has text and calls of functions in order."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage
    receipt: Receipt | None = None


class MessageEvent(Answered):
    """An event of a streamed message: what it holds follows from its type, as in Anthropic's API."""

    type: str
    message: MessageObject | None = None
    index: int | None = None
    content_block: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    usage: MessageUsage | None = None
    receipt: Receipt | None = None
