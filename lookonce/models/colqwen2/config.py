"""ColQwen2's families: the Qwen2-VL or Qwen2.5-VL within, whose embeddings they share, and a projection for a head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lookonce.core.errors import CheckpointError
from lookonce.models.family import Family, Half, Layout
from lookonce.models.qwen2_5_vl.config import Qwen25VL
from lookonce.models.qwen2_vl.config import Qwen2VL
from lookonce.models.vector_layout import TokenVectors

if TYPE_CHECKING:
    import torch

    from lookonce.models.checkpoint.checkpoint import Checkpoint
    from lookonce.models.plain import Plain
    from lookonce.models.text_adapter import ModelAdapter

    Within = Qwen2VL
else:
    Within = object

PROJECTION = "embedding_proj_layer"
_HEADS = (f"{PROJECTION}.", "custom_text_proj.")  # transformers' name, colpali-engine's
_WIDTH = 128
_VISUAL_PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|><|endoftext|>"
)
_AUGMENTATION = ("<|endoftext|>",) * 10
_CLASSES = ("ColQwen2ForRetrieval", "ColQwen2", "ColQwen2_5")


class _ProjectedTokens(Within):
    """What the head changes of the family within. `tower` is its `model_type`, which fingerprints name."""

    layouts = f"vlm.*, visual.*, model.* and {PROJECTION}.*"
    template = "{%- for message in messages -%}{{- message['content'] -}}{%- endfor -%}"
    token_vectors = TokenVectors(_VISUAL_PROMPT, "Query: ", (*_AUGMENTATION, "\n"))

    def locate(self, name: str) -> tuple[Half, str] | None:
        """The head is the language half's; one over the vocabulary is no part of the model."""
        for head in _HEADS:
            if name.startswith(head):
                return Half.LANGUAGE, f"{PROJECTION}.{name.removeprefix(head)}"
        name = name.removeprefix("vlm.")
        if name.startswith("lm_head."):
            return None
        return super().locate(f"model.{name}" if name.startswith("language_model.") else name)

    def tensor_shapes(self, config: dict[str, Any], half: Half, *, head: bool) -> dict[str, tuple[int, ...]]:
        shapes = super().tensor_shapes(config, half, head=False)
        if half is Half.VISION:
            return shapes
        width = self.vector_width(config)
        return shapes | {f"{PROJECTION}.weight": (width, self.hidden_size(config)), f"{PROJECTION}.bias": (width,)}

    def tied_head(self, config: dict[str, Any]) -> bool:
        """There is no head that could be: none is looked for."""
        return True

    def vector_width(self, config: dict[str, Any]) -> int:
        """Of a token's vector. Raises CheckpointError."""
        width = config.get("embedding_dim", _WIDTH)
        if not isinstance(width, int) or not 1 <= width <= 1 << 16:
            raise CheckpointError(f"config.json: embedding_dim must be the width of a vector, got {width!r}")
        return width

    def problems(
        self, config: dict[str, Any], preprocessor: dict[str, Any] | None, halves: Iterable[Half]
    ) -> list[str]:
        stated = config.get("architectures") or ()
        if any(name in stated for name in _CLASSES):
            config = {key: value for key, value in config.items() if key != "architectures"}
        return super().problems(config, preprocessor, halves)

    def positions(self, config: dict[str, Any], length: int, images: Layout) -> tuple[NDArray[np.int64], int]:
        """As transformers' class has them, which counts an image's tokens like a text's; colpali-engine's models have
        the positions of the model within."""
        if "embedding_dim" not in config:
            return super().positions(config, length, images)
        return np.broadcast_to(np.arange(length), (3, length)), length

    def load_text(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        where: Callable[[str], torch.device],
        devices: Sequence[torch.device],
        *,
        quantization: str = "none",
        native: bool = True,
    ) -> ModelAdapter:
        raise CheckpointError(
            f"{checkpoint.name} is a retrieval model and writes no text: leave --task at auto or embed"
        )

    def load_vectors(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        where: Callable[[str], torch.device],
        devices: Sequence[torch.device],
        *,
        quantization: str = "none",
        native: bool = True,
    ) -> ModelAdapter:
        from lookonce.models.qwen2_vl.modules import load_text_model
        from lookonce.models.qwen2_vl.text import Qwen2VLAdapter

        width = self.vector_width(checkpoint.config)
        model, head = load_text_model(checkpoint, dtype, where, PROJECTION, width, bias=True)
        return Qwen2VLAdapter(model, head, quantization=quantization, devices=devices, native=native)


class ColQwen2(_ProjectedTokens, Qwen2VL):
    """Over Qwen2-VL."""

    model_type = "colqwen2/qwen2_vl"
    label = "ColQwen2"
    served_by_vllm = False
    tower = Qwen2VL.model_type

    def plain(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Plain:
        from lookonce.models.colqwen2.plain import PlainColQwen2

        return PlainColQwen2(checkpoint, dtype)


class ColQwen25(_ProjectedTokens, Qwen25VL):
    """Over Qwen2.5-VL."""

    model_type = "colqwen2/qwen2_5_vl"
    label = "ColQwen2.5"
    served_by_vllm = False
    tower = Qwen25VL.model_type

    def plain(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Plain:
        from lookonce.models.colqwen2.plain import PlainColQwen25

        return PlainColQwen25(checkpoint, dtype)


COLQWEN2: Family = ColQwen2()
COLQWEN2_5: Family = ColQwen25()
