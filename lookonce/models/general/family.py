"""`GeneralFamily`: what any family answers, for one checkpoint of a class that transformers knows.

Every other module of this folder imports torch and transformers' modelling code; they are imported when asked for.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from lookonce.core.errors import CheckpointError, invalid
from lookonce.core.identity import canonical_json
from lookonce.models.family import Dimensions, Family, Grid, Half, Layout, Marker, SpecialTokens, VisionEncoder

if TYPE_CHECKING:
    import torch

    from lookonce.models.chat.chat_format import ChatFormat
    from lookonce.models.checkpoint.checkpoint import Checkpoint
    from lookonce.models.general.architecture import Architecture
    from lookonce.models.general.prompts import ImageTexts
    from lookonce.models.text_adapter import ModelAdapter
    from lookonce.models.unbatched import UnbatchedModel

MOST_PIXELS = 100_000_000
"""No image that a service takes has more: the checkpoint's processor is given images as they are."""
_REMEMBERED = 128
"""Layouts whose positions are kept."""
_LEAST_PIXELS = 64
"""Of an image that a service takes. Smaller ones are made up by checks, and laid out as text."""
_SMALL = (150, 60)
"""Width and height of an image whose markers are checked at start."""
_TOKEN_IDS = ("image_token_id", "image_token_index")
Taken = tuple[tuple[int, int], tuple[Marker, ...]]
"""First row and one past the last; markers among them."""
_ALL_PARTS = "{% for message in messages %}{% for part in message.content %}"
_IMAGES = _ALL_PARTS + "{% if part.type == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
_TEXTS = {
    "blip-2": "{% if message.role == 'user' %}Question: {{ part.text }} Answer:{% elif message.role == 'assistant' %}"
    " {{ part.text }}. {% else %}{{ part.text }} {% endif %}",
    "instructblip": "{% if message.role == 'user' %}{{ part.text }}{% else %} {{ part.text }} {% endif %}",
    "paligemma": "{{ part.text }}",
}
"""Of model types whose checkpoints have no chat template: how a text stands in a prompt. Questions of BLIP-2 are those
of arXiv:2301.12597 (appendix), InstructBLIP and PaliGemma were trained on texts as they are."""
_CLOSING = {"paligemma": "{{ '\\n' }}"}
"""What ends a message; arXiv:2407.07726, section 3."""
_BEGUN = ("paligemma",)
"""Those whose processor writes <s> itself."""
_UNSTATED = (
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "text_config",
    "quantization_config",
)
"""Of config.json: what doesn't decide what the vision half computes."""


class GeneralFamily:
    """A family of one checkpoint: its class is made for its config.json, its prompts by its processor."""

    checks_itself = True
    """Loading compares the language half with its class, and the vision half's rows with what its processor writes."""
    words = r"\s*\S+|\s+"
    cpu_max_pixels = MOST_PIXELS
    layouts = "those that its transformers class saves"

    def __init__(self, config: dict[str, Any], path: Path | None) -> None:
        """`path`: the directory of its files, where there are some."""
        self._config, self._path = config, path
        self.model_type: str = config["model_type"]
        named = [name for name in _TOKEN_IDS if name in config]
        self.token_id_fields = (*named[:1],) or _TOKEN_IDS[:1]
        self._laid_out = lru_cache(maxsize=_REMEMBERED)(self._positions)

    @cached_property
    def architecture(self) -> Architecture:
        """The class. Raises CheckpointError."""
        from lookonce.models.checkpoint.files import weight_map_of

        config = canonical_json(self._config)
        found = _architecture(config)
        names: Iterable[str] = ()
        with contextlib.suppress(CheckpointError):  # settings without weights, and what doctor says of these
            names = () if self._path is None else weight_map_of(self._path)
        return _architecture(config, in_parts=True) if any(map(found.is_part, names)) else found

    @cached_property
    def template(self) -> str | None:
        """The chat template of a model type whose checkpoints have none. Images come before all else. Behind them <s>
        stands where the tokenizer puts it before a text, or the processor does; </s> where the tokenizer ends one."""
        from lookonce.models.chat.tokenizer import leading_ids, load_tokenizer, trailing_ids

        text = _TEXTS.get(self.model_type)
        if text is None:
            return None
        begin, end = "{{ bos_token }}", ""
        with contextlib.suppress(CheckpointError):  # of a tokenizer that isn't there doctor says so
            if self._path is not None:
                tokenizer = load_tokenizer(self._path, self.words)
                begin = begin if leading_ids(tokenizer) or self.model_type in _BEGUN else ""
                end = "{{ eos_token }}" if trailing_ids(tokenizer) else ""
        closing = _CLOSING.get(self.model_type, "")
        part = "{% if part.type == 'text' %}" + text + "{% endif %}{% endfor %}" + closing + "{% endfor %}"
        return _IMAGES + begin + _ALL_PARTS + part + end

    @property
    def begins_anew(self) -> bool:
        """Whether the processor tokenises a prompt's text apart from the images and the token before it."""
        return self.model_type in ("blip-2", "instructblip")

    @property
    def reads_text(self) -> bool:
        """Whether the language half wants the text of a prompt beside its tokens."""
        return self.architecture.reads_text

    @cached_property
    def texts(self) -> ImageTexts:
        """What images are in prompts. Raises CheckpointError."""
        from lookonce.models.general.prompts import ImageTexts

        if self._path is None:
            raise CheckpointError(f"{self.model_type}: the general path needs a directory with the processor's files")
        return ImageTexts(self._path, self.architecture, self._chat)

    def _chat(self, image: str) -> ChatFormat | None:
        """As a file of the checkpoint says. What is missing doctor says."""
        from lookonce.models.chat.chat_format import open_chat

        plain = SimpleNamespace(words=self.words, token_id_fields=self.token_id_fields)
        if self.template is None and self._path is not None:
            with contextlib.suppress(CheckpointError):
                return open_chat(self._path, cast("Family", plain), image)
        return None

    @property
    def label(self) -> str:
        """The class's name, without what all of them end with."""
        return str(self.architecture.cls.__name__).removesuffix("ForConditionalGeneration")

    def locate(self, name: str) -> tuple[Half, str] | None:
        place = self.architecture.locate(name)
        return None if place is None else (place.half, place.name)

    def tensor_shapes(self, config: dict[str, Any], half: Half, *, head: bool) -> dict[str, tuple[int, ...]]:
        from lookonce.models.family import HEAD

        shapes = {place.name: place.shape for place in self.architecture.places.values() if place.half is half}
        return {name: shape for name, shape in shapes.items() if head or name != HEAD}

    def tied_head(self, config: dict[str, Any]) -> bool:
        return self.architecture.tied

    def vision_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """All but the language model's settings."""
        filled = self.architecture.config.to_dict()
        return {"class": self.architecture.cls.__name__} | _stated(filled)

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        filled: dict[str, Any] = self.architecture.config.get_text_config().to_dict()
        if "max_position_embeddings" not in filled and filled.get("n_positions"):
            filled["max_position_embeddings"] = filled["n_positions"]
        return filled

    def problems(
        self, config: dict[str, Any], preprocessor: dict[str, Any] | None, halves: Iterable[Half]
    ) -> list[str]:
        from lookonce.models.general.limits import class_problems

        try:
            return list(class_problems(self.architecture))
        except CheckpointError as error:
            return list(error.problems)

    def unpacked(self, config: dict[str, Any]) -> str | None:
        """Why the packed engine can't run the language half, a clause after its name; None: it can."""
        from lookonce.models.general.limits import unpacked

        return unpacked(self.architecture)

    def hidden_size(self, config: dict[str, Any]) -> int:
        if self.architecture.reads_text:
            from lookonce.models.general.qformer import folded_shape

            return folded_shape(self.architecture)[1]
        return self._text_width(config)

    def _text_width(self, config: dict[str, Any]) -> int:
        from lookonce.models.family import EMBEDDING

        return self.tensor_shapes(config, Half.LANGUAGE, head=False)[EMBEDDING][1]

    def dimensions(self, config: dict[str, Any]) -> Dimensions:
        """Those of the tower are estimates: about as many patches a token, six rows of its width a patch. So are those
        of a language model that can't be run packed."""
        from lookonce.models.general.limits import calls_of

        calls, text = calls_of(self.architecture), self.text_config(config)
        vision = getattr(self.architecture.config, "vision_config", None)
        hidden = self._text_width(config)
        return Dimensions(
            layers=calls.all_layers,
            hidden=hidden,
            heads=calls.heads,
            kv_heads=calls.kv_heads,
            head_dim=calls.head_dim,
            ffn=int(text.get("intermediate_size") or text.get("ffn_dim") or text.get("d_ff") or 4 * hidden),
            vocabulary=int(text["vocab_size"]),
            patches_per_token=4,
            patch_numbers=6 * int(getattr(vision, "hidden_size", None) or 1024),
            kv_layers=calls.layers,
            state_numbers=sum(state.numbers for state in calls.states if not state.wide),
            state_floats=sum(state.numbers for state in calls.states if state.wide),
            int8=False,
        )

    def preprocessor(self, stored: dict[str, Any]) -> dict[str, Any]:
        """The stored settings apart from bounds of ours: they hold for the image that the processor is given."""
        return {"processor": stored, "min_pixels": 1, "max_pixels": MOST_PIXELS}

    def fingerprint_preprocessor(self, preprocessor: dict[str, Any]) -> dict[str, Any]:
        stated = {"processor": preprocessor["processor"], "exif_orientation": "applied", "alpha": "white"}
        return stated | {"forms": 2} if self._path is not None and self.texts.processor.among_others else stated

    def merge_size(self, config: dict[str, Any]) -> int:
        """A grid counts pixels."""
        return 1

    def least_pixels(self, config: dict[str, Any]) -> int:
        return 1

    def image_grid(self, config: dict[str, Any], width: int, height: int, min_pixels: int, max_pixels: int) -> Grid:
        """The image's size in pixels, as its processor is given it: height and width."""
        columns, rows = bounded(width, height, min_pixels, max_pixels)
        return 1, rows, columns

    def tokens_per_grid(self, config: dict[str, Any], grid_thw: Grid) -> int:
        frames, rows, columns = grid_thw
        if frames != 1 or min(rows, columns) < 1 or rows * columns > MOST_PIXELS:
            raise invalid(f"image.grid {frames}x{rows}x{columns} is no image's size", param="image.grid")
        found = self.texts.of(columns, rows)
        return found.tokens + (found.among_others.tokens if found.among_others else 0)

    def has_laid_out(self, config: dict[str, Any], grid_thw: Grid) -> bool:
        """Whether the text of an image of this size is known: else its processor takes a blank one apart, which may
        take some tenths of a second."""
        return self.texts.has(grid_thw[2], grid_thw[1])

    def encode_flops(self, config: dict[str, Any], tokens: int) -> float:
        """Two for each weight and patch."""
        shapes = self.tensor_shapes(config, Half.VISION, head=False)
        return 2.0 * sum(math.prod(shape) for shape in shapes.values()) * 4 * tokens

    def special_tokens(self, config: dict[str, Any]) -> SpecialTokens:
        texts, token = self.texts, self.texts.image_token
        return SpecialTokens(texts.image_id, image=token, marker=token, turn_end="", written_id=texts.placeholder_id)

    @property
    def around_images(self) -> tuple[str, str]:
        """Plain text that stands before and behind an image: it is tokenised together with what is beside it."""
        return self.texts.around

    def markers(self, config: dict[str, Any], grid_thw: Grid) -> tuple[Marker, ...]:
        return self.texts.of(grid_thw[2], grid_thw[1]).markers

    def taken(self, config: dict[str, Any], grid_thw: Grid, images: int) -> Taken | None:
        """Of the rows of an embedding those that are in a prompt with so many images, and their markers; None: all."""
        alone = self.texts.of(grid_thw[2], grid_thw[1])
        rows = alone.among_others
        if rows is None:
            return None
        if images == 1:
            return (0, alone.tokens), alone.markers
        return (alone.tokens, alone.tokens + rows.tokens), rows.markers

    def positions(self, config: dict[str, Any], length: int, images: Layout) -> tuple[NDArray[np.int64], int]:
        if len(images) > 1 and not self.texts.takes_several:
            raise invalid(
                f"{self.label} writes several images otherwise than each of them alone; ask about one image at a time",
                param="messages",
            )
        return self._laid_out(length, tuple(images))

    def _positions(self, length: int, images: tuple[tuple[int, Grid], ...]) -> tuple[NDArray[np.int64], int]:
        from lookonce.models.general.positions import position_rows, rope_positions

        if position_rows(self.architecture.model) == 1:
            return np.arange(length, dtype=np.int64)[None], length
        images = tuple(image for image in images if min(image[1]) >= 1 and image[1][1] * image[1][2] >= _LEAST_PIXELS)
        texts = [(start, self.texts.of(columns, rows)) for start, (_, rows, columns) in images]
        runs = [((start + text.first, text.tokens), text.grid) for start, text in texts if text.grid is not None]
        try:
            positions = rope_positions(self.architecture.model, length, runs)
        except (RuntimeError, ValueError, IndexError, StopIteration) as error:
            raise invalid(
                f"{self.label} can't tell images apart that stand side by side; put a text between them",
                param="messages",
            ) from error
        return positions, int(positions.max()) + 1 if length else 0

    def load_encoder(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        quantization: str = "none",
        native: bool = True,
    ) -> VisionEncoder:
        from lookonce.models.general.encoder import load_encoder

        self._refuse_quantization(quantization)
        return load_encoder(self.architecture, checkpoint, dtype, device)

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
        from lookonce.models.general.decoder import load_text
        from lookonce.models.general.self_check import check_text

        self._refuse_quantization(quantization)
        reason = self.unpacked(checkpoint.config)
        if reason is not None:
            raise CheckpointError(
                f"{self.label} can't be served by the packed engine: {reason}; "
                "leave out --engine, or give --engine plain"
            )
        model = load_text(self.architecture, checkpoint, dtype, where, devices)
        check_text(model, self.texts.image_id, self.texts.of(*_SMALL))
        return model

    def load_unbatched(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, context: int
    ) -> UnbatchedModel:
        """Read the language half for the plain engine; `context` is the most tokens of prompt and answer. Raises
        CheckpointError."""
        from lookonce.models.general.self_check import check_unbatched
        from lookonce.models.general.unbatched import load_unbatched

        model = load_unbatched(
            self.architecture,
            checkpoint,
            dtype,
            device,
            dimensions=self.dimensions(checkpoint.config),
            context=context,
            image_id=self.texts.image_id,
            grid_of=lambda grid: self.texts.of(grid[2], grid[1]).grid,
        )
        check_unbatched(model, self.texts.image_id, self.texts.of(*_SMALL), (1, _SMALL[1], _SMALL[0]))
        return model

    def _refuse_quantization(self, quantization: str) -> None:
        if quantization != "none":
            raise CheckpointError(
                f"{self.label} is served by the general path, which has no {quantization} weights; "
                "leave out --quantization"
            )


def general_family(config: dict[str, Any], path: Path | None = None) -> GeneralFamily | None:
    """The family of a checkpoint whose class transformers has; None: it has none for this model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    known = config.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return GeneralFamily(config, path) if known else None


@lru_cache(maxsize=4)
def _architecture(config: bytes, *, in_parts: bool = False) -> Architecture:
    """Built once for all who ask about a checkpoint."""
    from lookonce.models.general.architecture import Architecture

    return Architecture(json.loads(config), in_parts=in_parts)


def bounded(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Width and height of an image resized to between the bounds, its ratio kept as far as whole pixels do."""
    pixels = width * height
    bound = min(max(pixels, min_pixels), max_pixels)
    if bound == pixels:
        return width, height
    scale = math.sqrt(bound / pixels)
    down = math.floor if bound < pixels else math.ceil
    return max(1, down(width * scale)), max(1, down(height * scale))


def _stated(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _stated(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in _UNSTATED
    }
