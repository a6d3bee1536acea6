"""Qwen2.5-VL (arXiv:2502.13923): where its settings differ from Qwen2-VL's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from lookonce.models.family import Family, VisionEncoder
from lookonce.models.qwen2_5_vl.architecture import Qwen25VLArchitecture
from lookonce.models.qwen2_vl.architecture import Architecture, architecture_of
from lookonce.models.qwen2_vl.config import Qwen2VL
from lookonce.models.qwen2_vl.limits import FROM_REPOSITORY, is_size, tower_problems

if TYPE_CHECKING:
    import torch

    from lookonce.models.checkpoint.checkpoint import Checkpoint
    from lookonce.models.plain import Plain

_SIZES = (
    "depth",
    "hidden_size",
    "out_hidden_size",
    "intermediate_size",
    "num_heads",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "window_size",
)


class Qwen25VL(Qwen2VL):
    """The family of Qwen2.5-VL 3B, 7B, 32B and 72B and their fine-tunes."""

    model_type = "qwen2_5_vl"
    label = "Qwen2.5-VL"
    kind = Qwen25VLArchitecture
    vision_defaults: ClassVar[dict[str, Any]] = {
        "depth": 32,
        "hidden_size": 3584,
        "hidden_act": "silu",
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    row_width = "out_hidden_size"

    def architecture(self, config: dict[str, Any]) -> Architecture:
        vision, text = self.vision_config(config), self.text_config(config)
        blocks = tuple(vision["fullatt_block_indexes"]) if not _block_problem(vision) else ()
        return architecture_of(self.kind, vision, text, self.hidden_size(config), full_blocks=blocks)

    def vision_problems(self, vision: dict[str, Any]) -> Iterable[str]:
        return vision_problems(vision)

    def load_encoder(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        quantization: str = "none",
        native: bool = True,
    ) -> VisionEncoder:
        from lookonce.models.qwen2_5_vl.vision import WindowEncoder

        return WindowEncoder.load(checkpoint, dtype, device, quantization=quantization, native=native)

    def plain(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Plain:
        from lookonce.models.qwen2_5_vl.plain import PlainQwen25VL

        return PlainQwen25VL(checkpoint, dtype)


def vision_problems(vision: dict[str, Any]) -> Iterator[str]:
    """Every setting of a filled-in vision config that can't be computed."""
    yield from tower_problems(vision, _SIZES, width="hidden_size", activation="silu", label=Qwen25VL.label)
    yield from _block_problem(vision)
    window, patch, merge = (vision[name] for name in ("window_size", "patch_size", "spatial_merge_size"))
    if is_size(window) and is_size(patch) and is_size(merge) and window < patch * merge:
        yield (
            f"config.json: vision_config.window_size {window} must be at least a token's {patch * merge} pixels; "
            f"{FROM_REPOSITORY}"
        )


def _block_problem(vision: dict[str, Any]) -> list[str]:
    blocks = vision["fullatt_block_indexes"]
    if isinstance(blocks, list) and all(isinstance(block, int) and not isinstance(block, bool) for block in blocks):
        return []
    return [
        f"config.json: vision_config.fullatt_block_indexes must be numbers of blocks, got {blocks!r}; {FROM_REPOSITORY}"
    ]


FAMILY: Family = Qwen25VL()
