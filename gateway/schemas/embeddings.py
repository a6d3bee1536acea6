"""Bodies and answers about vectors: OpenAI's embeddings, with images as Jina and vLLM have them; Cohere's, Jina's and
vLLM's rerank; a search over the images that are kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from gateway.schemas.body import Body, by_field
from gateway.schemas.neutral import Hint, Neutral
from gateway.schemas.requests import (
    AnyPart,
    ImageUrlPart,
    ProcessorOptions,
    SystemMessage,
    Text,
    TextPart,
    UserMessage,
)
from gateway.schemas.responses import Answered, ImageObject

MOST_PARTS = 256
ModelName = Annotated[str, Field(max_length=512)]
Instruction = Annotated[
    str, Field(max_length=4096, description="in place of the model's own; not for models of token vectors")
]
InputType = Annotated[
    Literal["query", "document"],
    Field(description="which prompt, of a model that has one for each; a text is a query unless it is said"),
]
TopN = Annotated[int, Field(ge=1, le=100_000, description="only so many, the best ones")]
Parts = Annotated[list[AnyPart], Field(min_length=1, max_length=MOST_PARTS)]


class TextAndImage(Body):
    """A text, an image, or both as one. `image` is an id or alias of a kept image, an https: or data: URL, or base64;
    `content` are a chat's parts in their place."""

    text: Text | None = None
    image: Text | None = None
    content: Parts | None = None

    @model_validator(mode="after")
    def _something(self) -> TextAndImage:
        if (self.content is None) == (self.text is None and self.image is None):
            raise ValueError("give 'text', 'image' or both, or 'content' alone")
        return self


def _form(value: Any) -> str:
    """Which form of an input is meant."""
    if isinstance(value, str):
        return "(text)"
    if isinstance(value, list):
        return "(parts)"
    kind = value.get("type") if isinstance(value, dict) else None
    if kind is None:
        return "(object)" if isinstance(value, dict) else "(text)"
    return "(image_url)" if kind == "image_url" else "(part)"


Input = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[TextAndImage, Tag("(object)")]
    | Annotated[TextPart, Tag("(part)")]
    | Annotated[ImageUrlPart, Tag("(image_url)")]
    | Annotated[Parts, Tag("(parts)")],
    Discriminator(_form),
]
"""One input: a text; an object of a text, an image or both; one part of a chat; or several as one."""


def _one_or_many(value: Any) -> str:
    """OpenAI's `input` is one or a list of them. A list of numbers is one of token ids."""
    if not isinstance(value, list):
        return "(one)"
    return "(tokens)" if _is_tokens(value) or (value and _is_tokens(value[0])) else "(many)"


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int) and not isinstance(value[0], bool)


Inputs = Annotated[
    Annotated[Input, Tag("(one)")]
    | Annotated[list[Input], Field(min_length=1), Tag("(many)")]
    | Annotated[Any, Neutral("a list of token ids is"), Tag("(tokens)")],
    Discriminator(_one_or_many),
]


class VectorFields(Body):
    """Of every request for vectors."""

    model: ModelName | None = None
    instruction: Instruction | None = None
    mm_processor_kwargs: ProcessorOptions | None = None
    user: Hint | None = None
    priority: Annotated[Any, Neutral("another priority is", 0)] = None
    truncate_prompt_tokens: Annotated[Any, Neutral("cutting the prompt is")] = None


AnyMessage = Annotated[
    Annotated[SystemMessage, Tag("(system)")]
    | Annotated[SystemMessage, Tag("(developer)")]
    | Annotated[UserMessage, Tag("(user)")],
    by_field("role", "system", "developer", "user", others="no answer is part of a vector's prompt"),
]


class EmbeddingsRequest(VectorFields):
    """POST /v1/embeddings. `input` is one input or a list of them; `messages` in its place is vLLM's form of one: a
    user's message, and a system message that is its instruction."""

    input: Inputs | None = None
    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=2)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    input_type: InputType | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> EmbeddingsRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give one of 'input' and 'messages'")
        if self.messages is not None:
            roles = [message.role for message in self.messages]
            if roles[-1] != "user" or "user" in roles[:-1]:
                raise ValueError("'messages' must be a user's message, with a system message before it or none")
            if self.instruction is not None and len(roles) == 2:
                raise ValueError("give one of 'instruction' and a system message")
        return self


class RerankRequest(VectorFields):
    """POST /v1/rerank."""

    query: Input
    documents: Annotated[list[Input], Field(min_length=1)]
    top_n: TopN | None = None
    return_documents: Annotated[bool, Field(description="show each document beside its score")] | None = None
    max_tokens_per_doc: Annotated[Any, Neutral("cutting documents is")] = None


class SearchRequest(VectorFields):
    """POST /v1/images/search: which of the kept images are like a text, an image, or both."""

    query: Input
    top_n: Annotated[int, Field(ge=1, le=1000, description="only so many, the best ones")] = 10
    limit: Annotated[int, Field(ge=1, description="most images that are looked at, the newest ones")] | None = None
    after: Annotated[str, Field(max_length=128, description="the id of the last image looked at before")] | None = None


class EmbeddingObject(Answered):
    """The vector of one input, or a vector of each of its tokens."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | list[list[float]] | str = Field(description="numbers, or base64 of little-endian float32")
    shape: list[int] | None = Field(None, description="only of token vectors: how many, and of how many numbers")


class PromptUsage(Answered):
    """Tokens of all prompts."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = Field(None, description="`image_tokens` among them")


class VectorReceipt(Answered):
    """What the vectors took."""

    encoded: int = Field(description="images that were not encoded before")
    prefill_tokens: int = Field(description="tokens computed now")
    kept: int = Field(description="vectors of kept images that were there already")


class EmbeddingList(Answered):
    """OpenAI's list of embeddings, with a receipt."""

    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: PromptUsage
    receipt: VectorReceipt


class RankedDocument(Answered):
    """As it was given; an image by its id."""

    text: str | None = None
    image: str | None = None
    content: list[dict[str, Any]] | None = None


class Ranked(Answered):
    """A document and how it compares."""

    index: int = Field(description="its place among `documents`")
    relevance_score: float = Field(description="cosine of pooled vectors; MaxSim of token vectors")
    document: RankedDocument | None = None


class RerankResult(Answered):
    """The documents, best first."""

    id: str
    model: str
    results: list[Ranked]
    usage: PromptUsage
    receipt: VectorReceipt


class FoundImage(Answered):
    """A kept image and how it compares."""

    id: str
    score: float = Field(description="cosine of pooled vectors; MaxSim of token vectors")
    image: ImageObject


class FoundImages(Answered):
    """The kept images, best first."""

    object: Literal["list"]
    model: str
    data: list[FoundImage]
    searched: int = Field(description="images that were compared")
    skipped: list[str] = Field(description="ids of those that could not be: their files are gone, or no image")
    last_id: str | None = Field(description="the `after` of a search over older images")
    has_more: bool = Field(description="whether there are older ones")
    usage: PromptUsage
    receipt: VectorReceipt
