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
from functools import cached_property
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

from lookonce.core.errors import CheckpointError, invalid
from lookonce.models.checkpoint import files
from lookonce.models.family import Grid

_images: Any = image_processing_auto
_processors: Any = processing_auto
_SETTINGS = (files.PREPROCESSOR, files.PROCESSOR, "tokenizer_config.json", files.CONFIG)
_PREPARED = (files.PROCESSOR, files.PREPROCESSOR)
_SMALL = (150, 60)
_CHEAP = {"do_rescale": False, "do_normalize": False, "resample": 0}
"""Where an image's size is all that matters."""


class _NoTokenizer:
    """Stands for a tokenizer where no text is tokenised: every token is called by its attribute's name."""

    init_kwargs: dict[str, Any] = {}  # noqa: RUF012 - as transformers has it
    bos_token = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not (name.endswith(("_token", "_token_id"))):
            raise AttributeError(name)
        return 0 if name.endswith("_id") else f"<{name}>"

    def convert_tokens_to_ids(self, tokens: Any) -> int:
        return 0

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return [0]

    def add_tokens(self, *_: Any, **__: Any) -> int:
        return 0

    add_special_tokens = add_tokens


class Processor:
    """Prepares images of one checkpoint directory. Safe to use from several threads."""

    def __init__(self, path: Path, config: Any, *, tokenizer: bool) -> None:
        """`config` is config.json as transformers reads it; `tokenizer`: the directory has one, and texts of images are
        asked for. Raises CheckpointError."""
        model_type = config.model_type
        refuse_foreign_code(path)
        try:
            image_processor = _images.AutoImageProcessor.from_pretrained(path, local_files_only=True, backend="pil")
            text: Any = AutoTokenizer.from_pretrained(path, local_files_only=True) if tokenizer else _NoTokenizer()
            cls = _without_video(_processor_class(path, model_type))
            cls.parts = {"image_processor": image_processor, "tokenizer": text}
            cls.derived = _derived(config)
            self._processor = cls.from_pretrained(path, local_files_only=True)
            self._options = self._processor._merge_kwargs(tokenizer_init_kwargs=text.init_kwargs, return_tensors="pt")[
                "images_kwargs"
            ]
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{path}: the processor of {model_type} can't be made of its files ({type(error).__name__}: "
                f"{str(error).strip().partition(chr(10))[0][:200]}); copy preprocessor_config.json, "
                "processor_config.json and the tokenizer's files from the model's repository"
            ) from error
        self.tokenizer = text
        self.name = type(image_processor).__name__

    @property
    def image_token(self) -> str:
        """What stands for an image in a prompt before it is expanded."""
        return _spelt(self._processor.image_token)

    @cached_property
    def row_token(self) -> str:
        """What stands for each row of an image when it is expanded: that token, or the tokenizer's own."""
        text, _ = self.text_of(*_SMALL)
        own = getattr(self.tokenizer, "image_token", None)
        return max((self.image_token, *([] if own is None else [_spelt(own)])), key=text.count)

    def inputs(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """What the image processor makes of an RGB image."""
        return dict(self._prepared([image], self._options)[0])

    def text_of(self, width: int, height: int) -> tuple[str, Grid | None]:
        """What an image of so many pixels is in a prompt: tokens of its rows, and between them; and its grid, where the
        processor counts one (`image_grid_thw`)."""
        inputs, (text,) = self._prepared([_blank(width, height)], self._options | _CHEAP)
        if "image_grid_thw" not in inputs:
            return text, None
        t, h, w = (int(number) for number in inputs["image_grid_thw"][0])
        return text, (t, h, w)

    def each_alone(self) -> bool:
        """Whether two images of a prompt are in it what each of them alone is."""
        sizes = ((150, 60), (60, 150))
        _, together = self._prepared([_blank(*size) for size in sizes], self._options | _CHEAP)
        return together == [self.text_of(*size)[0] for size in sizes]

    def rows_of(self, image: Image.Image) -> int:
        """Rows of its embedding, as its text says."""
        return self._prepared([image], self._options)[1][0].count(self.row_token)

    def _prepared(self, images: list[Image.Image], options: dict[str, Any]) -> tuple[Any, list[str]]:
        try:
            if type(self._processor).replace_image_token is ProcessorMixin.replace_image_token:
                return self._processor.image_processor(images, **options), [self._query_tokens] * len(images)
            inputs, texts = self._processor._process_images([images] if len(images) > 1 else images, **options)
        except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
            width, height = images[0].size
            raise invalid(f"image: {width}x{height} pixels can't be prepared by this model's processor") from error
        return inputs, list(texts)

    @property
    def _query_tokens(self) -> str:
        """Of a Q-Former, whose rows are as many for every image."""
        return self.image_token * int(self._processor.num_query_tokens)


def _spelt(token: Any) -> str:
    return str(getattr(token, "content", token))


def _blank(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8))


def _without_video(cls: Any) -> Any:
    """The class with the parts it is given, and None for others such as a video processor."""

    class Parts(cls):  # type: ignore[misc]
        parts: dict[str, Any]
        derived: dict[str, Any]

        @classmethod
        def get_attributes(own) -> list[str]:
            return [str(name) for name in cls.get_attributes()]

        @classmethod
        def _get_arguments_from_pretrained(own, *_: Any, **__: Any) -> list[Any]:
            return [own.parts.get(name) for name in own.get_attributes()]

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
    if patch and side:
        found["num_image_tokens"] = (side // patch) ** 2
        found |= dict.fromkeys(("image_seq_len", "image_seq_length"), int((side // patch / shrunk) ** 2))
    return {name: value for name, value in found.items() if value is not None}


def _side(size: Any) -> int | None:
    number = size[0] if isinstance(size, list | tuple) and size else size
    return number if isinstance(number, int) else None


def _processor_class(path: Path, model_type: str) -> type[ProcessorMixin]:
    """That which the files name, else that of the model type. Raises CheckpointError."""
    known = _processors.PROCESSOR_MAPPING_NAMES
    stated = (files.read_json(path / name).get("processor_class") for name in _PREPARED if (path / name).is_file())
    name = next((each for each in stated if isinstance(each, str)), None) or known.get(model_type)
    owners = [owner for owner, each in known.items() if each == name]
    if name is None or not owners:
        raise CheckpointError(
            f"{path}: processor_class {name!r} is none of transformers' own; the general path runs no code of a "
            "repository: use a checkpoint that was saved by transformers"
        )
    called = re.sub(r"(?<!^)(?=[A-Z])", "_", name.removesuffix("Processor")).lower()  # its folder, most often
    for each in (model_type, *owners, called):
        folder = model_type_to_module_name(each)
        found = getattr(_module(f"transformers.models.{folder}", folder), name, None)
        if isinstance(found, type):
            return found
    raise CheckpointError(f"{path}: processor_class {name!r} isn't in this version of transformers; update it")


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
