"""Fields that clients send although nothing here answers to them: taken where they ask for nothing, refused by name
where they would change the answer. This table is the one place that says which values ask for nothing."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from gateway.schemas.body import Body

Hint = Annotated[str, Field(max_length=512)]
Hints = Annotated[dict[str, Hint], Field(max_length=16)]


class Neutral:
    """The type of a field that takes null and these `values` alone; `what` (a noun with is or are) is not supported."""

    def __init__(self, what: str, *values: Any) -> None:
        self.what = what
        self.values = (None, *values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self.values), "description": f"{self.what} not supported"}

    @property
    def allowed(self) -> str:
        """The values as JSON, in words."""
        shown = [orjson.dumps(value).decode() for value in self.values]
        return " or ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))

    def _check(self, value: Any) -> Any:
        if any(isinstance(value, bool) == isinstance(known, bool) and value == known for known in self.values):
            return value
        raise PydanticCustomError("unsupported", "unsupported", {"what": self.what, "allowed": self.allowed})


_TOOLS = "functions by their former fields are"
_TEMPLATE = "another chat template is"
_TOKENS = "control of single tokens is"
_REASONING = "reasoning is"


class RequestFields(Body):
    """Of a request: OpenAI's first, then those of vLLM and its kin."""

    # Said to the server, not to the model: any value is taken.
    user: Hint | None = None
    safety_identifier: Hint | None = None
    metadata: Hints | None = None
    prompt_cache_key: Hint | None = None
    prompt_cache_retention: Hint | None = None
    prompt_cache_options: Hints | None = None
    request_id: Hint | None = None

    audio: Annotated[Any, Neutral("audio output is")] = None
    function_call: Annotated[Any, Neutral(_TOOLS, "none", "auto")] = None
    functions: Annotated[Any, Neutral(_TOOLS, [])] = None
    modalities: Annotated[Any, Neutral("output other than text is", ["text"], [])] = None
    moderation: Annotated[Any, Neutral("moderation of a chat is")] = None
    prediction: Annotated[Any, Neutral("predicted output is")] = None
    reasoning_effort: Annotated[Any, Neutral(_REASONING, "none")] = None
    service_tier: Annotated[Any, Neutral("another service tier is", "auto", "default")] = None
    store: Annotated[Any, Neutral("storing answers is", False)] = None
    verbosity: Annotated[Any, Neutral("another verbosity is", "medium")] = None
    web_search_options: Annotated[Any, Neutral("web search is")] = None

    add_generation_prompt: Annotated[Any, Neutral(_TEMPLATE, True)] = None
    add_special_tokens: Annotated[Any, Neutral(_TEMPLATE, False)] = None
    best_of: Annotated[Any, Neutral("choosing among several answers is", 1)] = None
    cache_salt: Annotated[Any, Neutral("a cache salt is")] = None
    chat_template: Annotated[Any, Neutral(_TEMPLATE)] = None
    chat_template_kwargs: Annotated[Any, Neutral(_TEMPLATE, {})] = None
    continue_final_message: Annotated[Any, Neutral("continuing a message is", False)] = None
    documents: Annotated[Any, Neutral("a list of documents is", [])] = None
    echo: Annotated[Any, Neutral("echoing the prompt is", False)] = None
    include_reasoning: Annotated[Any, Neutral(_REASONING, True, False)] = None
    include_stop_str_in_output: Annotated[Any, Neutral("keeping the stop string is", False)] = None
    length_penalty: Annotated[Any, Neutral("beam search is", 1.0)] = None
    logits_processors: Annotated[Any, Neutral(_TOKENS, [])] = None
    priority: Annotated[Any, Neutral("another priority is", 0)] = None
    prompt_logprobs: Annotated[Any, Neutral("logprobs of the prompt are")] = None
    return_token_ids: Annotated[Any, Neutral("token ids are", False)] = None
    return_tokens_as_token_ids: Annotated[Any, Neutral("token ids are", False)] = None
    spaces_between_special_tokens: Annotated[Any, Neutral("showing special tokens is", True, False)] = None
    truncate_prompt_tokens: Annotated[Any, Neutral("cutting the prompt is")] = None
    use_beam_search: Annotated[Any, Neutral("beam search is", False)] = None


class MessageFields(Body):
    """Of every message. The model is shown no `name`."""

    name: Hint | None = None
    cache_control: Hints | None = None


class AnswerFields(MessageFields):
    """Of an earlier answer, as clients hand it back."""

    annotations: Annotated[Any, Neutral("annotations are", [])] = None
    audio: Annotated[Any, Neutral("audio is")] = None
    function_call: Annotated[Any, Neutral(_TOOLS)] = None
    reasoning: Annotated[Any, Neutral(_REASONING, "")] = None
    reasoning_content: Annotated[Any, Neutral(_REASONING, "")] = None
    refusal: Annotated[Any, Neutral("a refusal is")] = None


class PartFields(Body):
    """Of every part of a message: where others' caches end. Ours finds what it knows by itself."""

    cache_control: Hints | None = None
    prompt_cache_breakpoint: Hints | None = None
