"""`Checkpoint` and `open_checkpoint`: one view over a local directory, a hub repository, a whole model or a split half.

Opening reads JSON files and safetensors headers only, and checks that every file the needed half consists of is whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lookonce.checkpoint import files, hub
from lookonce.checkpoint.digest import content_identity
from lookonce.checkpoint.headers import TensorEntry, read_header
from lookonce.errors import CheckpointError
from lookonce.families import Family, Half, family_of
from lookonce.identity import EncoderSpec

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
_STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_IDENTITY = re.compile(r"hub:[\w.-]+/[\w.-]+@[0-9a-f]{40}|blake3:[0-9a-f]{64}")
_IDENTITY_FORMAT = 1


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
        return content_identity(self.identity_files)

    def tensors(self, half: Half) -> dict[str, Path]:
        """File of every tensor of a half, by its name in the module.

        Vision names are relative to Qwen2VisionTransformerPretrainedModel, language names to
        {"model.": Qwen2VLTextModel, "lm_head.": Linear}.
        """
        return {name: entry.file for name, entry in self.half_entries(half).items()}

    def half_entries(self, half: Half) -> dict[str, TensorEntry]:
        """Where each tensor of a half lies, by its name in the module; CheckpointError when the half isn't here."""
        if half not in self.entries:
            raise _absent(self.path, half, self.halves)
        return self.entries[half]

    def files(self, half: Half) -> list[Path]:
        """The safetensors files that hold a half, sorted, and no others."""
        return sorted({entry.file for entry in self.half_entries(half).values()})

    def weight_bytes(self, half: Half) -> int:
        """Bytes of a half's tensors as stored."""
        return sum(entry.nbytes for entry in self.half_entries(half).values())

    def encoder_spec(self, dtype: str, quantization: str = "none") -> EncoderSpec:
        """What identifies embeddings made by this checkpoint's tower at a compute dtype (see `lookonce.identity`)."""
        if dtype not in COMPUTE_DTYPES:
            raise CheckpointError(f"compute dtype {dtype!r} is not one of {', '.join(COMPUTE_DTYPES)}")
        return EncoderSpec(
            checkpoint=self.identity,
            family=self.family.model_type,
            vision_config=self.family.vision_config(self.config),
            preprocessor=self.family.fingerprint_preprocessor(self.preprocessor),
            dtype=dtype,
            quantization=quantization,
        )

    @property
    def dtype(self) -> str:
        """The dtype most of the opened weights are stored in: float32, bfloat16 or float16."""
        sizes: Counter[str] = Counter()
        for entries in self.entries.values():
            for entry in entries.values():
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
    def merge_size(self) -> int:
        """Patches per side that are merged to one token."""
        return self.family.merge_size(self.config)


def open_checkpoint(model: str, *, needs: Half | None = None, revision: str | None = None) -> Checkpoint:
    """Open a local directory or a hub id, fetching what `needs` needs (both halves when None).

    A directory that `lookonce split` wrote both halves under serves as either one. Raises CheckpointError naming the
    file or tensor at fault and the remedy.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"revision {revision!r} was given, but {path} is a local directory, which has none")
        split_half = path / needs.value if needs is not None else path
        if not (path / files.CONFIG).is_file() and (split_half / files.CONFIG).is_file():
            path = split_half
        return _open_directory(path, path.resolve().name, needs, None)
    if not hub.is_repository(model):
        raise CheckpointError(f"{model}: no such directory, and not a hub id (owner/name)")
    snapshot, commit = hub.fetch(model, {needs} if needs is not None else set(Half), revision)
    return _open_directory(snapshot, model, needs, f"hub:{model}@{commit}")


def read_settings(model: str, revision: str | None = None) -> tuple[Family, dict[str, Any], dict[str, Any]]:
    """Family, config.json and preprocessor settings of a directory or a hub id; no weight is looked at or fetched.

    Raises CheckpointError."""
    path = Path(model).expanduser()
    if not path.is_dir():
        if not hub.is_repository(model):
            raise CheckpointError(f"{model}: no such directory, and not a hub id (owner/name)")
        path = hub.fetch_files(model, [files.CONFIG, files.PREPROCESSOR, files.PROCESSOR], revision)
    elif not (path / files.CONFIG).is_file() and (path / Half.LANGUAGE / files.CONFIG).is_file():
        path = path / Half.LANGUAGE  # split: either half has both files
    config = _read_config(path)
    family = family_of(config)
    return family, config, family.preprocessor(_read_preprocessor(path))


def _open_directory(path: Path, name: str, needs: Half | None, identity: str | None) -> Checkpoint:
    config = _read_config(path)
    family = family_of(config)
    preprocessor = family.preprocessor(_read_preprocessor(path))
    weight_map = _weight_map(path)
    present = _present(path, family, weight_map)
    named = _named(family, weight_map)
    if needs is not None and needs not in named:
        raise _absent(path, needs, named)
    stated = _stated_identity(path, named)
    shards = sorted(set(weight_map.values()))
    return Checkpoint(
        name=stated[1] if stated else name,
        path=path,
        family=family,
        config=config,
        preprocessor=preprocessor,
        halves=present,
        entries=_entries(path, family, weight_map, {needs} if needs is not None else named),
        identity_files=(path / files.CONFIG, *(path / shard for shard in shards)),
        known_identity=stated[0] if stated else identity,
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / files.CONFIG).is_file():
        halves = [half.value for half in Half if (path / half.value / files.CONFIG).is_file()]
        hint = (
            f"; it holds split halves: give one of {', '.join(str(path / half) for half in halves)}" if halves else ""
        )
        raise CheckpointError(f"{path} has no {files.CONFIG}: not a checkpoint directory{hint}")
    config = files.read_json(path / files.CONFIG)
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{path / files.CONFIG}: quantization_config: pre-quantised weights are not supported; "
            "use the original checkpoint"
        )
    return config


def _read_preprocessor(path: Path) -> dict[str, Any]:
    if (path / files.PREPROCESSOR).is_file():
        return files.read_json(path / files.PREPROCESSOR)
    if (path / files.PROCESSOR).is_file():
        nested = files.read_json(path / files.PROCESSOR).get("image_processor")
        if isinstance(nested, dict):
            return nested
    raise CheckpointError(f"{path} has no {files.PREPROCESSOR}; copy it from the model's repository")


def _weight_map(path: Path) -> dict[str, str]:
    """Shard of every stored tensor name, from the index or from the headers of the files themselves."""
    if (path / files.INDEX).is_file():
        return files.read_index(path / files.INDEX)
    single = path / files.SINGLE
    found = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if not found:
        if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
            raise CheckpointError(
                f"{path} has only pickled weights (.bin/.pt), which are never loaded: "
                "convert them to safetensors with transformers' save_pretrained, or use a revision that has safetensors"
            )
        raise CheckpointError(f"{path} has no {files.SINGLE} and no {files.INDEX}; download the weights")
    weight_map: dict[str, str] = {}
    for file in found:
        for stored_name in read_header(file)[0]:
            if stored_name in weight_map:
                raise CheckpointError(
                    f"tensor {stored_name!r} is in both {path / weight_map[stored_name]} and {file}; "
                    f"remove the file that doesn't belong, or add {files.INDEX}"
                )
            weight_map[stored_name] = file.name
    return weight_map


def _named(family: Family, weight_map: dict[str, str]) -> frozenset[Half]:
    places = (family.locate(name) for name in weight_map)
    return frozenset(place[0] for place in places if place is not None)


def _present(path: Path, family: Family, weight_map: dict[str, str]) -> frozenset[Half]:
    here = {shard for shard in set(weight_map.values()) if (path / shard).is_file()}
    named = _named(family, weight_map)
    return frozenset(half for half in named if here.issuperset(files.shards_of(family, weight_map, {half})))


def _entries(
    path: Path, family: Family, weight_map: dict[str, str], halves: Iterable[Half]
) -> dict[Half, dict[str, TensorEntry]]:
    entries: dict[Half, dict[str, TensorEntry]] = {half: {} for half in halves}
    headers = {shard: read_header(path / shard)[0] for shard in files.shards_of(family, weight_map, entries)}
    for stored_name, shard in weight_map.items():
        place = family.locate(stored_name)
        if place is None or place[0] not in entries:
            continue
        half, name = place
        entry = headers[shard].get(stored_name)
        if entry is None:
            raise CheckpointError(
                f"tensor {stored_name!r} is not in {path / shard}, where {files.INDEX} puts it; download both again"
            )
        if name in entries[half]:
            raise CheckpointError(
                f"tensors {stored_name!r} and {entries[half][name].stored_name!r} are the same weight"
            )
        entries[half][name] = entry
    return entries


def _stated_identity(path: Path, named: frozenset[Half]) -> tuple[str, str] | None:
    """Source identity and name from the file that `lookonce split` writes, if there is one."""
    file = path / files.IDENTITY
    if not file.is_file():
        return None
    stated = files.read_json(file)
    identity, name, half = stated.get("identity"), stated.get("name"), stated.get("half")
    valid = stated.get("format") == _IDENTITY_FORMAT and isinstance(name, str) and isinstance(identity, str)
    if not valid or _IDENTITY.fullmatch(str(identity)) is None or {half} != {str(known) for known in named}:
        raise CheckpointError(f"{file} doesn't describe the weights beside it; run `lookonce split` again")
    return str(identity), str(name)


def identity_record(checkpoint: Checkpoint, half: Half) -> dict[str, Any]:
    """The contents of a split half's lookonce.json."""
    return {
        "format": _IDENTITY_FORMAT,
        "identity": checkpoint.identity,
        "name": checkpoint.name,
        "half": half.value,
    }


def _absent(path: Path, half: Half, halves: frozenset[Half]) -> CheckpointError:
    held = f"only the {half.other} half" if half.other in halves else "neither half"
    return CheckpointError(
        f"{path} holds {held}, no {half} weights; "
        f"give the {half} half (`lookonce split` writes it) or the whole checkpoint"
    )
