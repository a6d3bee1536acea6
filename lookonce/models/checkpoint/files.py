"""Names and JSON of a checkpoint directory: which files it consists of and which shards hold which half. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lookonce.core.errors import CheckpointError
from lookonce.models.registry import Family, Half

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
_LISTED = 5
_Value = TypeVar("_Value")


class Problems:
    """Collects what steps raise, so that one doesn't hide the next."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def of(self, step: Callable[..., _Value], *arguments: Any, **named: Any) -> _Value | None:
        """What the step answers; None when it found problems."""
        try:
            return step(*arguments, **named)
        except CheckpointError as error:
            self.found += error.problems
            return None

    def refuse(self) -> None:
        """Raises CheckpointError with every problem, if there is one."""
        if self.found:
            raise CheckpointError(*self.found)


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


def located(family: Family, names: Iterable[str]) -> dict[str, tuple[Half, str]]:
    """Half and module-relative name of each stored tensor; tensors that carry no weight are left out.

    Raises CheckpointError saying what the tensors are that no layout of the family has.
    """
    places, strays = places_and_strays(family, names)
    if strays:
        raise CheckpointError(describe_strays(family, strays))
    return places


def places_and_strays(family: Family, names: Iterable[str]) -> tuple[dict[str, tuple[Half, str]], list[str]]:
    """`located` for the tensors that have a place in the model, and the names of those that have none."""
    places: dict[str, tuple[Half, str]] = {}
    strays: list[str] = []
    for name in names:
        try:
            place = family.locate(name)
        except CheckpointError:
            strays.append(name)
        else:
            if place is not None:
                places[name] = place
    return places, strays


def shards_of(family: Family, weight_map: dict[str, str], halves: Iterable[Half]) -> list[str]:
    """Sorted names of the shards that hold any tensor of the given halves."""
    wanted = set(halves)
    return sorted({weight_map[name] for name, (half, _) in located(family, weight_map).items() if half in wanted})


def describe_strays(family: Family, names: Iterable[str]) -> str:
    """What tensors are that have no place in the model, and what to do about them."""
    names = sorted(names)
    if any(name.startswith("base_model.") or "lora_" in name for name in names):
        return adapter_problem(names)
    return (
        f"tensors that belong to no layout of the model: {some(names)}: a head of another kind of model (reward, "
        f"classification, embedding)? Use a checkpoint whose weights are {family.layouts} alone"
    )


def adapter_problem(names: Sequence[str]) -> str:
    """What to do about tensors of a LoRA adapter."""
    return (
        f"tensors of a LoRA adapter: {some(names)}; merge it into its base model (PEFT's merge_and_unload) "
        "and give the result"
    )


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
