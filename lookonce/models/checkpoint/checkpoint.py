"""`Checkpoint` and `open_checkpoint`: one view over a local directory, a hub repository, a whole model or a split half.

Opening reads JSON files and safetensors headers only, and checks that every file the needed half consists of is whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lookonce.core.errors import CheckpointError
from lookonce.core.identity import WEIGHTS_DIGEST, EncoderSpec
from lookonce.core.record import tensor_names
from lookonce.models.checkpoint import digest, files, hub
from lookonce.models.checkpoint.adapter import Adapter
from lookonce.models.checkpoint.headers import TensorEntry
from lookonce.models.checkpoint.quantised.formats import OWN_FILE
from lookonce.models.checkpoint.quantised.matrix import Format, QuantisedEntry, StoredWeight, assembled
from lookonce.models.family import EMBEDDING, HEAD
from lookonce.models.registry import Family, Half, family_of

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
_STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_IDENTITY = re.compile(r"hub:[\w.-]+/[\w.-]+@[0-9a-f]{40}|blake3:[0-9a-f]{64}")
_IDENTITY_FORMATS = (1, 2)  # the first says nothing of the vision half's weights


class Witness(Protocol):
    """Is shown a half's weights as they were read, before anything is made of them."""

    def __call__(self, half: Half, weights: Mapping[str, Any]) -> None:
        """Tensors by their name in the module, in the compute dtype, each on its device. They are not to be kept."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose needed halves are on this machine, whole."""

    name: str  # for people: hub id or directory name
    path: Path  # directory with config.json
    family: Family
    config: dict[str, Any]  # config.json
    preprocessor: dict[str, Any]  # preprocessor_config.json, defaults filled in
    halves: frozenset[Half]  # those whose every shard is here
    entries: dict[Half, dict[str, TensorEntry]] = field(repr=False)  # by module-relative name; opened halves only
    identity_files: tuple[Path, ...] = field(repr=False)
    known_identity: str | None = field(repr=False)
    stated_vision_weights: str | None = field(repr=False)  # by `lookonce split`
    format: Format | None = None  # how the weights are quantised that are
    adapter: Adapter | None = None  # merged when a half is loaded
    witness: Witness | None = field(default=None, repr=False)  # sees a half's weights when they are loaded
    held: Mapping[str, Any] | None = field(default=None, repr=False)  # tensors of a half in memory, for its plain form

    @cached_property
    def identity(self) -> str:
        """`hub:repo@commit`, or `blake3:hex` of a local directory (hashed once, then remembered on disk).

        A directory that `lookonce split` wrote states its source's identity, which is taken at its word: whoever
        changes weights or config in such a directory must remove its lookonce.json.
        """
        if self.known_identity is not None:
            return self.known_identity
        missing = [file.name for file in self.identity_files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{self.path}: {', '.join(missing)} missing, so the checkpoint can't be identified; "
                "copy every shard, or copy a half that `lookonce split` wrote"
            )
        return digest.content_identity(self.identity_files)

    @cached_property
    def vision_weights(self) -> str | None:
        """Digest of the vision half's tensors (`digest.tensors_digest`): what makes checkpoints share embeddings.

        Taken from the tensors wherever they are here. A language half by itself knows what `lookonce split` wrote
        down, or what this host has found out of the same hub commit. None: not known here; vision services say it.
        An adapter that changes the half makes it another one. Raises CheckpointError when the tensors are not those
        that were split.
        """
        own = self._own_vision_weights()
        return own if own is None else self._adapted(own)

    @property
    def encoder_identity(self) -> str:
        """`identity`, or another one where an adapter changes the vision half."""
        return self._adapted(self.identity)

    def _adapted(self, identity: str) -> str:
        return identity if self.adapter is None else digest.adapted(identity, self.adapter.digest(Half.VISION))

    def _own_vision_weights(self) -> str | None:
        if Half.VISION not in self.halves:
            return self.stated_vision_weights or digest.vision_weights_of(self.known_identity or "")
        entries = self.entries.get(Half.VISION)
        if entries is None:  # opened for the language half
            found = files.entries_of(self.path, self.family, files.weight_map_of(self.path), {Half.VISION})
            entries = found[Half.VISION]
        whole = assembled(self.format, entries)
        matrices = {name: repr(one.matrix) for name, one in whole.items() if isinstance(one, QuantisedEntry)}
        weights = digest.tensors_digest(entries, matrices)
        if self.stated_vision_weights not in (None, weights):
            raise _not_of_its_weights(self.path / files.IDENTITY)
        if self.known_identity is not None and self.known_identity.startswith("hub:"):
            digest.remember_vision_weights(self.known_identity, weights)
        return weights

    def known_vision_weights(self) -> str:
        """`vision_weights`. Raises CheckpointError where they are not known."""
        if self.vision_weights is None:
            raise CheckpointError(
                f"{self.name}: {self.path} has no vision weights, and nothing there says which they are; give a half "
                "that `lookonce split` wrote, or name them with --encoder-weights"
            )
        return self.vision_weights

    def stored_entries(self, half: Half) -> dict[str, TensorEntry]:
        """Each tensor of a half as it is stored, by its module-relative name; CheckpointError when the half isn't
        here."""
        if half not in self.entries:
            raise files.absent(self.path, half, self.halves)
        return self.entries[half]

    def half_entries(self, half: Half) -> dict[str, StoredWeight]:
        """Where each weight of a half lies, by its name in the module; CheckpointError when the half isn't here."""
        self.stored_entries(half)
        return self._weights[half]

    @cached_property
    def _weights(self) -> dict[Half, dict[str, StoredWeight]]:
        if self.adapter is None:
            return self._own_weights
        found = {half: weights | dict(self.adapter.replaced[half]) for half, weights in self._own_weights.items()}
        own = self._own_weights.get(Half.LANGUAGE)
        if own is not None and self.tied_head and self.adapter.unties:  # each from what was the weight of both
            found[Half.LANGUAGE] = {HEAD: own[EMBEDDING]} | found[Half.LANGUAGE]
        return found

    @cached_property
    def _own_weights(self) -> dict[Half, dict[str, StoredWeight]]:
        return {half: assembled(self.format, entries) for half, entries in self.entries.items()}

    def files(self, half: Half) -> list[Path]:
        """The safetensors files that hold a half, sorted, and no others."""
        return sorted({entry.file for entry in self.stored_entries(half).values()})

    def weight_bytes(self, half: Half) -> int:
        """Bytes of a half's tensors as stored."""
        return sum(entry.nbytes for entry in self.stored_entries(half).values())

    def storage(self, half: Half) -> str:
        """What a half is stored as, for people: "bfloat16", or "GPTQ int4 and bfloat16"."""
        weights = self.half_entries(half).values()
        found = {f"{entry.format} {entry.matrix.label}" for entry in weights if isinstance(entry, QuantisedEntry)}
        return " and ".join([*sorted(found), self.dtype])

    def encoder_spec(self, dtype: str, quantization: str = "none", vision_weights: str | None = None) -> EncoderSpec:
        """What identifies embeddings of this checkpoint's tower at a compute dtype (see `lookonce.core.identity`).

        `vision_weights`: those of another place; None: this checkpoint's own. Raises CheckpointError.
        """
        if dtype not in COMPUTE_DTYPES:
            raise CheckpointError(f"compute dtype {dtype!r} is not one of {', '.join(COMPUTE_DTYPES)}")
        return EncoderSpec(
            vision_weights=vision_weights or self.known_vision_weights(),
            family=getattr(self.family, "tower", self.family.model_type),
            vision_config=self.family.vision_config(self.config),
            preprocessor=self.family.fingerprint_preprocessor(self.preprocessor),
            dtype=dtype,
            quantization=quantization,
        )

    @property
    def dtype(self) -> str:
        """The dtype most of the opened plain weights are stored in: float32, bfloat16 or float16."""
        sizes: Counter[str] = Counter()
        for weights in self._own_weights.values():
            for entry in weights.values():
                if isinstance(entry, TensorEntry):
                    sizes[entry.dtype] += entry.nbytes
        code = sizes.most_common(1)[0][0]
        return _STORED_DTYPES.get(code, code)

    @property
    def tied_head(self) -> bool:
        """Whether the output head shares the input embedding's weight."""
        return self.family.tied_head(self.config)

    @property
    def min_pixels(self) -> int:
        """Fewest pixels an image is resized to."""
        return int(self.preprocessor["min_pixels"])

    @property
    def max_pixels(self) -> int:
        """Most pixels an image is resized to."""
        return int(self.preprocessor["max_pixels"])

    @property
    def hidden_size(self) -> int:
        """Width of an image embedding."""
        return self.family.hidden_size(self.config)

    @property
    def embedding_tensors(self) -> tuple[str, ...]:
        """Names of the tensors [tokens, hidden] of an image embedding."""
        return tensor_names(self.family.dimensions(self.config).deepstack)

    @property
    def merge_size(self) -> int:
        """Patches per side that are merged to one token."""
        return self.family.merge_size(self.config)


@dataclass(frozen=True)
class Place:
    """A directory that holds one half of a model, or both."""

    path: Path
    name: str
    halves: frozenset[Half]  # those of it that are asked for
    identity: str | None  # None: to be found out from its files


def places_of(model: str, halves: Collection[Half], revision: str | None = None) -> list[Place]:
    """Where the halves of a local directory or a hub id lie, fetched from the hub if need be. Raises CheckpointError.

    A directory that `lookonce split` wrote holds each half in a directory of its own.
    """
    path = _local_directory(model)
    if path is None:
        snapshot, commit = hub.fetch(model, halves, revision)
        return [Place(snapshot, model, frozenset(halves), hub.identity(model, commit))]
    if revision is not None:
        raise CheckpointError(
            f"revision {revision!r} was given, but {path} is a local directory, which has none; leave it out"
        )
    whole = (path / files.CONFIG).is_file()
    apart = [half for half in halves if not whole and (path / half.value / files.CONFIG).is_file()]
    places = [_local(path / half.value, {half}) for half in apart]
    together = frozenset(halves).difference(apart)
    return [*places, _local(path, together)] if together else places


def _local_directory(model: str) -> Path | None:
    """None for a hub id. CheckpointError for what is neither."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if not hub.is_repository(model):
        raise CheckpointError(f"{model}: no such directory, and not a hub id (owner/name); check the spelling")
    return None


def open_checkpoint(model: str, *, needs: Half | None = None, revision: str | None = None) -> Checkpoint:
    """Open a local directory or a hub id, fetching what `needs` needs (both halves when None).

    A directory that `lookonce split` wrote both halves under serves as either one. Raises CheckpointError naming the
    file or tensor at fault and the remedy. Services and commands open models by `check.check_checkpoint`.
    """
    place, *others = places_of(model, (needs,) if needs is not None else tuple(Half), revision)
    path = Path(model).expanduser() if others else place.path
    return open_directory(path, place.name, needs, place.identity)


def settings_directory(model: str, revision: str | None = None) -> Path:
    """Where config.json, the preprocessor's settings and the index of a model lie; no weight is fetched.

    Raises CheckpointError."""
    path = _local_directory(model)
    if path is None:
        return hub.fetch_files(
            model, [files.CONFIG, files.PREPROCESSOR, files.PROCESSOR, OWN_FILE, files.INDEX], revision
        )
    if not (path / files.CONFIG).is_file() and (path / Half.LANGUAGE / files.CONFIG).is_file():
        return path / Half.LANGUAGE  # split: either half has both files
    return path


def open_directory(path: Path, name: str, needs: Half | None, identity: str | None) -> Checkpoint:
    """Open one directory for the half that it is needed for (None: all that it holds). Raises CheckpointError."""
    config = files.read_config(path)
    format = files.quantised_format(path, config)
    family = family_of(config, path)
    preprocessor = family.preprocessor(files.read_preprocessor(path))
    weight_map = files.weight_map_of(path)
    present = files.halves_present(path, family, weight_map)
    named = files.halves_named(family, weight_map)
    if needs is not None and needs not in named:
        raise files.absent(path, needs, named)
    shards = sorted(set(weight_map.values()))
    settings = [file for file in (path / files.CONFIG, path / OWN_FILE) if file.is_file()]
    identity_files = (*settings, *(path / shard for shard in shards))
    stated = _statement(path, named)
    if stated is None and identity is None:
        source = hub.snapshot_source(path, identity_files)
        stated = None if source is None else _Statement(*source, None)
    return Checkpoint(
        name=stated.name if stated else name,
        path=path,
        family=family,
        config=config,
        preprocessor=preprocessor,
        halves=present,
        entries=files.entries_of(path, family, weight_map, {needs} if needs is not None else named),
        identity_files=identity_files,
        known_identity=stated.identity if stated else identity,
        stated_vision_weights=stated.vision_weights if stated else None,
        format=format,
    )


class _Statement(NamedTuple):
    """What a checkpoint directory says of where it comes from."""

    identity: str
    name: str
    vision_weights: str | None


def _statement(path: Path, named: frozenset[Half]) -> _Statement | None:
    """The contents of the file that `lookonce split` writes, if there is one."""
    file = path / files.IDENTITY
    if not file.is_file():
        return None
    stated = files.read_json(file)
    identity, name, half = stated.get("identity"), stated.get("name"), stated.get("half")
    weights = stated.get("vision_weights") if stated.get("format") != 1 else None
    valid = stated.get("format") in _IDENTITY_FORMATS and isinstance(name, str) and isinstance(identity, str)
    valid = valid and (stated["format"] == 1 or re.fullmatch(WEIGHTS_DIGEST, str(weights)) is not None)
    if not valid or _IDENTITY.fullmatch(str(identity)) is None or {half} != {str(known) for known in named}:
        raise _not_of_its_weights(file)
    return _Statement(str(identity), str(name), weights)


def _not_of_its_weights(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} doesn't describe the weights beside it; run `lookonce split` again")


def identity_record(checkpoint: Checkpoint, half: Half) -> dict[str, Any]:
    """The contents of a split half's lookonce.json."""
    return {
        "format": _IDENTITY_FORMATS[-1],
        "identity": checkpoint.identity,
        "vision_weights": checkpoint.known_vision_weights(),
        "name": checkpoint.name,
        "half": half.value,
    }


def _local(path: Path, halves: Collection[Half]) -> Place:
    return Place(path, path.resolve().name, frozenset(halves), None)
