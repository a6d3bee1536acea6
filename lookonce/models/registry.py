"""Model families lookonce can serve, by the `model_type` of their config.json. Knows nothing of torch or of files."""

from __future__ import annotations

from typing import Any

from lookonce.core.errors import CheckpointError
from lookonce.models.family import Family, Half
from lookonce.models.qwen2_vl.config import Qwen2VL

_FAMILIES: dict[str, Family] = {family.model_type: family for family in (Qwen2VL(),)}


def supported_model_types() -> list[str]:
    """Every `model_type` a checkpoint may have, sorted."""
    return sorted(_FAMILIES)


def family_of(config: dict[str, Any]) -> Family:
    """The family of a checkpoint's config.json; CheckpointError (listing the supported ones) when there is none."""
    model_type = config.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(supported_model_types())}"
        )
    return family


__all__ = ["Family", "Half", "family_of", "supported_model_types"]
