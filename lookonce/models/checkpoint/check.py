"""The one check of a checkpoint, before it is loaded: all that keeps it from being served, said at once. No torch.

Commands and services open a model by it, so what it passes starts, and what can't start is refused in the same words
everywhere. It reads settings, safetensors headers and the tokenizer, no weights, and renders the chat template once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint import files
from lookonce.models.checkpoint.adapter import open_adapter
from lookonce.models.checkpoint.checkpoint import Checkpoint, open_directory, places_of, settings_directory
from lookonce.models.checkpoint.inventory import quantisation_problem, tensor_problems, unquantised_problem
from lookonce.models.checkpoint.quantised.matrix import Format, assembled
from lookonce.models.family import HEAD
from lookonce.models.registry import Family, Half, family_of

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


@dataclass(frozen=True)
class CheckpointReport:
    """What checking a model found: its opened halves, or what keeps it from being served."""

    halves: dict[Half, Checkpoint]  # those that were asked for; empty when there are problems
    problems: tuple[str, ...]  # each one sentence: the file, what is wrong; the remedy

    def usable(self) -> dict[Half, Checkpoint]:
        """The opened halves. Raises CheckpointError with every problem."""
        if self.problems:
            raise CheckpointError(*self.problems)
        return self.halves


def check_checkpoint(
    model: str, *, needs: Half | None = None, revision: str | None = None, adapter: str | None = None
) -> CheckpointReport:
    """Check one half, or both (None), of a local directory or a hub id, whose needed files are fetched first.

    A directory that `lookonce split` wrote both halves under is one model. `adapter` is a LoRA adapter, likewise, to be
    merged when the halves are loaded. Never raises CheckpointError.
    """
    wanted = (needs,) if needs is not None else tuple(Half)
    problems = files.Problems()
    places = problems.of(places_of, model, wanted, revision) or []
    for place in places:
        problems.found += _directory_problems(place.path, place.halves)
    if not places or problems.found:
        return CheckpointReport({}, tuple(dict.fromkeys(problems.found)))
    opened: dict[Half, Checkpoint] = {}
    for place in places:
        only = next(iter(place.halves)) if len(place.halves) == 1 else None
        checkpoint = problems.of(open_directory, place.path, place.name, only, place.identity)
        if checkpoint is not None:
            if adapter is not None:
                checkpoint = problems.of(_with_adapter, checkpoint, adapter, place.halves) or checkpoint
            opened |= dict.fromkeys(place.halves, checkpoint)
    return CheckpointReport({} if problems.found else opened, tuple(problems.found))


def open_checked(model: str, half: Half, revision: str | None = None, adapter: str | None = None) -> Checkpoint:
    """One half of a model, checked. Raises CheckpointError with every problem."""
    return check_checkpoint(model, needs=half, revision=revision, adapter=adapter).usable()[half]


def _with_adapter(checkpoint: Checkpoint, source: str, halves: Iterable[Half]) -> Checkpoint:
    """The checkpoint with an adapter to be merged into these halves. Raises CheckpointError."""
    adapter = open_adapter(source, checkpoint.family)
    adapted = replace(checkpoint, adapter=adapter)
    problems: list[str] = []
    for half in sorted(halves):
        weights = adapted.half_entries(half)
        problems += adapter.problems(half, {name: tuple(entry.shape) for name, entry in weights.items()})
        head = HEAD in weights or not checkpoint.tied_head
        expected = checkpoint.family.tensor_shapes(checkpoint.config, half, head=head)
        problems += tensor_problems(expected, weights, adapter.path)
    if problems:
        raise CheckpointError(*problems)
    return adapted


def check_settings(
    model: str, revision: str | None = None, adapter: str | None = None
) -> tuple[Family, dict[str, Any], dict[str, Any]]:
    """Family, config.json and preprocessor settings of a model, of which nothing else is fetched but the index.

    Tensors are checked by their names then, an adapter's by the shapes that config.json asks for. A local directory
    that has weights is checked whole. Raises CheckpointError with every problem.
    """
    path = Path(model).expanduser()
    if any(file for place in (path, *(path / half for half in Half)) for name in _WEIGHTS for file in place.glob(name)):
        check_checkpoint(model, revision=revision, adapter=adapter).usable()
    path = settings_directory(model, revision)
    config = files.read_config(path)
    problems = settings_problems(path, config, Half)
    format = files.Problems().of(files.quantised_format, path, config)
    if (path / files.INDEX).is_file() and not problems:
        problems = _name_problems(path, family_of(config, path), files.read_index(path / files.INDEX), format)
    if problems:
        raise CheckpointError(*problems)
    family = family_of(config, path)
    if adapter is not None and (misfits := list(open_adapter(adapter, family).misfits(family, config))):
        raise CheckpointError(*misfits)
    return family, config, family.preprocessor(files.read_preprocessor(path))


def stored_halves(model: str, revision: str | None = None) -> dict[Half, tuple[int, str]]:
    """Bytes of each half's tensors as stored, and what they are stored as (`Checkpoint.storage`), where they are here.

    Never raises CheckpointError.
    """
    if not Path(model).expanduser().is_dir():
        return {}
    halves = check_checkpoint(model, revision=revision).halves
    return {half: (checkpoint.weight_bytes(half), checkpoint.storage(half)) for half, checkpoint in halves.items()}


def settings_problems(path: Path, config: dict[str, Any], halves: Iterable[Half]) -> list[str]:
    """What config.json and preprocessor_config.json ask for that can't be computed."""
    problems = files.Problems()
    problems.of(files.quantised_format, path, config)
    family = problems.of(family_of, config, path)
    if family is not None:
        preprocessor = problems.of(lambda: family.preprocessor(files.read_preprocessor(path)))
        problems.found += problems.of(family.problems, config, preprocessor, halves) or []
        problems.of(family.hidden_size, config)
    return problems.found


def _directory_problems(path: Path, halves: frozenset[Half]) -> list[str]:
    problems = files.Problems()
    config = problems.of(files.read_config, path)
    if config is None:
        return problems.found
    problems.found += settings_problems(path, config, halves)
    family = files.Problems().of(family_of, config, path)
    if family is None:
        return problems.found  # said above; without a family no tensor and no token has a meaning
    problems.found += _weight_problems(path, family, config, halves)
    if Half.LANGUAGE in halves:
        problems.found += _chat_problems(path, family, config)
    return problems.found


def _weight_problems(path: Path, family: Family, config: dict[str, Any], halves: frozenset[Half]) -> list[str]:
    problems = files.Problems()
    weight_map = problems.of(files.weight_map_of, path)
    if weight_map is None:
        return problems.found
    unread = files.Problems()
    format = unread.of(files.quantised_format, path, config)
    if unread.found and quantisation_problem(weight_map, path) is not None:
        return []  # the settings' problems say so
    placed, strays = files.places_and_strays(family, weight_map)
    problems.found += [f"{path}: {files.describe_strays(family, strays)}"] if strays else []
    known = {name: weight_map[name] for name in placed}
    named = files.halves_named(family, known)
    for half in sorted(halves):
        if half not in named:
            problems.found += files.absent(path, half, named).problems
            continue
        entries = problems.of(files.entries_of, path, family, known, {half})
        if entries is None:
            continue
        weights = problems.of(assembled, format, entries[half])
        if weights is None:
            continue
        if format is not None and half is Half.LANGUAGE:
            problems.found += unquantised_problem(format, weights, path)
        head = HEAD in weights or not family.tied_head(config)
        expected = files.Problems().of(family.tensor_shapes, config, half, head=head)
        if expected is not None:  # else the settings' problems tell of config.json's dimensions
            problems.found += tensor_problems(expected, weights, path)
    return problems.found


def _name_problems(path: Path, family: Family, names: Collection[str], format: Format | None) -> list[str]:
    known = tuple(f".{ending}" for ending in format.endings) if format is not None else ()
    quantised = quantisation_problem((name for name in names if not name.endswith(known)), path)
    _, strays = files.places_and_strays(family, names)
    return [
        *([quantised] if quantised else []),
        *([f"{path}: {files.describe_strays(family, strays)}"] if strays else []),
    ]


def _chat_problems(path: Path, family: Family, config: dict[str, Any]) -> list[str]:
    from lookonce.models.chat.chat_format import end_token_ids, open_chat, prompt_problems
    from lookonce.models.chat.generation_config import sampling_defaults
    from lookonce.models.vector_layout import vector_layout

    problems = files.Problems()
    rows = family.text_config(config).get("vocab_size")
    if not isinstance(rows, int):
        return []  # the settings' problems say so
    problems.found += _token_id_problems(path, family, config, rows)
    tokens = problems.of(family.special_tokens, config) if not problems.found else None
    chat = problems.of(open_chat, path, family, tokens.marker if tokens is not None else "")
    if chat is not None:
        problems.of(end_token_ids, path, family, config, chat)
        problems.found += prompt_problems(chat, path, family, tokens, rows)
    problems.of(sampling_defaults, path)
    problems.of(vector_layout, path, family, config)
    return problems.found


def _token_id_problems(path: Path, family: Family, config: dict[str, Any], rows: int) -> Iterator[str]:
    for name in family.token_id_fields:
        number = config.get(name, 0)
        if not isinstance(number, int) or not 0 <= number < rows:
            yield (
                f"{path / files.CONFIG}: {name} must be the id of a token, below vocab_size {rows}, got {number!r}; "
                "take config.json from the model's repository"
            )
