"""What lies in a checkpoint directory: its settings, and where each tensor of a half is. Reads headers, no weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import files
from lookonce.models.checkpoint.headers import TensorEntry, read_header
from lookonce.models.registry import Family, Half

ADAPTER = "adapter_config.json"


def read_config(path: Path) -> dict[str, Any]:
    """config.json. CheckpointError when there is none."""
    if not (path / files.CONFIG).is_file():
        raise CheckpointError(f"{path} has no {files.CONFIG}: not a checkpoint directory{_what_it_is(path)}")
    return files.read_json(path / files.CONFIG)


def refuse_quantised(path: Path, config: dict[str, Any]) -> None:
    """CheckpointError when config.json says that the weights are quantised."""
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{path / files.CONFIG}: quantization_config: pre-quantised weights are not supported; "
            "use the original checkpoint"
        )


def read_preprocessor(path: Path) -> dict[str, Any]:
    """preprocessor_config.json, or the image processor's part of processor_config.json."""
    if (path / files.PREPROCESSOR).is_file():
        return files.read_json(path / files.PREPROCESSOR)
    if (path / files.PROCESSOR).is_file():
        nested = files.read_json(path / files.PROCESSOR).get("image_processor")
        if isinstance(nested, dict):
            return nested
    raise CheckpointError(f"{path} has no {files.PREPROCESSOR}; copy it from the model's repository")


def weight_map_of(path: Path) -> dict[str, str]:
    """Shard of every stored tensor name, from the index or from the headers of the files themselves."""
    single = path / files.SINGLE
    if (path / files.INDEX).is_file():
        indexed = files.read_index(path / files.INDEX)
        if single.is_file() and files.SINGLE not in indexed.values():
            raise CheckpointError(
                f"{path} holds both {files.SINGLE} and {files.INDEX}, which names other files: they may be two "
                "different models; remove the one that doesn't belong"
            )
        return indexed
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


def halves_named(family: Family, weight_map: dict[str, str]) -> frozenset[Half]:
    """The halves that any tensor belongs to."""
    return frozenset(half for half, _ in files.located(family, weight_map).values())


def halves_present(path: Path, family: Family, weight_map: dict[str, str]) -> frozenset[Half]:
    """The halves of which every file is there."""
    here = {shard for shard in set(weight_map.values()) if (path / shard).is_file()}
    named = halves_named(family, weight_map)
    return frozenset(half for half in named if here.issuperset(files.shards_of(family, weight_map, {half})))


def entries_of(
    path: Path, family: Family, weight_map: dict[str, str], halves: Iterable[Half]
) -> dict[Half, dict[str, TensorEntry]]:
    """Where each tensor of the given halves lies, by its name in the module. CheckpointError with every bad file."""
    entries: dict[Half, dict[str, TensorEntry]] = {half: {} for half in halves}
    problems = files.Problems()
    headers = {
        shard: read[0]
        for shard in files.shards_of(family, weight_map, entries)
        if (read := problems.of(read_header, path / shard))
    }
    problems.refuse()
    for stored_name, (half, name) in files.located(family, weight_map).items():
        if half not in entries:
            continue
        shard = weight_map[stored_name]
        entry = headers[shard].get(stored_name)
        if entry is None:
            raise CheckpointError(
                f"tensor {stored_name!r} is not in {path / shard}, where {files.INDEX} puts it; download both again"
            )
        if name in entries[half]:
            raise CheckpointError(
                f"tensors {stored_name!r} and {entries[half][name].stored_name!r} are the same weight; remove one"
            )
        entries[half][name] = entry
    return entries


def _what_it_is(path: Path) -> str:
    halves = [str(path / half.value) for half in Half if (path / half.value / files.CONFIG).is_file()]
    if halves:
        return f"; it holds split halves: give one of {', '.join(halves)}"
    if (path / ADAPTER).is_file():
        base = files.read_json(path / ADAPTER).get("base_model_name_or_path")
        return f" but a LoRA adapter of {base}; merge it into that model (PEFT's merge_and_unload) and give the result"
    return "; give the directory that holds the model's files"


def absent(path: Path, half: Half, halves: Collection[Half]) -> CheckpointError:
    """What to say when `path`, which holds `halves`, lacks a half."""
    held = f"only the {half.other} half" if half.other in halves else "neither half"
    return CheckpointError(
        f"{path} holds {held}, no {half} weights; "
        f"give the {half} half (`lookonce split` writes it) or the whole checkpoint"
    )
