"""The unsplit reference of what the plain engine serves: transformers' own class and its own generate."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.blip_2.processing_blip_2 import Blip2Processor
from transformers.models.instructblip.processing_instructblip import InstructBlipProcessor

from tests.families.unsplit_general import Unsplit


class UnsplitBlip(Unsplit):
    """BLIP-2 and InstructBLIP: an image and a text; the answers of an encoder and a decoder begin anew."""

    def _made(self, path: Any, monkeypatch: Any) -> Any:
        parts = [AutoImageProcessor.from_pretrained(path, backend="pil"), AutoTokenizer.from_pretrained(path)]
        if self.model.config.model_type == "blip-2":
            return Blip2Processor(*parts, num_query_tokens=8)
        return InstructBlipProcessor(*parts, AutoTokenizer.from_pretrained(path / "qformer_tokenizer"), 8)

    @property
    def decodes(self) -> bool:
        """Whether the language model is an encoder and a decoder."""
        return bool(self.model.language_model.config.is_encoder_decoder)

    def inputs(self, turns: list[tuple[str, list[Any]]]) -> dict[str, Any]:
        ((_, (image, *texts)),) = turns
        asked = [f"Question: {text} Answer:" if self.model.config.model_type == "blip-2" else text for text in texts]
        return dict(self.processor(images=image, text=asked[0] if asked else None, return_tensors="pt"))

    @torch.inference_mode()
    def caption_ids(self, image: Any, length: int) -> list[int]:
        """The greedy answer's tokens to an image without a text."""
        inputs = self.processor(images=image, return_tensors="pt")
        if self.model.config.model_type == "instructblip":  # which reads the empty text, then
            inputs |= self.processor(images=image, text="", return_tensors="pt")
            inputs.pop("input_ids"), inputs.pop("attention_mask")
        out = self.model.generate(**inputs, max_new_tokens=length, do_sample=False)[0]
        return out[1:].tolist() if self.decodes else out[-length:].tolist()

    @torch.inference_mode()
    def answer_ids(self, turns: list[tuple[str, list[Any]]], length: int = 12) -> list[int]:
        inputs = self.inputs(turns)
        out = self.model.generate(**inputs, max_new_tokens=length, do_sample=False)[0]
        if self.decodes:
            return out[1:].tolist()
        start = inputs["input_ids"].shape[1] if "input_ids" in inputs else self.processor.num_query_tokens + 1
        return out[start:].tolist()

    @torch.inference_mode()
    def logprobs(self, turns: list[tuple[str, list[Any]]], further: list[int] = []) -> torch.Tensor:  # noqa: B006
        inputs = self.inputs(turns)
        if not self.decodes:
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([further], dtype=torch.int64)], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        else:
            start = self.model.language_model.config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.tensor([[start, *further]])
        return self.model(**inputs).logits[0, -1 - len(further) :].log_softmax(-1)
