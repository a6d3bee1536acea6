"""The one door to the compiled kernels (lookonce/models/kernels): what there is for this machine, or None.

LLVM is imported when something is asked for, so that a process that computes by torch's operations goes without. Where
nothing can be compiled a line in the log says so, and torch's operations serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lookonce.models.text_adapter import ModelShape

if TYPE_CHECKING:
    from lookonce.models.kernels.attention.step_kernels import AttentionKernels
    from lookonce.models.kernels.panels import PanelGatedUnit, PanelLinear
    from lookonce.models.kernels.text_layers import TextLayers
    from lookonce.models.kernels.text_rows import TextRows
    from lookonce.models.kernels.vision.blocks import VisionBlocks
    from lookonce.models.kernels.vision.tower_kernels import Kernels
    from lookonce.models.linear import LayerWeights, VisionBlockWeights


def panel_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PanelLinear | None:
    """A `Linear` over a matrix [out, in] and a bias [out]."""
    if not _serves(weight):
        return None
    from lookonce.models.kernels.panels import PanelLinear, panels_serve

    return PanelLinear(weight, bias) if panels_serve(weight) else None


def panel_gated_unit(gate: torch.Tensor, up: torch.Tensor) -> PanelGatedUnit | None:
    """A `GatedUnit` over two matrices [out, in]."""
    if not _serves(gate):
        return None
    from lookonce.models.kernels.panels import PanelGatedUnit, panels_serve

    return PanelGatedUnit(gate, up) if panels_serve(gate) else None


def text_rows(hidden: int, head_dim: int, rotated: int, epsilon: float, like: torch.Tensor) -> TextRows | None:
    """Norms and rotations of a decoder's rows such as `like`: of each token the first `rotated` heads are rotated."""
    if not _serves(like):
        return None
    from lookonce.models.kernels.text_rows import rows_for

    return rows_for(hidden, head_dim, rotated, epsilon)


def text_layers(
    layers: Sequence[LayerWeights], norm: torch.Tensor, rows: TextRows | None, shape: ModelShape
) -> TextLayers | None:
    """A decoder's layers and the norm [hidden] behind them as one program. None for norms of queries and keys, too."""
    if rows is None or any(layer.qk_norm is not None for layer in layers):
        return None
    from lookonce.models.kernels.text_layers import layers_for

    return layers_for(layers, norm, rows, shape)


def attention_kernels(shape: ModelShape) -> AttentionKernels | None:
    """Attention of a step over a model's heads; none of them knows rules."""
    if shape.rules is not None or shape.dtype != torch.float32 or shape.device.type != "cpu" or len(shape.stages) > 1:
        return None
    from lookonce.models.kernels.attention.step_kernels import kernels_for

    return kernels_for(shape.head_dim, shape.group, shape.kv_heads)


def vision_blocks(blocks: Sequence[VisionBlockWeights], norm: torch.nn.LayerNorm, heads: int) -> VisionBlocks | None:
    """A vision tower's blocks of so many heads, and the norm behind them."""
    if not _serves(norm.weight):
        return None
    from lookonce.models.kernels.vision.blocks import blocks_for

    return blocks_for(blocks, norm, heads)


def tower_kernels(heads: int, head_width: int, inner: int, like: torch.Tensor) -> Kernels | None:
    """Kernels of a vision tower whose blocks are none of `vision_blocks`: values of pixels, and attention. `inner` is
    the width of its MLP, `like` one of its weights."""
    if not _serves(like):
        return None
    from lookonce.models.kernels.compiling import compiled_or_none
    from lookonce.models.kernels.vision.tower_kernels import Kernels, Shape

    shape = Shape(head_width, heads, inner, epsilon=1e-6)
    return compiled_or_none(lambda: Kernels(shape)) if shape.supported else None


def _serves(like: torch.Tensor) -> bool:
    return like.device.type == "cpu" and like.dtype == torch.float32
