"""What `--engine plain` stands for: the language half on one device, and the engine over it."""

from __future__ import annotations

import math

import torch

from lm_service.engine.answer import TokenTable
from lm_service.engine.packed.device_map import wanted
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.plain.engine import PlainEngine
from lm_service.engine.types import ModelFacts
from lm_service.settings import LanguageSettings
from lookonce.core.errors import CheckpointError, invalid
from lookonce.models.checkpoint import Checkpoint, Half
from lookonce.models.devices import choose_dtype, dtype_name
from lookonce.models.family import unpacked_reason


class PlainBuilder:
    """An `EngineBuilder` (see lm_service.engine.factory)."""

    def __init__(self, settings: LanguageSettings) -> None:
        """Raises INVALID_ARGUMENT for what this engine doesn't have."""
        self._settings = settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        devices = wanted(settings.device, settings.device_map).devices
        if len(devices) > 1:
            raise invalid("the plain engine computes on one device: leave out --device-map", param="device_map")
        if settings.quantization != "none":
            raise invalid("the plain engine has no int8 weights: leave out --quantization", param="quantization")
        self._device = devices[0]

    def build(
        self, checkpoint: Checkpoint, table: TokenTable, end_ids: frozenset[int], context_length: int
    ) -> PlainEngine:
        settings, family = self._settings, checkpoint.family
        load = getattr(family, "load_unbatched", None)
        if load is None:
            raise CheckpointError(
                f"{checkpoint.path}: {family.label} is served by the packed engine only; leave out --engine"
            )
        dtype = choose_dtype(settings.dtype, (self._device,), checkpoint.dtype)
        model = load(checkpoint, dtype, self._device, context=context_length)
        entries = checkpoint.half_entries(Half.LANGUAGE)
        facts = ModelFacts(
            context_length=context_length,
            dtype=dtype_name(dtype),
            device=str(self._device),
            weight_bytes=sum(math.prod(entry.shape) for entry in entries.values()) * dtype.itemsize,
            engine="plain",
            engine_note=unpacked_reason(family, checkpoint.config) or "",
        )
        bounds = PackedOptions(max_running=settings.max_running, max_waiting=settings.max_waiting)
        return PlainEngine(model, table, end_ids, context_length, bounds, facts)
