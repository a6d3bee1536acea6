"""Names and JSON of a checkpoint directory: which files it consists of and which shards hold which half. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lookonce.errors import CheckpointError
from lookonce.families import Family, Half

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
IDENTITY = "lookonce.json"
SHARED_FILES = (CONFIG, PREPROCESSOR, PROCESSOR, IDENTITY)
LANGUAGE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
)


def small_files(halves: Iterable[Half]) -> list[str]:
    """Names of the files beside the weights that the given halves use, whether or not a checkpoint has them all."""
    return [*SHARED_FILES, *(LANGUAGE_FILES if Half.LANGUAGE in set(halves) else ())]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError naming the file when it holds anything else."""
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); check that it exists and its permissions"
        ) from None
    except ValueError:
        raise CheckpointError(f"{file} is not valid JSON; download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object; download it again")
    return value


def read_index(file: Path) -> dict[str, str]:
    """The index's map from stored tensor name to shard name, every shard name checked to be a plain file name."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: weight_map is missing or empty; download the index again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{file}: {shard!r} is not a plain name of a .safetensors file beside the index")
    return weight_map


def shards_of(family: Family, weight_map: dict[str, str], halves: Iterable[Half]) -> list[str]:
    """Sorted names of the shards that hold any tensor of the given halves."""
    wanted = set(halves)
    located = ((family.locate(name), shard) for name, shard in weight_map.items())
    return sorted({shard for place, shard in located if place is not None and place[0] in wanted})
