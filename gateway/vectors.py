"""Vectors of texts and images by an embedding model, and their comparison: /v1/embeddings, /v1/rerank and search. What
was made of kept images is kept beside them. No HTTP here."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gateway.answers import GRACE_SECONDS
from gateway.conversation import Caller, ImagePart
from gateway.images.encoder import Resolved
from gateway.images.library import ImageLibrary
from gateway.images.vector_cache import Vector, VectorKey
from gateway.metrics import TOKENS, VARIANT_REQUESTS, VARIANT_SECONDS, VECTORS
from gateway.routing.retries import STALE, Attempts
from gateway.routing.variants import EMBED, Variants
from lookonce.core.errors import ErrorKind, LookonceError
from lookonce.core.rpc.client import LanguageClient
from lookonce.core.rpc.messages import from_proto
from lookonce.core.tasks import gather_or_end
from protos.lookonce.v1 import language_pb2

AT_ONCE = 8
"""Images of one request that are encoded at the same time."""
LOADED_AT_ONCE = 64
"""Kept vectors of one request that are read at the same time."""
CALL_INPUTS, CALL_SIZE = 64, 65_536
"""Most inputs of one call to a service, and of their characters and image tokens: vectors of all fit into a message."""
MOST_BYTES = 256 << 20
"""Of the vectors of one request that are held at once."""
BLOCK = 64
"""Documents that are compared with a query at a time: so many vectors are held."""
TEXTS, TEXT_CHARS, TEXT_ROWS = 1024, 2048, 256
"""Vectors of texts that are remembered: how many, and the longest text and most rows of such."""
_OF_ONE_IMAGE = STALE | {ErrorKind.NOT_FOUND, ErrorKind.IMAGE_INVALID, ErrorKind.IMAGE_TOO_LARGE}
_Image = tuple[bytes, str]  # digest and bounds


@dataclass(frozen=True)
class VectorInput:
    """What a vector is made of."""

    parts: tuple[str | ImagePart, ...]
    instruction: str | None = None  # None: the model's own
    query: bool = False  # what others are compared with

    @property
    def images(self) -> Iterator[ImagePart]:
        """Those among its parts."""
        return (part for part in self.parts if isinstance(part, ImagePart))

    @property
    def lone_text(self) -> str | None:
        """The text, of an input that is nothing else."""
        only = self.parts[0] if len(self.parts) == 1 else None
        return only if isinstance(only, str) else None

    @property
    def lone_image(self) -> ImagePart | None:
        """The image, of an input that is nothing else: as a query it has the same prompt."""
        only = self.parts[0] if len(self.parts) == 1 and self.instruction is None else None
        return only if isinstance(only, ImagePart) else None


@dataclass
class Made:
    """Vectors in the order asked, and what they took."""

    found: list[Vector | LookonceError]
    model: str = ""  # digest of the one that made them
    prefill_tokens: int = 0
    encoded: int = 0  # images that were not encoded before
    kept: int = 0  # vectors that were there already


@dataclass
class Compared:
    """How documents compare with a query, in the order asked, and what that took."""

    query: Vector
    scores: list[float | LookonceError] = field(default_factory=list)
    tokens: int = 0  # of all prompts
    image_tokens: int = 0
    prefill_tokens: int = 0
    encoded: int = 0
    kept: int = 0

    def add(self, made: Made) -> None:
        """Count what vectors took."""
        for one in made.found:
            if isinstance(one, Vector):
                self.tokens, self.image_tokens = self.tokens + one.tokens, self.image_tokens + one.image_tokens
        self.prefill_tokens += made.prefill_tokens
        self.encoded, self.kept = self.encoded + made.encoded, self.kept + made.kept


class TextVectors:
    """Vectors of short texts in this process's memory, least recently used out first: the same query comes again, with
    the next page or a minute later. A tenant finds its own only."""

    def __init__(self) -> None:
        self._vectors: OrderedDict[tuple[object, ...], Vector] = OrderedDict()

    def get(self, one: VectorInput, model: str, caller: Caller) -> Vector | None:
        """The vector that the model of this digest made of an input, if it is a text."""
        key = self._key(one, model, caller)
        if key in self._vectors:
            self._vectors.move_to_end(key)
        return self._vectors.get(key)

    def put(self, one: VectorInput, model: str, caller: Caller, vector: Vector) -> None:
        """Remember a vector of a short text."""
        text = one.lone_text
        if text is None or len(text) > TEXT_CHARS or len(vector.rows) > TEXT_ROWS:
            return
        self._vectors[self._key(one, model, caller)] = vector
        while len(self._vectors) > TEXTS:
            self._vectors.popitem(last=False)

    def _key(self, one: VectorInput, model: str, caller: Caller) -> tuple[object, ...]:
        return caller.tenant.name, model, one.lone_text, one.instruction, one.query


class VectorMaker:
    """Asks the language replicas of the embedding model."""

    def __init__(self, images: ImageLibrary, variants: Variants, *, reconnect_wait: float) -> None:
        self.images, self.variants, self.texts = images, variants, TextVectors()
        self.reconnect_wait = reconnect_wait  # seconds

    async def compare(
        self, query: VectorInput, documents: Sequence[VectorInput], model: str, caller: Caller
    ) -> Compared:
        """How each document compares with the query, or what is wrong with that document alone. `model` as in `make`.
        Raises what is wrong with the query, and what concerns all of them."""
        deadline = time.monotonic() + caller.timeout
        asked = await self.make([query], model, caller, deadline)
        (first,) = asked.found
        if isinstance(first, LookonceError):
            raise first
        compared = Compared(first)
        compared.add(asked)
        for start in range(0, len(documents), BLOCK):
            made = await self.make(documents[start : start + BLOCK], asked.model, caller, deadline)
            if made.model != asked.model:  # another model has come
                return await self.compare(query, documents, made.model, caller)
            compared.add(made)
            compared.scores += await asyncio.to_thread(_scores, first, made.found)
        return compared

    async def make(
        self, inputs: Sequence[VectorInput], model: str, caller: Caller, deadline: float | None = None
    ) -> Made:
        """A vector of each input, or what is wrong with that input alone. `model`: the digest that the vectors are
        expected to have, for those that are kept; `deadline`: monotonic seconds. Raises what concerns all of them."""
        deadline = time.monotonic() + caller.timeout if deadline is None else deadline
        making = _Making(self, inputs, model, caller, deadline)
        made = await making.run(making.make)
        done = [vector for vector in made.found if isinstance(vector, Vector)]
        TOKENS.labels("prompt").inc(made.prefill_tokens)
        VECTORS.labels("kept").inc(made.kept)
        VECTORS.labels("made").inc(len(done) - made.kept)
        return made


class _Making(Attempts[LanguageClient]):
    """The tries of one request. Its images are encoded by the variant that makes the vectors."""

    def __init__(
        self, maker: VectorMaker, inputs: Sequence[VectorInput], model: str, caller: Caller, deadline: float
    ) -> None:
        self._maker, self._inputs, self._model, self._caller = maker, inputs, model, caller
        self._deadline = deadline
        self._images = {_name(part): part for one in inputs for part in one.images}
        self._resolved: dict[_Image, Resolved | LookonceError] = {}
        self._stale: set[_Image] = set()
        first = next(iter(self._images.values()), None)
        key = first.record.digest if first is not None else uuid.uuid4().bytes
        text = next((part for part in inputs[0].parts if isinstance(part, str)), "")
        routed = key if first is not None else hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        candidates = maker.variants.in_order(key, EMBED)
        super().__init__(candidates, lambda variant: variant.language, routed, reconnect_wait=maker.reconnect_wait)

    async def prepare(self) -> None:
        """See Attempts: the embeddings of the variant that makes the vectors."""
        self._entered = time.perf_counter()
        self._begin()
        await self._resolve(self._images, renew=False)

    def _begin(self) -> None:
        self._made = Made([LookonceError(ErrorKind.INTERNAL, "not made")] * len(self._inputs))
        self._waiting_for = dict.fromkeys(range(len(self._inputs)))  # places that have no vector yet
        self._bytes = 0  # of the vectors

    async def renew(self, error: LookonceError) -> bool:
        """See Attempts: encode again what was lost."""
        stale = {name: self._images[name] for name in self._stale}
        await self._resolve(stale, renew=True)
        return bool(stale)

    def left(self, outcome: str) -> None:
        """See Attempts: count the request and its time."""
        VARIANT_REQUESTS.labels(self.served.name, outcome).inc()
        VARIANT_SECONDS.labels(self.served.name).observe(time.perf_counter() - self._entered)

    async def make(self, client: LanguageClient) -> Made:
        """All that is still to be made, in as many calls as that takes."""
        await self._take_kept()
        for places in self._calls():
            response = await self._call(client, places)
            if response.vector_model != self._model:  # another model has come: nothing goes with what was kept
                self._model, encoded = response.vector_model, self._made.encoded
                self._begin()
                self._made.encoded = encoded
                return await self.make(client)
            await self._take_all(places, response)
        if self._stale and not self.renewed:
            raise LookonceError(ErrorKind.EMBEDDING_MISSING, "the embedding of an image is lost", param="image")
        self._made.model = self._model
        return self._made

    async def _resolve(self, images: dict[_Image, ImagePart], *, renew: bool) -> None:
        library, tenant = self._maker.images, self._caller.tenant
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(name: _Image, part: ImagePart) -> None:
            try:
                if renew:
                    async with gate:
                        found = await library.renew(
                            part.record, tenant, part.bounds, served=self.served, data=part.data
                        )
                elif part.resolved is not None and part.resolved.variant == self.served.name:
                    found = part.resolved
                else:
                    async with gate:
                        found = await library.resolve(
                            part.record, tenant, part.bounds, served=self.served, data=part.data
                        )
            except LookonceError as error:
                if error.kind not in _OF_ONE_IMAGE:
                    raise
                self._resolved[name] = error
            else:
                self._made.encoded += found.outcome == "miss"
                self._resolved[name] = found

        await gather_or_end([one(name, part) for name, part in images.items()])

    async def _take_kept(self) -> None:
        """Vectors of images that were made before, and what became of images that can't be encoded."""
        cache, model = self._maker.images.vectors, self._model

        async def look(place: int) -> None:
            one = self._inputs[place]
            failed = next((self._failure(part) for part in one.images if self._failure(part)), None)
            if failed is not None:
                return self._settle(place, failed)
            kept, part = self._maker.texts.get(one, model, self._caller), one.lone_image
            if part is not None:
                kept = await cache.get(part.record, VectorKey(self._reference(part).reference.key, model))
            if kept is not None:
                self._made.kept += 1
                self._settle(place, kept)
            return None

        places = list(self._waiting_for)
        for start in range(0, len(places), LOADED_AT_ONCE):
            await asyncio.gather(*(look(place) for place in places[start : start + LOADED_AT_ONCE]))

    def _failure(self, part: ImagePart) -> LookonceError | None:
        found = self._resolved[_name(part)]
        return found if isinstance(found, LookonceError) else None

    def _settle(self, place: int, found: Vector | LookonceError) -> None:
        self._bytes += found.rows.nbytes if isinstance(found, Vector) else 0
        if self._bytes > MOST_BYTES:
            text = f"the vectors of all inputs are larger than {MOST_BYTES} bytes: ask for fewer inputs at once"
            raise LookonceError(ErrorKind.PAYLOAD_TOO_LARGE, text, param="input")
        self._made.found[place] = found
        self._waiting_for.pop(place, None)

    def _calls(self) -> Iterator[list[int]]:
        """The places that are asked for in each call."""
        places: list[int] = []
        size = 0
        for place in list(self._waiting_for):
            more = self._size(self._inputs[place])
            if places and (len(places) == CALL_INPUTS or size + more > CALL_SIZE):
                yield places
                places, size = [], 0
            places.append(place)
            size += more
        if places:
            yield places

    def _size(self, one: VectorInput) -> int:
        return sum(len(part) if isinstance(part, str) else self._reference(part).reference.tokens for part in one.parts)

    def _reference(self, part: ImagePart) -> Resolved:
        found = self._resolved[_name(part)]
        if isinstance(found, LookonceError):
            raise found
        return found

    async def _call(self, client: LanguageClient, places: Sequence[int]) -> language_pb2.EmbedResponse:
        left = self._deadline - time.monotonic()
        if left <= 0:
            text = "the deadline passed: --request-timeout of the gateway is the longest"
            raise LookonceError(ErrorKind.DEADLINE_EXCEEDED, text)
        request = language_pb2.EmbedRequest(
            request_id=uuid.uuid4().hex,
            items=[self._item(self._inputs[place]) for place in places],
            timeout=left,
            client=self._caller.client,
            cache_salt=self._caller.tenant.cache_salt,
        )
        response = await client.embed(request, timeout=left + GRACE_SECONDS)
        if len(response.results) != len(places):
            raise LookonceError(ErrorKind.INTERNAL, "the language service answered another number of inputs")
        return response

    async def _take_all(self, places: Sequence[int], response: language_pb2.EmbedResponse) -> None:
        self._made.prefill_tokens += response.receipt.prefill_tokens
        for place, result in zip(places, response.results, strict=True):
            await self._take(place, result)

    async def _take(self, place: int, result: language_pb2.EmbedResult) -> None:
        one, model = self._inputs[place], self._model
        if result.WhichOneof("outcome") == "error":
            error = from_proto(result.error)
            if error.kind in STALE and not self.renewed:
                self._stale |= {_name(part) for part in one.images}
                return
            self._settle(place, error)
            return
        wire = result.vectors
        rows = np.frombuffer(wire.data, "<f4").reshape(wire.rows, wire.width)
        vector = Vector(rows, wire.usage.prompt_tokens, wire.usage.image_tokens)
        self._settle(place, vector)
        self._maker.texts.put(one, model, self._caller, vector)
        part = one.lone_image
        if part is not None:
            key = VectorKey(self._reference(part).reference.key, model)
            await self._maker.images.vectors.put(part.record, key, vector)

    def _item(self, one: VectorInput) -> language_pb2.EmbedItem:
        parts = [
            language_pb2.Part(text=part)
            if isinstance(part, str)
            else language_pb2.Part(image=self._reference(part).reference.to_proto())
            for part in one.parts
        ]
        return language_pb2.EmbedItem(parts=parts, instruction=one.instruction, query=one.query)


def _name(part: ImagePart) -> _Image:
    return part.record.digest, part.bounds.name


def cut(vector: Vector, width: int) -> Vector:
    """The first numbers of each row, brought back to length 1."""
    rows: NDArray[np.float32] = vector.rows[:, :width]
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return Vector(rows / np.maximum(lengths, np.finfo(np.float32).tiny), vector.tokens, vector.image_tokens)


def similarity(query: Vector, document: Vector) -> float:
    """Of pooled vectors their cosine; of token vectors MaxSim (ColBERT, arXiv:2004.12832): the query's tokens' best
    cosines, added up."""
    return float((query.rows @ document.rows.T).max(axis=1).sum())


def _scores(query: Vector, found: Sequence[Vector | LookonceError]) -> list[float | LookonceError]:
    return [one if isinstance(one, LookonceError) else similarity(query, one) for one in found]
