"""What vLLM is started with. Knows nothing of vLLM but the names of its arguments."""

from __future__ import annotations

import json
from typing import Any

from lookonce.core.errors import invalid

_OURS = "the language service sets it"
_TOWER = "it would bring back the vision half, which the vision service is for"
_REMOTE = "code of a checkpoint is never run"
DENIED = {
    "model": "say --model",
    "tokenizer": _OURS,
    "revision": "say --revision",
    "dtype": "say --dtype",
    "max_model_len": "say --context-length",
    "max_num_seqs": "say --max-running",
    "tensor_parallel_size": "say --tensor-parallel",
    "pipeline_parallel_size": "say --pipeline-parallel",
    "gpu_memory_utilization": "say --gpu-memory-share",
    "kv_cache_memory_bytes": "say --kv-bytes and --prefix-bytes",
    "trust_remote_code": _REMOTE,
    "hf_overrides": _REMOTE,
    "model_impl": _REMOTE,
    "logits_processors": _REMOTE,
    "worker_cls": _REMOTE,
    "worker_extension_cls": _OURS,
    "scheduler_cls": _REMOTE,
    "load_format": "weights are read from safetensors only",
    "limit_mm_per_prompt": _TOWER,
    "language_model_only": _TOWER,
    "mm_encoder_only": _TOWER,
    "enable_mm_embeds": _OURS,
    "mm_processor_cache_gb": _OURS,
    "ec_transfer_config": _OURS,
    "enable_prompt_embeds": "what a request holds would be computed unchecked",
    "scheduling_policy": _OURS,
    "enable_prefix_caching": _OURS,
    "generation_config": "say --generation-config",
    "override_generation_config": "say --generation-config",
    "skip_tokenizer_init": _OURS,
    "disable_log_stats": _OURS,
    "logprobs_mode": "log-probabilities are the model's own, before temperature and filters",
    "max_logprobs": _OURS,
    "enable_lora": "say --adapter",
    "data_parallel_size": "start more language services, and name them to the gateway",
    "headless": "start more language services, and name them to the gateway",
    "api_server_count": "start more language services, and name them to the gateway",
    "runner": "an embedding model is served by the packed engine",
    "convert": "an embedding model is served by the packed engine",
    "speculative_config": "it is not proven to leave scores and answers as they are",
    "return_sampling_mask": _OURS,
    "enable_trace_replay": _OURS,
}
"""Arguments of vLLM that `--engine-args` may not set, and why or what to say instead."""


def parse_engine_args(text: str | None) -> dict[str, Any]:
    """The object of `--engine-args`, its names as vLLM's AsyncEngineArgs has them. Raises INVALID_ARGUMENT."""
    if not text:
        return {}
    try:
        given = json.loads(text)
    except ValueError as error:
        raise invalid(f"--engine-args is not JSON: {error}", param="engine_args") from None
    if not isinstance(given, dict):
        raise invalid('--engine-args must be an object: {"enforce_eager": true}', param="engine_args")
    found = {name.lstrip("-").replace("-", "_"): value for name, value in given.items()}
    for name in found:
        if name in DENIED:
            raise invalid(f"--engine-args may not set {name}: {DENIED[name]}", param="engine_args")
    return found
