"""The unsplit reference of the general path: transformers' own class, processor, template and generate."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, ProcessorMixin

from lookonce.models.general.processor import ABSENT, named_class


class Unsplit:
    """A checkpoint directory in float32; a conversation is a list of (role, parts), a part a text or an image."""

    def __init__(self, path: Path, monkeypatch: Any) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = self._made(path, monkeypatch)
        self.tokenizer = self.processor.tokenizer

    def _made(self, path: Path, monkeypatch: Any) -> Any:
        return _processor(path, monkeypatch)

    def inputs(self, turns: list[tuple[str, list[Any]]]) -> dict[str, Any]:
        """What the class is given for a conversation that ends where the assistant is to speak."""
        if self.processor.chat_template is None and self.tokenizer.chat_template is None:
            ((_, (*images, text)),) = turns
            if self.model.config.model_type == "paligemma":
                made = self.processor(images=[images], text=["<image>" * len(images) + text], return_tensors="pt")
                return {name: value for name, value in made.items() if name != "labels"}
            (image,) = images  # BLIP-2's own form of a question
            return dict(self.processor(images=image, text=f"Question: {text} Answer:", return_tensors="pt"))
        messages = [
            {
                "role": role,
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts
                ],
            }
            for role, parts in turns
        ]
        text = ProcessorMixin.apply_chat_template(self.processor, messages, add_generation_prompt=True, tokenize=False)
        images = [part for _, parts in turns for part in parts if isinstance(part, Image.Image)]
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        made = self.processor(
            text=[text],
            images=([images] if images[1:] else images) or None,
            return_tensors="pt",
            add_special_tokens=not begins,
        )
        found = {name: value for name, value in made.items() if name not in ("num_patches",)}
        if "mm_token_type_ids" not in found and "image_grid_thw" in found:  # asked for by a class that wants them
            found["mm_token_type_ids"] = (found["input_ids"] == self.model.config.image_token_id).long()
        return found

    @torch.inference_mode()
    def answer_ids(self, turns: list[tuple[str, list[Any]]], length: int = 12) -> list[int]:
        """The greedy answer's tokens, that which ends it included."""
        inputs = self.inputs(turns)
        out = self.model.generate(**inputs, max_new_tokens=length, do_sample=False)
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    def answer(self, turns: list[tuple[str, list[Any]]], length: int = 12) -> str:
        """The greedy answer."""
        return self.tokenizer.decode(self.answer_ids(turns, length), skip_special_tokens=True)

    @torch.inference_mode()
    def logprobs(self, turns: list[tuple[str, list[Any]]], further: list[int] = []) -> torch.Tensor:  # noqa: B006
        """[1 + len(further), vocabulary] behind the prompt and each further token."""
        inputs = self.inputs(turns)
        more, length = torch.tensor([further], dtype=torch.int64), inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name, types in inputs.items():
            if name.endswith("token_type_ids") and types.shape[1] == length:  # PaliGemma's 0 is a prompt's
                kinds = torch.full_like(more, int(self.model.config.model_type == "paligemma"))
                inputs[name] = torch.cat([types, kinds.to(types.dtype)], 1)
        return self.model(**inputs).logits[0, -1 - len(further) :].log_softmax(-1)

    def weighed(self, choices: list[str], turns: list[tuple[str, list[Any]]]) -> dict[str, float]:
        """The probability of each choice among them."""
        sums = []
        for choice in choices:
            ids = self.tokenizer(choice, add_special_tokens=False).input_ids
            told = self.logprobs(turns, ids)
            sums.append(sum(float(row[token]) for row, token in zip(told, ids, strict=False)))
        return dict(zip(choices, torch.tensor(sums).softmax(0).tolist(), strict=True))


def _processor(path: Path, monkeypatch: Any) -> Any:
    """The checkpoint's own. Where it wants a video processor, which needs torchvision, it is given none."""
    name = json.loads((path / "preprocessor_config.json").read_text())["processor_class"]
    cls = named_class(name, json.loads((path / "config.json").read_text())["model_type"])
    assert cls is not None
    module = importlib.import_module(cls.__module__)
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    if getattr(module, "num2words", "") is None:
        monkeypatch.setattr(module, "num2words", str)
    parts = {"image_processor": AutoImageProcessor.from_pretrained(path, backend="pil")}
    parts["tokenizer"] = AutoTokenizer.from_pretrained(path)
    settings, _ = cls.get_processor_dict(path)
    return cls.from_args_and_dict([parts.get(each, ABSENT) for each in cls.get_attributes()], settings)
