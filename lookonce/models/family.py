"""What lookonce asks of a model family: its weights' names, its settings, its images, its prompts, and its two halves.

A family is one object that answers for every checkpoint of one `model_type`. It reads `config`, the parsed config.json,
flat or nested. Only `load_encoder` and `load_text` import torch; all else is arithmetic over JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from lookonce.models.checkpoint.checkpoint import Checkpoint
    from lookonce.models.omp_thread import Pause
    from lookonce.models.plain import Plain
    from lookonce.models.text_adapter import ModelAdapter

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYERS, BLOCKS = "model.layers.", "blocks."
"""How every family calls its embedding, its output head, the language half's layers and the tower's blocks, whatever
the files call them; a number follows the last two."""

Grid = tuple[int, int, int]
"""Patches of an image: frames, rows, columns."""
Layout = Sequence[tuple[int, Grid]]
"""Where each image of a prompt begins, in order, and its grid."""
Marker = tuple[int, int]
"""A token among an image's: its place, counted from the image's first token, and its id."""


class Half(StrEnum):
    """One side of a split model."""

    VISION = "vision"
    LANGUAGE = "language"

    @property
    def other(self) -> Half:
        """The side this one is served apart from."""
        return Half.LANGUAGE if self is Half.VISION else Half.VISION


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens that prompts are made with."""

    image_id: int  # of the token that stands for each row of an image
    image: str  # text of the token that the chat template writes for an image
    marker: str  # what stands for an image in a message that the template takes as one string
    turn_end: str  # what ends a turn where no file of the checkpoint says so
    written_id: int = -1  # of the token that the chat template writes for an image; -1: `image_id`

    @property
    def placeholder_id(self) -> int:
        """Of the token that the chat template writes for an image."""
        return self.image_id if self.written_id < 0 else self.written_id


@dataclass(frozen=True)
class Dimensions:
    """Those of a model that planning needs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # width of the language half's MLP
    vocabulary: int
    patches_per_token: int
    patch_numbers: int  # at hand for each patch while a batch is encoded
    deepstack: int = 0  # first layers behind which further rows are added to an image's tokens
    kv_layers: int = 0  # layers that keep keys and values, where others have recurrent state; 0: all
    state_numbers: int = 0  # of one sequence's recurrent state, in the dtype of the weights
    state_floats: int = 0  # and in float32, whatever that is
    idle_parameters: int = 0  # of the language half's matrices, those of experts that a token is not sent to
    int8: bool = True  # whether the halves' matrices may be held in int8

    @property
    def recurrent(self) -> bool:
        """Whether sequences have recurrent state, which is kept on one device."""
        return self.state_numbers + self.state_floats > 0


@dataclass(frozen=True)
class Patches:
    """An image cut to patches, in the order of its tower."""

    pixels: NDArray[np.uint8]  # [patches, ...], of whatever shape the tower takes
    grid_thw: Grid
    width: int  # of the image before it was resized
    height: int

    @property
    def count(self) -> int:
        """Number of patches."""
        return len(self.pixels)


class VisionEncoder(Protocol):
    """A loaded vision half."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its computation and its rows."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def prepare(self, image: Image.Image, min_pixels: int, max_pixels: int) -> Patches:
        """An RGB image, resized to between the bounds and cut. Called from several threads."""

    def encode(self, batch: Sequence[Patches], pause: Pause = ...) -> list[torch.Tensor]:
        """Rows [tokens, hidden] of each image on the CPU; [1 + deepstack, tokens, hidden] where the family's dimensions
        have a deepstack. Called from one thread; `pause` is called now and then, and may encode another batch."""

    def warm_up(self) -> None:
        """Encode something small, so that the first request doesn't pay for lazy initialisation."""


class _Weights(Protocol):
    """Names and shapes of tensors."""

    @property
    def layouts(self) -> str:
        """How the files' names begin, for messages: "visual.*, model.* and lm_head.*"."""

    def locate(self, name: str) -> tuple[Half, str] | None:
        """Half and module-relative name of a stored tensor, or None when the tensor carries no weight (old buffers).

        Raises CheckpointError for a name that no layout of the family has.
        """

    def tensor_shapes(self, config: dict[str, Any], half: Half, *, head: bool) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a half, by its module-relative name. `head`: the output head has a weight of its
        own. Raises CheckpointError naming the dimensions that `config` lacks.
        """

    def tied_head(self, config: dict[str, Any]) -> bool:
        """Whether the output head shares the input embedding's weight."""


class _Settings(Protocol):
    """What a checkpoint's files say."""

    @property
    def model_type(self) -> str:
        """The `model_type` of config.json."""

    @property
    def label(self) -> str:
        """The family's name for people."""

    @property
    def token_id_fields(self) -> Sequence[str]:
        """Fields of config.json that hold ids of tokens; the first is that of the image's."""

    @property
    def words(self) -> str:
        """How a tokenizer that is only vocab.json and merges.txt splits text: a regular expression."""

    def vision_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The settings that decide what the vision tower computes, defaults filled in (they enter the fingerprint)."""

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The language model's settings, with `vocab_size` and, if it has one, `max_position_embeddings`."""

    def problems(
        self, config: dict[str, Any], preprocessor: dict[str, Any] | None, halves: Iterable[Half]
    ) -> list[str]:
        """Every setting of these halves that can't be computed, one sentence each: file, what is wrong; remedy.

        `preprocessor` has its defaults filled in; None: unknown.
        """

    def hidden_size(self, config: dict[str, Any]) -> int:
        """Width of an image embedding, which is the language model's hidden size."""

    def dimensions(self, config: dict[str, Any]) -> Dimensions:
        """Of a model. Raises CheckpointError naming those that `config` lacks."""


class _Images(Protocol):
    """How images become patches and tokens."""

    @property
    def cpu_max_pixels(self) -> int:
        """Most pixels of a resized image where a CPU encodes and nobody has said otherwise."""

    def preprocessor(self, stored: dict[str, Any]) -> dict[str, Any]:
        """preprocessor_config.json with every default filled in, and `min_pixels` / `max_pixels` at the top level."""

    def fingerprint_preprocessor(self, preprocessor: dict[str, Any]) -> dict[str, Any]:
        """The preprocessor settings that change an embedding's bytes, pixel bounds left out (they are in its key)."""

    def merge_size(self, config: dict[str, Any]) -> int:
        """Patches per side that are merged to one token."""

    def least_pixels(self, config: dict[str, Any]) -> int:
        """Of the smallest image that has a token."""

    def image_grid(self, config: dict[str, Any], width: int, height: int, min_pixels: int, max_pixels: int) -> Grid:
        """The grid of an image of so many pixels, resized to between the bounds."""

    def tokens_per_grid(self, config: dict[str, Any], grid_thw: Grid) -> int:
        """Rows of an image's embedding. Raises INVALID_ARGUMENT for a grid that no image has."""

    def encode_flops(self, config: dict[str, Any], tokens: int) -> float:
        """Work of the tower on one image of so many tokens."""


class _Prompts(Protocol):
    """How images stand in a prompt."""

    def special_tokens(self, config: dict[str, Any]) -> SpecialTokens:
        """The tokens of a checkpoint."""

    def markers(self, config: dict[str, Any], grid_thw: Grid) -> tuple[Marker, ...]:
        """Tokens between and behind an image's rows, such as the ends of rows, in order; most families have none."""

    def positions(self, config: dict[str, Any], length: int, images: Layout) -> tuple[NDArray[np.int64], int]:
        """Positions [r, length] of a prompt, and that of the first token generated, on all r rows. r is the same for
        all prompts: 1, or 3 for M-RoPE. The array is not to be written to: others may be given it."""


class Family(_Weights, _Settings, _Images, _Prompts, Protocol):
    """One architecture."""

    def load_encoder(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        quantization: str = "none",
        native: bool = True,
    ) -> VisionEncoder:
        """Read the vision half. `quantization` ("none", "int8") is that of the blocks' matrices; `native`: use compiled
        kernels where there are some. Raises CheckpointError."""

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
        """Read the language half: each tensor to `where` its name belongs, each layer then brought to its one of
        `devices`. `quantization` and `native` as in `load_encoder`. Raises CheckpointError."""


def unpacked_reason(family: Family, config: dict[str, Any]) -> str | None:
    """Why the packed engine can't run a checkpoint's language half, a clause after its name; None: it can."""
    reason: Callable[[dict[str, Any]], str | None] | None = getattr(family, "unpacked", None)
    return reason(config) if reason is not None else None


def unserved_by_vllm(family: Family) -> str | None:
    """Why `--engine vllm` doesn't serve a family, a sentence with the remedy; None: it does, for vLLM's own class takes
    its rows, grids and positions as they are, which the family says by `served_by_vllm`."""
    if getattr(family, "served_by_vllm", False):
        return None
    return f"{family.label} is not served by vLLM here (docs/engines.md says which are); leave out --engine"


def served_plain(reason: str) -> str:
    """What an operator is told of a model that the plain engine serves, wherever he asks."""
    return f"served by the plain engine, one request at a time and no prefix shared: {reason}"


class EmbeddingFamily(Family, Protocol):
    """A family some of whose checkpoints make vectors of texts and images (`lookonce.models.vector_layout`)."""

    @property
    def vector_prompt(self) -> tuple[str, str]:
        """The system message of a prompt that a vector is made of, and the special token behind it ("": none), where
        neither the checkpoint's files nor the request say otherwise."""

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
        """As `load_text`. What the adapter's `forward` answers are not logits, but the rows [n, width] that vectors are
        made of. Raises CheckpointError."""


class ProvenFamily(Family, Protocol):
    """A family whose halves can be held to their weights when a service starts. Others are, where `lookonce verify
    --record` has written down what to expect."""

    def plain(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Plain | None:
        """What the weights, rounded to `dtype`, compute in the plainest form; None: no such form of this checkpoint."""
