"""What `--engine vllm` stands for: vLLM's processes over a checkpoint's language half, and the engine over them."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

# Before vLLM is imported: it reports to nobody, and logs like the rest of the service.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")

import structlog
import torch
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from lm_service.engine.answer import TokenTable
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.types import ModelFacts
from lm_service.engine.vllm import connector, worker
from lm_service.engine.vllm.arguments import parse_engine_args
from lm_service.engine.vllm.checks import check_model
from lm_service.engine.vllm.engine import PromptBounds, VllmEngine
from lm_service.engine.vllm.statistics import Statistics
from lm_service.settings import LanguageSettings
from lookonce.core.errors import CheckpointError, ErrorKind, LookonceError, invalid
from lookonce.models.checkpoint import Checkpoint, Half
from lookonce.models.devices import choose_dtype, dtype_name, free_memory
from lookonce.models.family import unserved_by_vllm
from lookonce.models.row_files import SHARED_MEMORY, RowDirectory

_CPU_BLOCK, _GPU_BLOCK = 32, 16  # tokens of a block of KV: the smallest that vLLM's kernels are quick with
_PREFIX = "lookonce-lm-"
_log = structlog.get_logger(__name__)


class VllmBuilder:
    """An `EngineBuilder` (see lm_service.engine.factory)."""

    def __init__(self, settings: LanguageSettings) -> None:
        """Raises INVALID_ARGUMENT for what this engine doesn't have."""
        self._settings = settings
        self._further = parse_engine_args(settings.engine_args)
        unknown = sorted(set(self._further) - set(AsyncEngineArgs.__dataclass_fields__))
        if unknown:
            raise invalid(f"--engine-args: vLLM has no argument {unknown[0]}", param="engine_args")
        kind = current_platform.device_type
        if settings.device not in ("auto", kind):
            raise invalid(
                f"--device {settings.device}: this vLLM computes on {kind}; leave out --device", param="device"
            )
        if settings.device_map is not None:
            raise invalid("vLLM takes --tensor-parallel and --pipeline-parallel, not --device-map", param="device_map")
        if settings.quantization != "none":
            raise invalid("vLLM quantises no weights here: give a quantised checkpoint", param="quantization")
        self._device = torch.device(kind)

    def refusal(self, checkpoint: Checkpoint) -> str | None:
        """Why a checkpoint is not served by this engine; None: it is."""
        reason = unserved_by_vllm(checkpoint.family)
        if reason is not None:
            return reason
        if checkpoint.adapter is not None:
            return "vLLM is not given adapters here: leave out --adapter, or say --engine packed"
        return None

    def build(
        self, checkpoint: Checkpoint, table: TokenTable, end_ids: frozenset[int], context_length: int
    ) -> VllmEngine:
        settings, family = self._settings, checkpoint.family
        refusal = self.refusal(checkpoint)
        if refusal is not None:
            raise CheckpointError(f"{checkpoint.path}: {refusal}")
        dtype = choose_dtype(settings.dtype, (self._device,), checkpoint.dtype)
        width = checkpoint.hidden_size * len(checkpoint.embedding_tensors)
        directory, statistics = RowDirectory(SHARED_MEMORY, _PREFIX), Statistics()
        try:
            llm = AsyncLLM.from_engine_args(
                self._arguments(checkpoint, dtype, context_length, width), stat_loggers=[statistics]
            )
        except Exception as error:
            directory.close()
            _log.exception("vllm_start_failed")
            text = "vLLM could not start with this checkpoint and these settings; its own log is above"
            raise LookonceError(ErrorKind.CHECKPOINT_INVALID, text) from error
        config = llm.vllm_config
        block = int(config.cache_config.block_size)
        statistics.kv_bytes = int(config.cache_config.kv_cache_memory_bytes or 0)
        prompts = PromptBounds(
            vocabulary=int(family.text_config(checkpoint.config)["vocab_size"]),
            position_rows=3,
            row_width=width,
            image_id=family.special_tokens(checkpoint.config).image_id,
            merge_size=checkpoint.merge_size,
            image_tokens=int(llm.input_processor.mm_encoder_cache_size),
            block=block,
            batch_invariant=bool(envs.VLLM_BATCH_INVARIANT) and self._device.type == "cuda",
        )
        entries = checkpoint.half_entries(Half.LANGUAGE)
        facts = ModelFacts(
            context_length=context_length,
            dtype=dtype_name(dtype),
            device=str(self._device),
            weight_bytes=sum(math.prod(entry.shape) for entry in entries.values()) * dtype.itemsize,
            engine="vllm",
        )
        bounds = PackedOptions(max_running=settings.max_running, max_waiting=settings.max_waiting)
        return VllmEngine(
            llm,
            statistics,
            directory,
            dtype,
            table,
            end_ids,
            context_length,
            bounds,
            prompts,
            facts,
            partial(check_model, llm, checkpoint),
        )

    def _arguments(
        self, checkpoint: Checkpoint, dtype: torch.dtype, context_length: int, width: int
    ) -> AsyncEngineArgs:
        settings, on_cpu = self._settings, self._device.type == "cpu"
        arguments: dict[str, Any] = {
            "model": str(checkpoint.path),
            "dtype": dtype_name(dtype),
            "max_model_len": context_length,
            "max_num_seqs": settings.max_running,
            "tensor_parallel_size": settings.tensor_parallel,
            "pipeline_parallel_size": settings.pipeline_parallel,
            "block_size": _CPU_BLOCK if on_cpu else _GPU_BLOCK,
            "enforce_eager": on_cpu,
            "enable_mm_embeds": True,
            "limit_mm_per_prompt": {"image": 0, "video": 0},
            "mm_processor_cache_gb": 0,
            "enable_prefix_caching": True,
            "scheduling_policy": "priority",
            "generation_config": "vllm",
            "seed": 0,
            "structured_outputs_config": {"backend": "guidance"},
            "worker_extension_cls": f"{worker.__name__}.{worker.WorkerExtension.__name__}",
            "ec_transfer_config": {
                "ec_connector": connector.NAME,
                "ec_connector_module_path": connector.MODULE,
                "ec_role": "ec_consumer",
                "ec_connector_extra_config": {"width": width},
            },
        }
        budget = self._kv_budget()
        if budget is not None:
            arguments["kv_cache_memory_bytes"] = budget
        else:
            arguments["gpu_memory_utilization"] = settings.gpu_memory_share
        return AsyncEngineArgs(**arguments | self._further)

    def _kv_budget(self) -> int | None:
        """Bytes of KV, of answers and prefixes together: vLLM has one budget for both. None: its share of a GPU."""
        given = (self._settings.kv_bytes, self._settings.prefix_bytes)
        if self._device.type != "cpu" and given == (None, None):
            return None
        options, free = PackedOptions(kv_bytes=given[0], prefix_bytes=given[1]), free_memory(self._device)
        return options.budget("kv_bytes", free) + options.budget("prefix_bytes", free)
