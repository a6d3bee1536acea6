"""A checkpoint's own processor: images to the inputs of its vision half, and the text that an image is in a prompt.

transformers' processor classes want a tokenizer, and some a video processor, which only torchvision has. Neither is
needed to prepare an image: the vision half's processor has a stand-in for the first, and both halves' go without the
second. Code of a repository is never run.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, ProcessorMixin
from transformers.models.auto import image_processing_auto, processing_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

from lookonce.core.errors import CheckpointError, LookonceError, invalid
from lookonce.models.checkpoint import files
from lookonce.models.family import Grid

_images: Any = image_processing_auto
_processors: Any = processing_auto
_SETTINGS = (files.PREPROCESSOR, files.PROCESSOR, "tokenizer_config.json", files.CONFIG)
_PREPARED = (files.PROCESSOR, files.PREPROCESSOR)
_SPELT = re.compile(r"<[^<>]+>|\[[A-Z_]+\]")
_FAILURES = (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError, AttributeError)
"""What a processor raises for an image that it can't take."""
_PROBES = ((150, 60), (60, 150))
TOKEN_IDS = ("image_token_id", "image_token_index")
"""Fields of config.json that name the token of an image's rows."""
Size = tuple[int, int]
"""Width and height of an image in pixels."""
_CHEAP = {"do_rescale": False, "do_normalize": False, "resample": 0}
"""Where an image's size is all that matters."""


class _NoTokenizer:
    """Stands for a tokenizer where no text is tokenised: every token is called by its attribute's name, and is one id,
    that of an image's 0."""

    init_kwargs: dict[str, Any] = {}  # noqa: RUF012 - as transformers has it
    bos_token = None
    image = ""
    """The text that is counted."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not (name.endswith(("_token", "_token_id"))):
            raise AttributeError(name)
        return 0 if name.endswith("_id") else f"<{name}>"

    def __call__(self, texts: Any, **_: Any) -> dict[str, Any]:
        return {"input_ids": [[0] * text.count(self.image) for text in ([texts] if isinstance(texts, str) else texts)]}

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        return [0 for _ in tokens] if isinstance(tokens, list | tuple) else 0

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return [0]

    def get_vocab(self) -> defaultdict[str, int]:
        return defaultdict(int)

    def add_tokens(self, *_: Any, **__: Any) -> int:
        return 0

    add_special_tokens = add_tokens


class _Absent(dict[str, Any]):
    """Stands for a part that images don't need: what is asked of it is None; it is written down as empty."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


ABSENT = _Absent()


class Processor:
    """Prepares images of one checkpoint directory. Safe to use from several threads."""

    def __init__(self, path: Path, config: Any, *, tokenizer: bool) -> None:
        """`config` is config.json as transformers reads it; `tokenizer`: the directory has one, and texts of images are
        asked for. Raises CheckpointError."""
        model_type = config.model_type
        refuse_foreign_code(path)
        try:
            image_processor = _image_processor(path)
            text: Any = AutoTokenizer.from_pretrained(path, local_files_only=True) if tokenizer else _NoTokenizer()
            cls = _without_video(_processor_class(path, model_type))
            cls.parts = {"image_processor": image_processor, "tokenizer": text}
            cls.derived = _derived(config)
            self._processor = cls.from_pretrained(path, local_files_only=True)
            merged = self._processor._merge_kwargs(tokenizer_init_kwargs=text.init_kwargs, return_tensors="pt")
            self._options = merged["images_kwargs"]
            required = [
                name
                for name, parameter in inspect.signature(self._processor._process_images).parameters.items()
                if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            ]
            self._named = {name: merged[name] for name in required[1:]}  # but for the images
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{path}: the processor of {model_type} can't be made of its files ({type(error).__name__}: "
                f"{str(error).strip().partition(chr(10))[0][:200]}); copy preprocessor_config.json, "
                "processor_config.json and the tokenizer's files from the model's repository"
            ) from error
        self.tokenizer, self.name = text, type(image_processor).__name__
        token = getattr(self._processor, "image_token", None)
        self._queries = int(getattr(self._processor, "num_query_tokens", None) or 0)
        if token is None:
            raise CheckpointError(
                f"{path}: {cls.label} writes no tokens for the rows of an image, as the general path needs; "
                "use vLLM or transformers for it"
            )
        self.image_token = str(getattr(token, "content", token))
        """What stands for an image in a prompt before it is expanded."""
        if not tokenizer:
            text.image = self.image_token
        self.label, self.leads = cls.label, self._queries > 0
        """`leads`: whether an image's tokens stand before all text, as a Q-Former's do."""
        self.row_id = self._row_id(config) if tokenizer else 0
        """Id of the token that stands for each row."""
        self.among_others = self._is_another_among_others(path)
        """Whether an image has other rows where a prompt has several."""

    def _row_id(self, config: Any) -> int:
        stated = (getattr(config, name, None) for name in TOKEN_IDS)
        own = getattr(self._processor, "image_token_id", None)
        number = next((each for each in stated if isinstance(each, int)), own)
        return number if isinstance(number, int) else int(self.tokenizer.convert_tokens_to_ids(self.image_token))

    def inputs(self, image: Image.Image) -> dict[str, Any]:
        """What the vision half is given of an RGB image."""
        return self._apart([image], self._options)[0]

    def inputs_among_others(self, image: Image.Image) -> tuple[dict[str, Any], int]:
        """The same where the image is the first of several; and how many of the rows are its own."""
        inputs, texts = self._apart([image, _blank(*image.size)], self._options)
        return inputs, self.rows_in(texts[0])

    def rows_of(self, image: Image.Image) -> int:
        """Rows of its embedding, as its text says."""
        alone = self.rows_in(self._apart([image], self._options | _CHEAP)[1][0])
        return alone + (self.inputs_among_others(image)[1] if self.among_others else 0)

    def rows_in(self, text: str) -> int:
        """How many rows the text of an image has: of the token that is written most."""
        return max(text.count(self.image_token), max(Counter(_SPELT.findall(text)).values(), default=0))

    def text_of(self, size: Size) -> tuple[str, Grid | None]:
        """What an image of so many pixels is in a prompt; and its grid, where the processor counts one."""
        made, (text,) = self._apart([_blank(*size)], self._options | _CHEAP)
        return text, _grid(made)

    def text_among_others(self, size: Size) -> str:
        """What an image of so many pixels is in a prompt with several."""
        return self._apart([_blank(*size)] * 2, self._options | _CHEAP)[1][0]

    def whole(self, images: Sequence[Image.Image], text: str, **options: Any) -> dict[str, Any]:
        """What the class is given for a text with images, `input_ids` among it."""
        try:
            if self.leads:
                made = dict(self._processor.image_processor(images, **self._options | options))
                return made | {"input_ids": torch.full((1, self._queries), self.row_id)}
            stated = {"add_special_tokens": False, "return_tensors": "pt"} | options
            return dict(
                self._processor(images=[list(images)] if len(images) > 1 else list(images), text=[text], **stated)
            )
        except _FAILURES as error:
            raise _unprepared(images) from error

    def ids(self, sizes: Sequence[Size], text: str) -> tuple[list[int], Grid | None]:
        """Ids of a text with so many images of these sizes; and the grid of the first, where the processor counts one
        (`image_grid_thw`)."""
        made = self.whole([_blank(*size) for size in sizes], text, **_CHEAP)
        ids: list[int] = made["input_ids"][0].tolist()
        return ids, _grid(made)

    def _is_another_among_others(self, path: Path) -> bool:
        try:
            _, together = self._apart([_blank(*size) for size in _PROBES], self._options | _CHEAP)
            alone = [self._apart([_blank(*size)], self._options | _CHEAP)[1][0] for size in _PROBES]
        except LookonceError as error:
            raise CheckpointError(
                f"{path}: its processor can't prepare images ({error.message}); copy preprocessor_config.json and "
                "processor_config.json from the model's repository"
            ) from error
        return together != alone

    def _apart(self, images: list[Image.Image], options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Inputs of the vision half, and what each image is in a prompt."""
        try:
            if self._queries:
                made = self._processor.image_processor(images, **options)
                return dict(made), [self.image_token * self._queries] * len(images)
            if type(self._processor).replace_image_token is not ProcessorMixin.replace_image_token:
                made, texts = self._processor._process_images(
                    [images] if len(images) > 1 else images, **self._named, **options
                )
                return dict(made), list(texts)
            made = dict(self._processor(images=[images], text=[self.image_token * len(images)], **options))
            count = int((torch.as_tensor(made.pop("input_ids")) == self.row_id).sum())
        except _FAILURES as error:
            raise _unprepared(images) from error
        return made, [self.image_token * (count // len(images))] * len(images)


def _grid(made: dict[str, Any]) -> Grid | None:
    if "image_grid_thw" not in made:
        return None
    t, h, w = (int(number) for number in made["image_grid_thw"][0])
    return t, h, w


def _unprepared(images: Sequence[Image.Image]) -> LookonceError:
    width, height = images[0].size
    return invalid(f"image: {width}x{height} pixels can't be prepared by this model's processor")


def _image_processor(path: Path) -> Any:
    """By PIL where there is one. Raises CheckpointError for one that wants what isn't installed."""
    try:
        return _images.AutoImageProcessor.from_pretrained(path, local_files_only=True, backend="pil")
    except (ImportError, ValueError) as error:
        settings = _settings(path)
        name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type"))
        known = [kinds for kinds in _images.IMAGE_PROCESSOR_MAPPING_NAMES.values() if name in kinds.values()]
        if not known or "pil" in known[0]:
            raise
        if find_spec("torchvision") is None:
            raise CheckpointError(
                f"{path}: its image processor {name} is made with torchvision, which is not installed; "
                "install torchvision beside torch"
            ) from error
        return _images.AutoImageProcessor.from_pretrained(path, local_files_only=True)


def _settings(path: Path) -> dict[str, Any]:
    """Of the image processor: in a file of its own, or within the processor's."""
    for name in (files.PREPROCESSOR, files.PROCESSOR):
        if (path / name).is_file():
            found = files.read_json(path / name)
            return found.get("image_processor") or found
    return {}


def _blank(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8))


def _without_video(cls: Any) -> Any:
    """The class with the parts it is given, and None for others such as a video processor."""

    class Parts(cls):  # type: ignore[misc]
        label = cls.__name__
        parts: dict[str, Any]
        derived: dict[str, Any]

        @classmethod
        def get_attributes(own) -> list[str]:
            return [str(name) for name in cls.get_attributes()]

        @classmethod
        def _get_arguments_from_pretrained(own, *_: Any, **__: Any) -> list[Any]:
            return [own.parts.get(name, ABSENT) for name in own.get_attributes()]

        @classmethod
        def get_processor_dict(own, *arguments: Any, **named: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            settings, rest = super().get_processor_dict(*arguments, **named)
            taken = inspect.signature(cls.__init__).parameters
            return {name: x for name, x in own.derived.items() if name in taken} | settings, rest

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    module: Any = importlib.import_module(cls.__module__)
    if getattr(module, "num2words", "") is None:  # asked for at construction, used for videos only
        module.num2words = str
    return Parts


def _derived(config: Any) -> dict[str, Any]:
    """Settings of processors that follow from config.json, for directories without a processor_config.json. What they
    make is held to the rows that the vision half makes."""
    vision = getattr(config, "vision_config", None)
    patch, side = (_side(getattr(vision, name, None)) for name in ("patch_size", "image_size"))
    strategy = getattr(config, "vision_feature_select_strategy", None)
    shrunk = getattr(config, "scale_factor", None) or (1 / getattr(config, "downsample_ratio", 1.0))
    found = {
        "patch_size": patch,
        "vision_feature_select_strategy": strategy,
        "spatial_merge_size": getattr(config, "spatial_merge_size", None),
        "num_query_tokens": getattr(config, "num_query_tokens", None),
        "num_additional_image_tokens": 1 if getattr(vision, "model_type", "") == "clip_vision_model" else None,
    }
    latents = getattr(getattr(config, "perceiver_config", None), "resampler_n_latents", None)
    if patch and side:
        found["num_image_tokens"] = (side // patch) ** 2
        rows = latents or int((side // patch / shrunk) ** 2)
        found |= dict.fromkeys(("image_seq_len", "image_seq_length"), rows)
    return {name: value for name, value in found.items() if value is not None}


def _side(size: Any) -> int | None:
    number = size[0] if isinstance(size, list | tuple) and size else size
    return number if isinstance(number, int) else None


def _processor_class(path: Path, model_type: str) -> type[ProcessorMixin]:
    """That which the files name, else that of the model type. Raises CheckpointError."""
    known = _processors.PROCESSOR_MAPPING_NAMES
    stated = (files.read_json(path / name).get("processor_class") for name in _PREPARED if (path / name).is_file())
    name = next((each for each in stated if isinstance(each, str)), None) or known.get(model_type)
    if name is None or name not in known.values():
        raise CheckpointError(
            f"{path}: processor_class {name!r} is none of transformers' own; the general path runs no code of a "
            "repository: use a checkpoint that was saved by transformers"
        )
    found = named_class(name, model_type)
    if found is None:
        raise CheckpointError(f"{path}: processor_class {name!r} isn't in this version of transformers; update it")
    return found


def named_class(name: str, model_type: str) -> type[ProcessorMixin] | None:
    """A processor class of transformers."""
    owners = [owner for owner, each in _processors.PROCESSOR_MAPPING_NAMES.items() if each == name]
    called = re.sub(r"(?<!^)(?=[A-Z])", "_", name.removesuffix("Processor")).lower()  # its folder, most often
    for each in (model_type, *owners, called):
        folder = model_type_to_module_name(each)
        found = getattr(_module(f"transformers.models.{folder}", folder), name, None)
        if isinstance(found, type):
            return found
    return None


def _module(package: str, folder: str) -> ModuleType | None:
    """The module of a processor; None: there is none in this folder. Some import their image processor of torchvision
    for a function that the one of PIL has too."""
    try:
        return importlib.import_module(f"{package}.processing_{folder}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("torchvision"):
            return None
    twin = f"{package}.image_processing_{folder}"
    sys.modules[twin] = importlib.import_module(f"{package}.image_processing_pil_{folder}")
    try:
        return importlib.import_module(f"{package}.processing_{folder}")
    finally:
        del sys.modules[twin]


def refuse_foreign_code(path: Path) -> None:
    """Raises CheckpointError for files that name classes of their repository only."""
    known = {name for names in _images.IMAGE_PROCESSOR_MAPPING_NAMES.values() for name in names.values()}
    for name in _SETTINGS:
        if not (path / name).is_file():
            continue
        settings = files.read_json(path / name)
        kind = settings.get("image_processor_type") or settings.get("feature_extractor_type")
        base = str(kind).removesuffix("Fast")
        if settings.get("auto_map") and kind and base not in known and f"{base}Pil" not in known:
            raise CheckpointError(
                f"{path / name}: image_processor_type {kind!r} is code of the repository, which is never run; "
                "use a checkpoint that was saved by transformers"
            )
        kind = settings.get("tokenizer_class")
        if settings.get("auto_map") and kind and not hasattr(transformers, kind):
            raise CheckpointError(
                f"{path / name}: tokenizer_class {kind!r} is code of the repository, which is never run; "
                "use a checkpoint that was saved by transformers"
            )
