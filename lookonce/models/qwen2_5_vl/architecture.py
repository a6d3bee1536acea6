"""Qwen2.5-VL's architecture: the published sizes and small ones for tests. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lookonce.core.errors import CheckpointError
from lookonce.models.qwen2_vl.architecture import Architecture, Shapes, affine


@dataclass(frozen=True)
class Qwen25VLArchitecture(Architecture):
    """Dimensions of one Qwen2.5-VL."""

    model_type = "qwen2_5_vl"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    processor_class = "Qwen2_5_VLProcessor"
    activation = "silu"
    tower_fields: ClassVar[dict[str, str]] = {
        "vision_depth": "depth",
        "vision_width": "hidden_size",
        "vision_heads": "num_heads",
        "vision_ffn": "intermediate_size",
        "window": "window_size",
        "patch": "patch_size",
        "temporal_patch": "temporal_patch_size",
        "merge": "spatial_merge_size",
    }
    mlp_matrices = 3

    vision_ffn: int = 3420
    window: int = 112  # pixels of a side
    full_blocks: tuple[int, ...] = (7, 15, 23, 31)  # those whose patches see the whole image

    def __post_init__(self) -> None:
        """Refuse dimensions that transformers' modules can't take."""
        super().__post_init__()
        if self.window_side < 1:
            raise CheckpointError(f"window {self.window} is smaller than a token, {self.patch * self.merge} pixels")

    @property
    def window_side(self) -> int:
        """Tokens of a window's side."""
        return self.window // self.merge // self.patch

    def attention_pairs(self, count: int) -> float:
        full = len(set(self.full_blocks) & set(range(self.vision_depth)))
        window = (self.window_side * self.merge) ** 2
        return full * count**2 + (self.vision_depth - full) * count * min(count, window)

    def norm(self, name: str) -> Shapes:
        yield f"{name}.weight", (self.vision_width,)

    def mlp(self, name: str) -> Shapes:
        yield from affine(name + ".gate_proj", self.vision_ffn, self.vision_width)
        yield from affine(name + ".up_proj", self.vision_ffn, self.vision_width)
        yield from affine(name + ".down_proj", self.vision_width, self.vision_ffn)

    def vision_config(self) -> dict[str, Any]:
        return {
            "depth": self.vision_depth,
            "fullatt_block_indexes": list(self.full_blocks),
            "hidden_act": self.activation,
            "hidden_size": self.vision_width,
            "intermediate_size": self.vision_ffn,
            "num_heads": self.vision_heads,
            "out_hidden_size": self.hidden,
            "patch_size": self.patch,
            "spatial_merge_size": self.merge,
            "temporal_patch_size": self.temporal_patch,
            "tokens_per_second": 2,
            "window_size": self.window,
        }


def _published(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int) -> Qwen25VLArchitecture:
    return Qwen25VLArchitecture(32, 1280, 16, layers, hidden, heads, kv_heads, ffn, vocab=152064)


SIZES: dict[str, Qwen25VLArchitecture] = {
    "tiny": Qwen25VLArchitecture(3, 64, 2, 2, 64, 4, 2, ffn=128, vocab=512, vision_ffn=84, full_blocks=(1,)),
    "small": Qwen25VLArchitecture(4, 128, 4, 4, 128, 4, 2, ffn=384, vocab=2048, vision_ffn=340, full_blocks=(1, 3)),
    "50m": Qwen25VLArchitecture(8, 384, 6, 8, 512, 8, 2, ffn=2048, vocab=8192, vision_ffn=1028, full_blocks=(3, 7)),
    "3b": replace(_published(36, 2048, 16, 2, 11008), vocab=151936),
    "7b": _published(28, 3584, 28, 4, 18944),
    "32b": replace(_published(64, 5120, 40, 8, 27648), vision_ffn=3456),
    "72b": replace(_published(80, 8192, 64, 8, 29568), vision_ffn=3456),
}
