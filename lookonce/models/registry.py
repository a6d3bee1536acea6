"""The model families, by the `model_type` of a checkpoint's config.json. Each is imported when it is asked for.

Ours stand here, one a line. Others come with an installed package whose entry point in the group `lookonce.families` is
named after the `model_type` and leads to its `Family`. A model type that has none is served by the general path
(`lookonce/models/general/`), where transformers has a class for it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from lookonce.core import plugins
from lookonce.core.errors import CheckpointError
from lookonce.models.family import Family, Half

GROUP = "lookonce.families"
BUILTIN = {
    "colqwen2/qwen2_5_vl": "lookonce.models.colqwen2.config:COLQWEN2_5",
    "colqwen2/qwen2_vl": "lookonce.models.colqwen2.config:COLQWEN2",
    "qwen2_5_vl": "lookonce.models.qwen2_5_vl.config:FAMILY",
    "qwen2_vl": "lookonce.models.qwen2_vl.config:FAMILY",
    "qwen3_vl": "lookonce.models.qwen3_vl.config:FAMILY",
    "qwen3_vl_moe": "lookonce.models.qwen3_vl.config:MOE_FAMILY",
}
GENERAL = "lookonce.models.general.family:general_family"
NESTED = {"colqwen2": "vlm_config"}
"""Retrieval models around another one, and where their config.json has the settings of that."""
HEADED = {"ColQwen2": "colqwen2", "ColQwen2_5": "colqwen2"}
"""The same by the class that their config.json names, which is otherwise that of the model within."""


def supported_model_types() -> list[str]:
    """Every `model_type` a checkpoint may have, sorted."""
    return plugins.names(GROUP, BUILTIN)


def settled(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json as families read it. That of a retrieval model around another one: the settings of the one within,
    the outer ones beside them, and a `model_type` that names both: "colqwen2/qwen2_vl"."""
    kind, names = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or "/" in kind:
        return config
    within = config.get(NESTED.get(kind, ""))
    if isinstance(within, dict):
        outer = {name: value for name, value in config.items() if name != NESTED[kind]}
        return {**within, **outer, "model_type": f"{kind}/{within.get('model_type')}"}
    head = HEADED.get(str(names[0])) if isinstance(names, list) and names else None
    return config if head is None else config | {"model_type": f"{head}/{kind}"}


def family_of(config: dict[str, Any], path: Path | None = None) -> Family:
    """The family of a checkpoint's config.json, whose directory is `path`; CheckpointError (listing the supported ones)
    when there is none."""
    config = settled(config)
    model_type = config.get("model_type")
    family: Family | None = None
    if isinstance(model_type, str):
        try:
            family = plugins.load(GROUP, model_type, BUILTIN)
        except (ImportError, AttributeError) as error:
            raise CheckpointError(
                f"config.json: model_type {model_type!r}: its family is installed, but can't be imported; "
                "install its package again"
            ) from error
        family = family or _general(config, path)
    if family is None:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(supported_model_types())}"
            ", and those that transformers has an image-text-to-text class for"
        )
    return family


def _general(config: dict[str, Any], path: Path | None) -> Family | None:
    find: Callable[..., Family | None] = EntryPoint("general", GENERAL, GROUP).load()
    return find(config, path)


__all__ = ["Family", "Half", "family_of", "settled", "supported_model_types"]
