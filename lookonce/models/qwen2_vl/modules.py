"""Each half of Qwen2-VL as bare torch modules that hold weights under the published names; its successors share most.

The services run their own packed forwards over these; importing transformers' modelling code would triple a service's
start-up time and cost 150 MB. What the forwards compute is held equal to transformers' by the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint.checkpoint import Checkpoint
from lookonce.models.checkpoint.weights import Where, load_weights
from lookonce.models.qwen2_vl.limits import text_problems, vision_problems
from lookonce.models.qwen2_vl.rope import SECTIONS, THETA, frequencies, mrope_section, rope_frequencies
from lookonce.models.registry import Half

_Module = TypeVar("_Module", bound=nn.Module)
VISION_EPSILON = 1e-6


class PatchEmbed(nn.Module):
    """A convolution whose stride equals its kernel: a matrix product, once the patches are cut."""

    def __init__(self, channels: int, width: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, kernel, stride=kernel, bias=False)


class VisionAttention(nn.Module):
    """Fused query, key and value, and the output projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class VisionMlp(nn.Module):
    """Two layers with QuickGELU, x * sigmoid(1.702 x), between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.inner = inner
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[patches, width] -> [patches, width]."""
        inner = self.fc1(hidden)
        output: torch.Tensor = self.fc2(inner * torch.sigmoid(1.702 * inner))
        return output


class VisionBlock(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["embed_dim"]
        self.norm1 = nn.LayerNorm(width, eps=VISION_EPSILON)
        self.norm2 = nn.LayerNorm(width, eps=VISION_EPSILON)
        self.attn = VisionAttention(width, config["num_heads"])
        self.mlp = VisionMlp(width, int(width * config["mlp_ratio"]))


class PatchMerger(nn.Module):
    """merge x merge patches to one token of the language model's width."""

    def __init__(self, norm: nn.Module, inner: int, hidden: int) -> None:
        """`norm` is of a patch; `inner` is the width of all patches of a token."""
        super().__init__()
        self.inner = inner
        self.ln_q: Any = norm
        self.mlp = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, hidden))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[patches, width] -> [tokens, hidden]."""
        tokens: torch.Tensor = self.mlp(self.ln_q(hidden).view(-1, self.inner))
        return tokens


class Tower(nn.Module):
    """A vision half's weights; `rotary_frequencies` [head width / 4] is computed, not stored."""

    def __init__(
        self, config: dict[str, Any], width: int, hidden: int, block: Callable[[], nn.Module], norm: nn.Module
    ) -> None:
        """Patches are `width` wide, tokens `hidden`; `norm` is the one behind the last block."""
        super().__init__()
        self.spatial_merge_size: int = config["spatial_merge_size"]
        kernel = (config["temporal_patch_size"], config["patch_size"], config["patch_size"])
        self.patch_embed = PatchEmbed(config["in_channels"], width, kernel)
        self.blocks: Any = nn.ModuleList(block() for _ in range(config["depth"]))
        self.merger: Any = PatchMerger(norm, width * self.spatial_merge_size**2, hidden)
        self.rotary_frequencies = rope_frequencies(width // config["num_heads"] // 2, config["rope_theta"])


class VisionTower(Tower):
    """Qwen2-VL's."""

    def __init__(self, config: dict[str, Any]) -> None:
        refuse(vision_problems(config))
        width = config["embed_dim"]
        norm = nn.LayerNorm(width, eps=VISION_EPSILON)
        super().__init__(config, width, config["hidden_size"], lambda: VisionBlock(config), norm)


class Rotary:
    """What turns M-RoPE positions to angles: `inv_freq` [head width / 2], float32."""

    interleaved = False
    """Whether the sections of M-RoPE are."""
    default_section: tuple[int, ...] = SECTIONS
    default_theta = THETA

    def __init__(self, config: dict[str, Any], head_dim: int | None = None) -> None:
        """`head_dim`: where that isn't hidden / heads."""
        self.mrope_section = mrope_section(config, self.default_section)
        head_width = head_dim or config["hidden_size"] // config["num_attention_heads"]
        self.inv_freq, self.attention_scaling = frequencies(config, head_width, self.default_theta)


class TextAttention(nn.Module):
    """Grouped-query attention's projections."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        inner = hidden // heads * config["num_key_value_heads"]
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, inner)
        self.v_proj = nn.Linear(hidden, inner)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)


class TextMlp(nn.Module):
    """SwiGLU's three matrices."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)


class TextLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: dict[str, Any], attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"])
        self.self_attn = attention
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"])
        self.mlp = mlp


class TextModel(nn.Module):
    """The language half's weights but for the output head, and the dimensions that a forward needs."""

    rotary: type[Rotary] = Rotary
    attention: type[nn.Module] = TextAttention
    mlp: type[nn.Module] = TextMlp
    problems: Callable[[dict[str, Any], str], Iterable[str]] = staticmethod(text_problems)
    """What of its settings, by a family of some label, can't be computed."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.rotary_emb = self.rotary(config)
        # From a tensor, as initialising one on the meta device imports torch's compiler: a second of every start.
        rows = torch.empty(config["vocab_size"], config["hidden_size"])
        self.embed_tokens = nn.Embedding.from_pretrained(rows, freeze=False)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(
            TextLayer(config, self.attention(config), self.mlp(config)) for _ in range(config["num_hidden_layers"])
        )
        self.norm = nn.RMSNorm(config["hidden_size"])


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x [..., width] / sqrt(mean(x^2) + epsilon) * weight [width], or one for each row of the last two dimensions; the
    norm in float32."""
    if x.dtype == torch.float32 and weight.dim() == 1:
        return functional.rms_norm(x, (x.shape[-1],), weight, epsilon)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def load_vision_tower(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    kind: Callable[[dict[str, Any]], Tower] = VisionTower,
) -> Tower:
    """The vision half, in eval mode. Raises CheckpointError."""
    with torch.device("meta"):
        tower = kind(checkpoint.family.vision_config(checkpoint.config))
    load_weights(tower, checkpoint, Half.VISION, dtype=dtype, device=device)
    return _frozen(tower)


def load_language_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str | Where = "cpu",
    kind: type[TextModel] = TextModel,
) -> tuple[TextModel, nn.Linear]:
    """The language half and its output head, in eval mode; a tied head shares the embedding's parameter. `device` may
    differ from tensor to tensor.

    Raises CheckpointError."""
    vocabulary = checkpoint.family.text_config(checkpoint.config).get("vocab_size", 0)  # one that lacks is refused
    return load_text_model(checkpoint, dtype, device, "lm_head", vocabulary, kind=kind)


def load_text_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str | Where,
    head_name: str,
    head_width: int,
    *,
    bias: bool = False,
    kind: type[TextModel] = TextModel,
) -> tuple[TextModel, nn.Linear]:
    """The language half with a head of that name and width behind it, as `load_language_model`."""
    config = text_settings(checkpoint, kind)
    with torch.device("meta"):
        model = kind(config)
        head = nn.Linear(config["hidden_size"], head_width, bias=bias)
    halves = nn.ModuleDict({"model": model, head_name: head})
    load_weights(halves, checkpoint, Half.LANGUAGE, dtype=dtype, device=device)
    return _frozen(model), _frozen(head)


def text_settings(checkpoint: Checkpoint, kind: type[TextModel] = TextModel) -> dict[str, Any]:
    """The language half's configuration with transformers' defaults filled in. CheckpointError for what has none."""
    config = {"rms_norm_eps": 1e-5, "max_position_embeddings": 32768}
    config |= checkpoint.family.text_config(checkpoint.config)
    refuse(kind.problems(config, checkpoint.family.label))
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    return config


def refuse(problems: Iterable[str]) -> None:
    """Raise CheckpointError with all problems, if there are any."""
    found = list(problems)
    if found:
        raise CheckpointError(*found)


def _frozen(module: _Module) -> _Module:
    module.requires_grad_(False)
    module.train(False)
    return module
