"""What `--engine packed` stands for: the language half on its devices, and the engine over it."""

from __future__ import annotations

import math

import torch

from lm_service.engine.answer import TokenTable
from lm_service.engine.packed.device_map import place, wanted
from lm_service.engine.packed.engine import PackedEngine
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.self_check import check_language_half
from lm_service.engine.types import ModelFacts
from lm_service.settings import LanguageSettings
from lookonce.models.checkpoint import Checkpoint, Half
from lookonce.models.devices import choose_dtype, dtype_name
from lookonce.models.quantization import check_usable, scheme
from lookonce.models.self_check import watched
from lookonce.models.text_adapter import ModelAdapter


class PackedBuilder:
    """An `EngineBuilder` (see lm_service.engine.factory)."""

    loader = "load_text"  # of a family

    def __init__(self, settings: LanguageSettings) -> None:
        """Raises INVALID_ARGUMENT for devices that are not here, or can't serve the quantization."""
        self._settings = settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._wanted = wanted(settings.device, settings.device_map)
        check_usable(settings.quantization, self._wanted.devices)

    def load(self, checkpoint: Checkpoint, context_length: int) -> tuple[ModelAdapter, ModelFacts]:
        """The language half on its devices, ready to compute."""
        settings, entries = self._settings, checkpoint.half_entries(Half.LANGUAGE)
        dtype = self._dtype(checkpoint)
        home = place(self._wanted, entries, dtype, settings.quantization)
        facts = ModelFacts(
            context_length=context_length,
            dtype=dtype_name(dtype),
            device=str(home),
            weight_bytes=sum(math.prod(entry.shape) for entry in entries.values()) * dtype.itemsize,
            quantization=scheme(settings.quantization, home.devices[0]),
            engine="packed",
        )
        adapter: ModelAdapter = getattr(checkpoint.family, self.loader)(
            checkpoint,
            dtype,
            home.of if settings.quantization == "none" else home.of_unquantized,
            home.of_layers,
            quantization=settings.quantization,
            native=settings.kernels == "auto",
        )
        return adapter, facts

    def _dtype(self, checkpoint: Checkpoint) -> torch.dtype:
        return choose_dtype(self._settings.dtype, self._wanted.devices, checkpoint.dtype)

    def build(
        self, checkpoint: Checkpoint, table: TokenTable, end_ids: frozenset[int], context_length: int
    ) -> PackedEngine:
        settings = self._settings
        if settings.self_check == "on":
            checkpoint = watched(checkpoint, Half.LANGUAGE, self._dtype(checkpoint))
        adapter, facts = self.load(checkpoint, context_length)
        options = PackedOptions(
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            kv_bytes=settings.kv_bytes,
            prefix_bytes=settings.prefix_bytes,
            context_tokens=context_length,
            step_seconds=settings.step_seconds,
            native=settings.kernels == "auto",
        )
        engine = PackedEngine(adapter, table, end_ids, options, facts)
        if settings.self_check == "on":
            check_language_half(checkpoint, adapter, options, settings.quantization)
        return engine
