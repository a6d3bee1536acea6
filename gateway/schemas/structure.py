"""The form an answer must have, as OpenAI's API, vLLM's and ours say it; and the wire form of all of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import Discriminator, Field, Tag

from gateway.schemas.body import Body, by_field
from gateway.schemas.neutral import Neutral
from lookonce.core.errors import invalid
from protos.lookonce.v1 import language_pb2

JsonSchema = Annotated[dict[str, Any] | bool, Field(description="a JSON Schema")]
Source = Annotated[str, Field(min_length=1, max_length=200_000)]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000)]
ANY_OBJECT = '{"type": "object"}'


class NamedSchema(Body):
    """OpenAI's: answers are held to the schema whether or not `strict` is said."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: Annotated[str, Field(max_length=10_000)] | None = None
    schema_: Annotated[JsonSchema, Field(alias="schema")] = True
    strict: bool | None = None


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("(text)")]
    | Annotated[ObjectFormat, Tag("(json_object)")]
    | Annotated[SchemaFormat, Tag("(json_schema)")],
    by_field("type", "text", "json_object", "json_schema", others="other forms are not supported"),
]


def _text_or_schema(value: Any) -> str:
    return "(text)" if isinstance(value, str) else "(object)"


SchemaOrText = Annotated[
    Annotated[Source, Tag("(text)")] | Annotated[JsonSchema, Tag("(object)")], Discriminator(_text_or_schema)
]


class StructuredOutputs(Body):
    """vLLM's: one of the first five."""

    json_: Annotated[SchemaOrText | None, Field(alias="json", description="a JSON Schema, or its text")] = None
    json_object: Annotated[Literal[True] | None, Field(description="any JSON object")] = None
    regex: Source | None = None
    choice: Choices | None = None
    grammar: Annotated[Source | None, Field(description="Lark's notation, as llguidance reads it")] = None
    structural_tag: Annotated[Any, Neutral("a structural tag is")] = None
    whitespace_pattern: Annotated[Any, Neutral("another white space is")] = None
    disable_any_whitespace: bool | None = None  # there is none but ", " and ": "
    disable_additional_properties: bool | None = None  # an object with `properties` has no others
    disable_fallback: bool | None = None  # there is one library


class StructureFields(Body):
    """Of a request: at most one of them is given."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[SchemaOrText | None, Field(description="`structured_outputs.json`, formerly")] = None
    guided_regex: Annotated[Source | None, Field(description="`structured_outputs.regex`")] = None
    guided_choice: Annotated[list[str] | None, Field(max_length=1000, description="`structured_outputs.choice`")] = None
    guided_grammar: Annotated[Source | None, Field(description="`structured_outputs.grammar`")] = None


def structure_of(body: StructureFields) -> language_pb2.Structure | None:
    """What the answer must be; None: any text. Raises INVALID_ARGUMENT for two forms at once."""
    given = {f"response_format{name}": ("json", schema) for name, schema in _formats(body.response_format)}
    vllm = body.structured_outputs or StructuredOutputs()
    for name in ("json", "json_object", "regex", "choice", "grammar"):
        given[f"structured_outputs.{name}"] = (name, getattr(vllm, "json_" if name == "json" else name))
        given[f"guided_{name}"] = (name, getattr(body, f"guided_{name}", None))
    found = [wire(field, **{name: value}) for field, (name, value) in given.items() if value not in (None, [])]
    return one_of(found)


def one_of(found: list[language_pb2.Structure]) -> language_pb2.Structure | None:
    """The only one, if there is any. Raises INVALID_ARGUMENT naming two."""
    if len(found) > 1:
        first, second = found[0].field, found[1].field
        raise invalid(f"'{first}' and '{second}' ask for two forms of one answer: give one of them", param=second)
    return found[0] if found else None


def wire(
    field: str,
    *,
    json: str | dict[str, Any] | bool | None = None,
    json_object: bool | None = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
) -> language_pb2.Structure:
    """The wire form of whichever is given; `field` is what errors call it."""
    if json is not None or json_object:
        schema = ANY_OBJECT if json is None else json if isinstance(json, str) else orjson.dumps(json).decode()
        return language_pb2.Structure(field=field, json_schema=schema)
    if choice is not None:
        return language_pb2.Structure(field=field, choices=language_pb2.Structure.Choices(texts=choice))
    return language_pb2.Structure(field=field, regex=regex, grammar=grammar)


def _formats(wanted: ResponseFormat | None) -> list[tuple[str, Any]]:
    if isinstance(wanted, ObjectFormat):
        return [("", ANY_OBJECT)]
    return [(".json_schema.schema", wanted.json_schema.schema_)] if isinstance(wanted, SchemaFormat) else []
