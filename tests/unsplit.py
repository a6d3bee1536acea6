"""The unsplit reference: plain transformers, one process, no code of ours but the canonical image.

Prompts are laid out from the published chat format by hand, so that the reference shares nothing with the split path.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

DEFAULT_SYSTEM = "You are a helpful assistant."
Turn = tuple[str, Sequence[Any]]
"""A role and its parts: text as str, images of Pillow."""


class Unsplit:
    """A checkpoint directory as transformers' class for it runs it, in float32: one of Qwen2-VL's kind."""

    def __init__(self, path: str | Path, system: str | None = DEFAULT_SYSTEM) -> None:
        """`system`: what the chat template says where a conversation has no such message."""
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        self.path, self._system = path, system

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.path)

    def inputs(self, turns: Sequence[Turn]) -> dict[str, torch.Tensor]:
        """Model inputs of a conversation that ends where the assistant is to speak."""
        if turns[0][0] != "system" and self._system is not None:
            turns = [("system", [self._system]), *turns]
        images = [part for _, parts in turns for part in parts if isinstance(part, Image.Image)]
        inputs: dict[str, torch.Tensor] = {}
        counts = iter(())
        if images:
            # one at a time: the batch is only a concatenation
            made = [self.processor(images=[image], return_tensors="pt") for image in images]
            inputs["pixel_values"] = torch.cat([one["pixel_values"] for one in made])
            inputs["image_grid_thw"] = torch.cat([one["image_grid_thw"] for one in made])
            counts = iter((inputs["image_grid_thw"].prod(-1) // self.processor.merge_size**2).tolist())
        text = ""
        for role, parts in turns:
            text += f"<|im_start|>{role}\n"
            for part in parts:
                if isinstance(part, str):
                    text += part
                else:
                    text += "<|vision_start|>" + "<|image_pad|>" * next(counts) + "<|vision_end|>"
            text += "<|im_end|>\n"
        text += "<|im_start|>assistant\n"
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        inputs["input_ids"] = ids
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).long()
        return inputs

    @torch.inference_mode()
    def answer(self, turns: Sequence[Turn], max_tokens: int) -> str:
        """The greedy answer."""
        return self.tokenizer.decode(self.answer_ids(turns, max_tokens), skip_special_tokens=True)

    @torch.inference_mode()
    def answer_ids(self, turns: Sequence[Turn], max_tokens: int, **options: Any) -> list[int]:
        """Token ids of the greedy answer, end-of-turn token included. `options` are those of `generate`."""
        inputs = self.inputs(turns)
        out = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, use_cache=True, **options)
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    @torch.inference_mode()
    def logits(self, turns: Sequence[Turn]) -> torch.Tensor:
        """[vocabulary] logits of the first token of the answer."""
        return self.model(**self.inputs(turns)).logits[0, -1]

    @torch.inference_mode()
    def told(self, turns: Sequence[Turn], tokens: Sequence[int]) -> torch.Tensor:
        """[tokens, vocabulary] log-probabilities at the places of an answer's tokens, in one forward."""
        inputs = self.inputs(turns)
        length, more = inputs["input_ids"].shape[1], torch.tensor([list(tokens)])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], 1)
        return self.model(**inputs).logits[0, length - 1 : -1].log_softmax(-1)

    def weighed(self, turns: Sequence[Turn], choices: Sequence[str]) -> dict[str, float]:
        """The probability of each choice among them."""
        sums = []
        for choice in choices:
            ids = self.tokenizer(choice, add_special_tokens=False)["input_ids"]
            sums.append(self.told(turns, ids)[range(len(ids)), ids].sum())
        return dict(zip(choices, torch.stack(sums).softmax(0).tolist(), strict=True))

    @torch.inference_mode()
    def features(self, image: Image.Image) -> torch.Tensor:
        """[tokens, hidden] image features."""
        inputs = self.processor(images=[image], return_tensors="pt")
        return self.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
