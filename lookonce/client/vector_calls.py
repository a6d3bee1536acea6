"""Requests for vectors, ranks and searches, and what they return. No I/O here."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from lookonce.client.calls import Call, part_of
from lookonce.client.request_options import without_none
from lookonce.client.response_types import ImageInfo, Json
from lookonce.core.errors import invalid

Vector = list[float] | list[list[float]]
"""Numbers of length 1; of models of token vectors a list of such."""


class VectorOptions(TypedDict, total=False):
    """What holds for any request for vectors. `instruction` stands in place of the model's own."""

    model: str
    instruction: str


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document by its place in the list that was given, and how it compares with the query."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Found:
    """A kept image and how it compares with the query."""

    image: ImageInfo
    score: float

    @property
    def id(self) -> str:
        """The image's."""
        return self.image.id


@dataclass(frozen=True, slots=True)
class Search:
    """What a search found, best first. `searched` images were compared, those of `skipped` could not be; with
    `has_more` there are older ones, to be searched after `last_id`."""

    found: list[Found]
    searched: int
    skipped: list[str]
    has_more: bool
    last_id: str | None


def embed(
    inputs: Sequence[Any],
    options: VectorOptions,
    dimensions: int | None,
    input_type: Literal["query", "document"] | None,
) -> Call[list[Vector]]:
    """A vector of each input."""
    if isinstance(inputs, str) or not inputs:
        raise invalid("inputs must be a list of at least one text or image", param="input")
    body = {"input": [_input(item) for item in inputs], "encoding_format": "base64", **options}
    more = without_none({"dimensions": dimensions, "input_type": input_type})
    return Call("POST", "/v1/embeddings", _vectors, {"json": body | more})


def rerank(query: Any, documents: Iterable[Any], options: VectorOptions, top_n: int | None) -> Call[list[Ranked]]:
    """The documents by their scores, best first."""
    asked = {"query": _input(query), "documents": [_input(item) for item in documents], "return_documents": False}
    body = without_none({**asked, **options, "top_n": top_n})

    def read(json: Json) -> list[Ranked]:
        return [Ranked(item["index"], item["relevance_score"]) for item in json["results"]]

    return Call("POST", "/v1/rerank", read, {"json": body})


def search(query: Any, options: VectorOptions, top_n: int, limit: int | None, after: str | None) -> Call[Search]:
    """The kept images by their scores, best first."""
    body = without_none({"query": _input(query), "top_n": top_n, "limit": limit, "after": after, **options})

    def read(json: Json) -> Search:
        found = [Found(ImageInfo.of(item["image"]), item["score"]) for item in json["data"]]
        return Search(found, json["searched"], list(json["skipped"]), json["has_more"], json["last_id"])

    return Call("POST", "/v1/images/search", read, {"json": body})


def _input(item: Any) -> Any:
    """A string, an image of this client, one of the API's objects; or several as one, in a list."""
    if isinstance(item, str):
        return item
    return [part_of(one) for one in item] if isinstance(item, list | tuple) else part_of(item)


def _vectors(json: Json) -> list[Vector]:
    return [_vector(item) for item in json["data"]]


def _vector(item: Json) -> Vector:
    numbers = array("f", base64.b64decode(item["embedding"]))
    if sys.byteorder == "big":
        numbers.byteswap()
    if "shape" not in item:
        return numbers.tolist()
    width = item["shape"][1]
    return [numbers[start : start + width].tolist() for start in range(0, len(numbers), width)]
