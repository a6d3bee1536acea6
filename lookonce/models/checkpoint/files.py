"""What lies in a checkpoint directory: its files, its settings, and where each tensor of a half is.

Reads headers, no weights. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint.headers import TensorEntry, read_header
from lookonce.models.checkpoint.quantised.formats import OWN_FILE, format_of, part_endings
from lookonce.models.checkpoint.quantised.matrix import BIAS, WEIGHT, Format, cut
from lookonce.models.registry import Family, Half, settled

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
IDENTITY = "lookonce.json"
ADAPTER = "adapter_config.json"
MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
PROMPTS = "config_sentence_transformers.json"
SHARED_FILES = (CONFIG, PREPROCESSOR, PROCESSOR, IDENTITY, OWN_FILE)
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
    *(f"qformer_tokenizer/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")),
    MODULES,
    POOLING,
    PROMPTS,
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
    names = list(names)
    quantised = {stem for stem, ending in (cut(name, part_endings()) for name in names) if ending}
    for name in names:
        try:
            place = _place(family, name, quantised)
        except CheckpointError:
            strays.append(name)
        else:
            if place is not None:
                places[name] = place
    return places, strays


def _place(family: Family, name: str, quantised: Collection[str]) -> tuple[Half, str] | None:
    """Where a tensor belongs: one of a quantised matrix where its weight does. `quantised` are the modules of these."""
    try:
        return family.locate(name)
    except CheckpointError:
        stem, ending = cut(name, {*part_endings(), BIAS})
        if stem not in quantised:
            raise
        place = family.locate(f"{stem}.{WEIGHT}")
        return place and (place[0], place[1].removesuffix(WEIGHT) + ending)


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
        f"tensors of a LoRA adapter: {some(names)}; give its base model with --model and the directory that PEFT "
        "wrote with --adapter"
    )


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest


def read_config(path: Path) -> dict[str, Any]:
    """config.json, `settled`. CheckpointError when there is none."""
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path} has no {CONFIG}: not a checkpoint directory{_what_it_is(path)}")
    return settled(read_json(path / CONFIG))


def quantised_format(path: Path, config: dict[str, Any]) -> Format | None:
    """How the settings say that weights are quantised; None: they are plain. CheckpointError for what isn't read."""
    return format_of(path, config, read_json(path / OWN_FILE) if (path / OWN_FILE).is_file() else None)


def read_preprocessor(path: Path) -> dict[str, Any]:
    """preprocessor_config.json, or the image processor's part of processor_config.json."""
    if (path / PREPROCESSOR).is_file():
        return read_json(path / PREPROCESSOR)
    if (path / PROCESSOR).is_file():
        nested = read_json(path / PROCESSOR).get("image_processor")
        if isinstance(nested, dict):
            return nested
    raise CheckpointError(f"{path} has no {PREPROCESSOR}; copy it from the model's repository")


def weight_map_of(path: Path) -> dict[str, str]:
    """Shard of every stored tensor name, from the index or from the headers of the files themselves."""
    single = path / SINGLE
    if (path / INDEX).is_file():
        indexed = read_index(path / INDEX)
        if single.is_file() and SINGLE not in indexed.values():
            raise CheckpointError(
                f"{path} holds both {SINGLE} and {INDEX}, which names other files: they may be two "
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
        raise CheckpointError(f"{path} has no {SINGLE} and no {INDEX}; download the weights")
    weight_map: dict[str, str] = {}
    for file in found:
        for stored_name in read_header(file)[0]:
            if stored_name in weight_map:
                raise CheckpointError(
                    f"tensor {stored_name!r} is in both {path / weight_map[stored_name]} and {file}; "
                    f"remove the file that doesn't belong, or add {INDEX}"
                )
            weight_map[stored_name] = file.name
    return weight_map


def halves_named(family: Family, weight_map: dict[str, str]) -> frozenset[Half]:
    """The halves that any tensor belongs to."""
    return frozenset(half for half, _ in located(family, weight_map).values())


def halves_present(path: Path, family: Family, weight_map: dict[str, str]) -> frozenset[Half]:
    """The halves of which every file is there."""
    here = {shard for shard in set(weight_map.values()) if (path / shard).is_file()}
    named = halves_named(family, weight_map)
    return frozenset(half for half in named if here.issuperset(shards_of(family, weight_map, {half})))


def entries_of(
    path: Path, family: Family, weight_map: dict[str, str], halves: Iterable[Half]
) -> dict[Half, dict[str, TensorEntry]]:
    """Where each tensor of the given halves lies, by its name in the module. CheckpointError with every bad file."""
    entries: dict[Half, dict[str, TensorEntry]] = {half: {} for half in halves}
    problems = Problems()
    headers = {
        shard: read[0]
        for shard in shards_of(family, weight_map, entries)
        if (read := problems.of(read_header, path / shard))
    }
    problems.refuse()
    for stored_name, (half, name) in located(family, weight_map).items():
        if half not in entries:
            continue
        shard = weight_map[stored_name]
        entry = headers[shard].get(stored_name)
        if entry is None:
            raise CheckpointError(
                f"tensor {stored_name!r} is not in {path / shard}, where {INDEX} puts it; download both again"
            )
        if name in entries[half]:
            raise CheckpointError(
                f"tensors {stored_name!r} and {entries[half][name].stored_name!r} are the same weight; remove one"
            )
        entries[half][name] = entry
    return entries


def _what_it_is(path: Path) -> str:
    halves = [str(path / half.value) for half in Half if (path / half.value / CONFIG).is_file()]
    if halves:
        return f"; it holds split halves: give one of {', '.join(halves)}"
    if (path / ADAPTER).is_file():
        base = read_json(path / ADAPTER).get("base_model_name_or_path")
        return f" but a LoRA adapter of {base}; give that model with --model {base} and this with --adapter {path}"
    return "; give the directory that holds the model's files"


def absent(path: Path, half: Half, halves: Collection[Half]) -> CheckpointError:
    """What to say when `path`, which holds `halves`, lacks a half."""
    held = f"only the {half.other} half" if half.other in halves else "neither half"
    return CheckpointError(
        f"{path} holds {held}, no {half} weights; "
        f"give the {half} half (`lookonce split` writes it) or the whole checkpoint"
    )
