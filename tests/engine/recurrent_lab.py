"""Small real models with recurrent layers beside the engine: Qwen3.5, dense and of experts, and LFM2."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from lm_service.engine.types import Prompt
from lookonce.models.general.architecture import Architecture, parsed
from lookonce.models.general.attention import NAME
from lookonce.models.general.decoder import GeneralText, shape_of
from lookonce.models.general.limits import attention_calls
from lookonce.models.general.recurrent import intercept
from tests.engine.lab import VOCABULARY, Album, Lab

CPU = torch.device("cpu")
_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
_TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.15}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
_DELTA = {"num_hidden_layers": 4, "head_dim": 32, "rope_parameters": _ROPE, "layer_types": ["linear_attention"] * 3}
_DELTA |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
_DELTA |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4}
_DELTA["layer_types"] = [*["linear_attention"] * 3, "full_attention"]
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_EXPERTS |= {"shared_expert_intermediate_size": 32}
_TOWER = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
_SHORT = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "conv"], "block_ff_dim": 128}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_5": {"text_config": {"model_type": "qwen3_5_text", **_TEXT, **_DELTA}, "vision_config": _TOWER},
    "qwen3_5_moe": {
        "text_config": {"model_type": "qwen3_5_moe_text", **_TEXT, **_DELTA, **_EXPERTS},
        "vision_config": _TOWER,
    },
    "lfm2_vl": {"text_config": {"model_type": "lfm2", **_TEXT, **_SHORT}, "projector_hidden_size": 32},
}
"""The last of them ends with layers that don't attend."""


class RecurrentLab(Lab):
    """A text model twice: in the engine, and as transformers runs it, whole and alone."""

    def __init__(self, kind: str) -> None:
        config = KINDS[kind] | {"model_type": kind, "tie_word_embeddings": False}
        architecture = Architecture(config)
        calls = attention_calls(architecture)
        torch.manual_seed(0)
        model = architecture.cls(parsed(config)).float().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # so that it remembers
                torch.nn.init.normal_(parameter, -3, 0.5)
        plain = copy.deepcopy(model)
        self.text_model = plain.get_submodule(architecture.decoder_name)
        self.head = plain.get_submodule(architecture.head_name)
        text = model.get_submodule(architecture.decoder_name)
        text.set_attn_implementation(NAME)
        intercept(text.layers)
        shape = shape_of(architecture, calls, torch.float32, [CPU] * calls.all_layers)
        head = model.get_submodule(architecture.head_name)
        self.adapter: Any = GeneralText(model, architecture.decoder_name, head, shape, calls.attending)
        self.album = Album(shape.hidden)

    def own(self, wanted: Prompt) -> Prompt:
        """A prompt of `lab.prompt` with as many rows of positions as the model has."""
        return replace(wanted, positions=wanted.positions[: self.adapter.shape.position_rows])

    @torch.inference_mode()
    def logits(self, wanted: Prompt, answer: list[int] | tuple[int, ...] = ()) -> torch.Tensor:
        """[T, vocabulary] of prompt and answer, by transformers, alone and in one piece."""
        ids = torch.tensor([[*wanted.token_ids, *answer]])
        hidden = self.text_model.embed_tokens(ids)
        for span in wanted.images:
            hidden[0, span.start : span.end] = self.album.rows(span.reference).to(hidden.dtype)
        further = torch.arange(wanted.next_position, wanted.next_position + len(answer))
        rows = len(wanted.positions)
        positions = torch.cat([torch.from_numpy(wanted.positions), further.expand(rows, -1)], dim=1)
        places = positions if rows == 1 else positions[:, None]
        mask = torch.ones_like(ids)
        out = self.text_model(inputs_embeds=hidden, attention_mask=mask, position_ids=places, use_cache=False)
        return self.head(out.last_hidden_state)[0]
