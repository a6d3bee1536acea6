"""What an embedding model makes of an input: which rows of the language half, and of what prompt. No torch.

A vector is what OpenAI's API calls an embedding; here that word means an image's rows from the vision tower. The files
say which checkpoints are embedding models: ColQwen2's config.json, or sentence-transformers' modules.json, as
GME-Qwen2-VL has it. `--task embed` takes any other checkpoint of such a family for one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from lookonce.core.errors import CheckpointError
from lookonce.core.identity import canonical_json
from lookonce.models.checkpoint import files
from lookonce.models.registry import Family

Task = Literal["auto", "generate", "embed"]
Pooling = Literal["last", "mean", "tokens"]
_POOLINGS: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "mean_tokens": "mean"}
_CODE_VERSION = 1


@dataclass(frozen=True)
class TokenVectors:
    """Prompts of a model that makes a vector of each token."""

    image_prompt: str  # around an image
    query_prefix: str  # before the text of a query
    query_suffix: tuple[str, ...]  # behind it: special tokens, or text


@dataclass(frozen=True)
class VectorLayout:
    """How vectors are made. Each has length 1."""

    pooling: Pooling  # of an input's rows: the last one, their mean, or all of them
    width: int
    instruction: str = ""  # system message of a pooled prompt, unless a request has its own
    ending: str = ""  # special token behind a pooled prompt
    cuts: tuple[int, ...] | None = None  # widths that a vector may be cut to (Matryoshka, arXiv:2205.13147); (): any
    tokens: TokenVectors | None = None  # where the pooling is "tokens"

    def digest(self, *model: str) -> str:
        """64 hexadecimal characters over all that decides a vector, but for its input: `model` names the weights and
        how they are computed."""
        fields = [*model, asdict(self), _CODE_VERSION]
        return blake3(canonical_json(fields), derive_key_context="lookonce 2026 vectors").hexdigest()


def vector_layout(path: Path, family: Family, config: dict[str, Any], task: Task = "auto") -> VectorLayout | None:
    """That of a checkpoint directory; None: it is to write text. Raises CheckpointError for what makes no vectors."""
    tokens: TokenVectors | None = getattr(family, "token_vectors", None)
    if tokens is not None:
        if task == "generate":
            raise CheckpointError(f"{path} is a retrieval model ({family.label}) and writes no text: leave --task out")
        return VectorLayout("tokens", family.vector_width(config), tokens=_stated_prompts(path, tokens))  # type: ignore[attr-defined]
    if task == "generate" or (task == "auto" and not _is_embedding_model(path, family, config)):
        return None
    prompt: tuple[str, str] | None = getattr(family, "vector_prompt", None)
    if prompt is None or not hasattr(family, "load_vectors"):
        raise CheckpointError(f"{path}: no vectors are made with {family.label}; use a model of the Qwen-VL lines")
    pooling = _stated_pooling(path)
    return VectorLayout(
        pooling, family.hidden_size(config), _instruction(path) or prompt[0], prompt[1], cuts=_cuts(path, config)
    )


def _is_embedding_model(path: Path, family: Family, config: dict[str, Any]) -> bool:
    """By sentence-transformers' file, or by the name of a class that is one."""
    begin: str | None = getattr(family, "embedding_classes", None)
    named = config.get("architectures")
    by_class = begin is not None and isinstance(named, list) and any(str(name).startswith(begin) for name in named)
    return by_class or (path / files.MODULES).is_file()


def _stated_prompts(path: Path, tokens: TokenVectors) -> TokenVectors:
    """With what processor_config.json says instead."""
    stated = files.read_json(path / files.PROCESSOR) if (path / files.PROCESSOR).is_file() else {}
    image, query = stated.get("visual_prompt_prefix"), stated.get("query_prefix")
    return TokenVectors(
        image if isinstance(image, str) and image else tokens.image_prompt,
        query if isinstance(query, str) and query else tokens.query_prefix,
        tokens.query_suffix,
    )


def _stated_pooling(path: Path) -> Pooling:
    """By sentence-transformers' files: the last row where they say nothing. Raises CheckpointError."""
    for kind, place in _modules(path):
        if kind == "Dense":
            raise CheckpointError(f"{path / files.MODULES}: a Dense module is not computed; use a model without one")
        if kind != "Pooling":
            continue
        file = path / place / "config.json"
        stated = files.read_json(file) if file.is_file() else {}
        modes = [name.removeprefix("pooling_mode_") for name, value in stated.items() if value is True]
        modes = [mode for mode in modes if mode not in ("include_prompt",)] or [str(stated.get("pooling_mode"))]
        if len(modes) != 1 or modes[0] not in _POOLINGS:
            raise CheckpointError(
                f"{file}: the pooling {' and '.join(modes)} is not computed: lasttoken or mean_tokens"
            )
        return _POOLINGS[modes[0]]
    return "last"


def _modules(path: Path) -> Iterator[tuple[str, str]]:
    """Class and directory of each of sentence-transformers' modules."""
    file = path / files.MODULES
    if not file.is_file():
        return
    try:
        for module in json.loads(file.read_bytes()):
            yield str(module["type"]).rpartition(".")[2], str(module["path"])
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"{file} is no list of modules; take it from the model's repository") from None


def _instruction(path: Path) -> str:
    file = path / files.PROMPTS
    stated = files.read_json(file) if file.is_file() else {}
    prompts = stated.get("prompts")
    found = prompts.get(stated.get("default_prompt_name")) if isinstance(prompts, dict) else None
    return found if isinstance(found, str) else ""


def _cuts(path: Path, config: dict[str, Any]) -> tuple[int, ...] | None:
    """As vLLM reads them: `matryoshka_dimensions`, or `is_matryoshka` for any width."""
    stated = config.get("matryoshka_dimensions")
    if isinstance(stated, list) and stated and all(isinstance(width, int) and width > 0 for width in stated):
        return tuple(sorted(stated))
    if stated is not None:
        raise CheckpointError(f"{path / files.CONFIG}: matryoshka_dimensions must be a list of widths, got {stated!r}")
    return () if config.get("is_matryoshka") is True else None
