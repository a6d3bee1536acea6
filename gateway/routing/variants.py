"""Versions of the model served side by side (canary, A/B test): each its own vision and language services, a share of
the images by weight, and no way for the halves of two to meet. To the API they are one model.

An image stays with its variant while the weights stay: weighted rendezvous hashing (Schindelhauer and Schomaker, 2005),
so that a changed weight moves no more images than it must. `embeddings` of different variants lie side by side.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import structlog
from blake3 import blake3

from gateway.routing.replicas import REMEMBERED, Discovery, Replicas, split_targets
from lookonce.core.errors import ErrorKind, LookonceError, invalid
from lookonce.core.rpc.client import LanguageClient, VisionClient
from lookonce.core.tasks import keep_running
from protos.lookonce.v1 import language_pb2

DEFAULT = "default"
"""The name of the only variant when none are configured."""
GENERATE, EMBED = "generate", "embed"
"""What a variant's language services do: write text, or make vectors."""
POLL = 2.0  # seconds between looks at the file
_ENTRY = re.compile(r"([a-z0-9][a-z0-9-]{0,30})((?:\s+(?:weight|vision|lm|task)=\S+)*)")
FRESH = 30.0  # seconds a description is good
FALLBACK_NAME = "lookonce"
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class VariantSpec:
    """One variant as configured."""

    name: str
    weight: float
    vision: tuple[str, ...]  # addresses
    language: tuple[str, ...]
    task: str = GENERATE


@dataclass(frozen=True, eq=False)
class Variant:
    """One version of the model and the services that serve it."""

    spec: VariantSpec
    vision: Replicas[VisionClient]
    language: Replicas[LanguageClient]
    discoveries: tuple[Discovery[VisionClient], Discovery[LanguageClient]] | tuple[()] = ()

    @property
    def name(self) -> str:
        """Its name in settings, metrics and receipts."""
        return self.spec.name

    @property
    def is_live(self) -> bool:
        """Whether both halves have a replica that is not ejected."""
        return self.vision.any_live() and self.language.any_live()

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way."""
        seeing = any(endpoint.active for endpoint in self.vision.remembered)
        return seeing or any(endpoint.active for endpoint in self.language.remembered)

    def score(self, key: bytes) -> float:
        """The rendezvous score for a key: the highest of all variants' is chosen."""
        drawn = int.from_bytes(blake3(self.name.encode() + b"\0variant\0" + key).digest(8), "little")
        return -self.spec.weight / math.log((drawn + 1) / (2**64 + 2))

    async def start(self) -> None:
        """Look up the names among its addresses, and follow them."""
        for discovery in self.discoveries:
            await discovery.start()

    async def close(self) -> None:
        """Close the channels."""
        for discovery in self.discoveries:
            await discovery.close()
        await self.vision.close()
        await self.language.close()


class Variants:
    """The variants that are served now."""

    def __init__(self, specs: Sequence[VariantSpec], connect: Callable[[VariantSpec], Variant]) -> None:
        self._connect = connect
        self.all = tuple(connect(spec) for spec in specs)
        self._retired: list[tuple[float, Variant]] = []  # with when: requests may still be under way on them
        self._watching: asyncio.Task[None] | None = None

    def in_order(self, key: bytes, task: str = GENERATE) -> list[Variant]:
        """The variant for a key (an image's digest), then those that may stand in while it is out of order; live ones
        first. Those of weight 0 get nothing, nor those of another task, unless all are."""
        if len(self.all) == 1:
            return [self.all[0]]
        weighted = [variant for variant in self._of(task) if variant.spec.weight > 0]
        return sorted(weighted, key=lambda variant: (not variant.is_live, -variant.score(key)))

    @property
    def main(self) -> Variant:
        """The one of the greatest weight: it lends the API its model's name."""
        return self.main_of(GENERATE)

    def main_of(self, task: str) -> Variant:
        """The same of one task."""
        return max(self._of(task), key=lambda variant: variant.spec.weight)

    def has(self, task: str) -> bool:
        """Whether some variant is there for a task."""
        return any(variant.spec.task == task for variant in self.all)

    def _of(self, task: str) -> Sequence[Variant]:
        return [variant for variant in self.all if variant.spec.task == task] or self.all

    @property
    def remembered(self) -> list[Variant]:
        """All variants, those taken out of late included."""
        return [*self.all, *(variant for _, variant in self._retired)]

    async def replace(self, specs: Sequence[VariantSpec]) -> None:
        """Serve these from now on. Channels to services that stay are kept."""
        old = {(variant.name, variant.spec.vision, variant.spec.language): variant for variant in self.all}
        new, made = [], []
        try:
            for spec in specs:
                same = old.pop((spec.name, spec.vision, spec.language), None)
                if same is None:
                    made.append(self._connect(spec))
                    await made[-1].start()
                    new.append(made[-1])
                else:
                    new.append(Variant(spec, same.vision, same.language, same.discoveries))
        except BaseException:  # nothing has changed; what was begun ends
            for variant in made:
                await variant.close()
            raise
        self._retired += [(time.monotonic(), variant) for variant in old.values()]
        self.all = tuple(new)

    async def start(self) -> None:
        """Look up the names among the addresses, and follow them."""
        for variant in self.all:
            await variant.start()

    def watch(self, path: Path) -> None:
        """Follow a file of variants: what changes in it holds within seconds. Call on the event loop."""
        self._watching = keep_running(partial(self._follow, path))

    async def health(self) -> tuple[dict[str, bool], dict[str, bool]]:
        """Whether each vision and each language endpoint of all variants says SERVING, by address."""
        visions, languages = await asyncio.gather(
            asyncio.gather(*(variant.vision.health() for variant in self.all)),
            asyncio.gather(*(variant.language.health() for variant in self.all)),
        )
        return _joined(visions), _joined(languages)

    async def close(self) -> None:
        """Close all channels."""
        if self._watching is not None:
            self._watching.cancel()
        for variant in self.remembered:
            await variant.close()

    async def _follow(self, path: Path) -> None:
        """The file is held against what is served, so that a change that failed is tried again."""
        refused: str | None = None
        while True:
            await asyncio.sleep(POLL)
            await self._close_idle()
            found: str | None = None
            try:
                found = await asyncio.to_thread(_read, path)
                if found == refused:
                    continue
                specs = parse_variants(found, param="variants_file")
                if specs == tuple(variant.spec for variant in self.all):
                    continue
                await self.replace(specs)
            except LookonceError as error:
                refused = found
                log.error("variants unchanged: the file is not usable", reason=error.message)
            else:
                log.info("variants changed", **{variant.name: variant.spec.weight for variant in self.all})

    async def _close_idle(self) -> None:
        """Close what was taken out a while ago and has no call under way."""
        end = time.monotonic() - REMEMBERED
        idle = [item for item in self._retired if item[0] <= end and not item[1].is_busy]
        self._retired = [item for item in self._retired if item not in idle]
        for _, variant in idle:
            await variant.close()


def _joined(answers: Sequence[dict[str, bool]]) -> dict[str, bool]:
    return {address: healthy for answer in answers for address, healthy in answer.items()}


def read_variants(path: Path) -> tuple[VariantSpec, ...]:
    """The variants of a file, one on each line. Raises INVALID_ARGUMENT."""
    return parse_variants(_read(path), param="variants_file")


def parse_variants(text: str, *, param: str) -> tuple[VariantSpec, ...]:
    """`NAME weight=N vision=ADDRESS,... lm=ADDRESS,...` by semicolons or line ends; `task=embed` for those of an
    embedding model. Raises INVALID_ARGUMENT."""
    lines = (line.partition("#")[0] for line in text.splitlines())
    entries = [entry.strip() for line in lines for entry in line.split(";") if entry.strip()]
    specs = tuple(_parse(entry, param) for entry in entries)
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise invalid(f"{param}: two variants have one name", param=param)
    if not any(spec.weight > 0 for spec in specs):
        raise invalid(f"{param}: no variant has a weight above 0", param=param)
    idle = {spec.task for spec in specs} - {spec.task for spec in specs if spec.weight > 0}
    if idle:
        raise invalid(f"{param}: no variant of task {idle.pop()} has a weight above 0", param=param)
    return specs


def _parse(entry: str, param: str) -> VariantSpec:
    match = _ENTRY.fullmatch(entry)
    fields = dict(pair.split("=", 1) for pair in match[2].split()) if match else {}
    task = fields.pop("task", GENERATE)
    if match is None or fields.keys() != {"weight", "vision", "lm"} or task not in (GENERATE, EMBED):
        raise invalid(
            f"{param}: {entry!r} is not NAME weight=N vision=ADDRESS,... lm=ADDRESS,... [task=embed]", param=param
        )
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", fields["weight"]):
        raise invalid(f"{param}: the weight of {match[1]} must be a number of at least 0", param=param)
    vision, language = (tuple(filter(None, fields[name].split(","))) for name in ("vision", "lm"))
    if not vision or not language:
        raise invalid(f"{param}: {match[1]} needs addresses of both halves", param=param)
    for targets in (vision, language):
        split_targets(targets)
    return VariantSpec(match[1], float(fields["weight"]), vision, language, task)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise invalid(f"variants_file: {path} cannot be read", param="variants_file") from None


@dataclass(frozen=True)
class ModelCard:
    """What the API tells of a model."""

    names: tuple[str, ...]  # the first is the one that receipts show
    description: language_pb2.LanguageDescription

    @property
    def name(self) -> str:
        """The name that receipts show."""
        return self.names[0]

    @property
    def vectors(self) -> language_pb2.VectorDescription | None:
        """How it makes vectors, if it does."""
        return self.description.vectors if self.description.HasField("vectors") else None

    def is_named(self, name: str) -> bool:
        """Whether a request that says `name` means this model; "lookonce" always does."""
        return name in self.names or name == FALLBACK_NAME

    def to_openai(self, name: str) -> dict[str, Any]:
        """OpenAI's model object under one of the names, with the context length beside it."""
        vectors = self.vectors
        shown = {} if vectors is None else {"vectors": {"width": vectors.width, "of_tokens": vectors.of_tokens}}
        return {
            "id": name,
            "object": "model",
            "created": int(self.description.model.started_at),
            "owned_by": "lookonce",
            "family": self.description.model.family,
            "context_length": self.description.context_length,
            "max_tokens": self.description.max_tokens,
            "sampling_defaults": {
                field.name: round(value, 7) for field, value in self.description.sampling_defaults.ListFields()
            },
            "engine": self.description.engine,
            "engine_note": self.description.engine_note,
            **shown,
        }


class ServedModel:
    """Caches the description; `names`, if any, stand in place of the checkpoint's."""

    def __init__(self, variants: Variants, *, names: tuple[str, ...] = (), task: str = GENERATE) -> None:
        self._variants = variants
        self._task = task
        self._names = names
        self._card: ModelCard | None = None
        self._until = 0.0

    @property
    def name(self) -> str:
        """The public name, as last known."""
        return self._card.name if self._card else next(iter(self._names), FALLBACK_NAME)

    async def card(self) -> ModelCard:
        """The card; the last known one while no language service answers.

        Raises UNAVAILABLE when there never was one."""
        if self._card is not None and time.monotonic() < self._until:
            return self._card
        for endpoint in sorted(self._variants.main_of(self._task).language.endpoints, key=lambda item: item.down_until):
            try:
                description = await endpoint.client.describe(timeout=2.0)
            except LookonceError:
                continue
            self._card = ModelCard(self._names or (public_name(description.model),), description)
            break
        if self._card is None:
            raise LookonceError(ErrorKind.UNAVAILABLE, "no language service can be reached", retry_after=1.0)
        self._until = time.monotonic() + FRESH
        return self._card

    async def check(self, requested: str | None) -> None:
        """Raise NOT_FOUND when a request names another model."""
        try:
            card = await self.card()
        except LookonceError:
            if requested is None:
                return  # answering will tell
            raise
        if requested is not None and not card.is_named(requested):
            raise no_such_model(card)


def no_such_model(*cards: ModelCard) -> LookonceError:
    """What is said of another model than those there are."""
    names = " or ".join(repr(name) for card in cards for name in card.names)
    return LookonceError(ErrorKind.NOT_FOUND, f"no such model; this server has {names}", param="model")


def public_name(model: Any) -> str:
    """A hub id as it is; of a local directory only its name (paths are not shown)."""
    if model.checkpoint.startswith("hub:"):
        return str(model.checkpoint.removeprefix("hub:").partition("@")[0])
    return PurePath(model.name).name or FALLBACK_NAME
