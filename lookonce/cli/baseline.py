"""`python -m lookonce.cli.baseline`: the unsplit model, by transformers alone, asked the same questions one by one.

Reads {"model", "dtype", "device", "threads", "max_tokens", "items": [{"image": path, "question": text}]} from standard
input, writes {"device", "threads", "answers": [{"text", "ms"}]} to standard output. Shares no model code with the
services: it is what their answers are compared with.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from lookonce.core.process import wait_briefly


def answer_all(job: dict[str, Any]) -> dict[str, Any]:
    """Load the whole model, warm it up, then answer each item from nothing: decode, encode, prefill, decode tokens.

    Computes with the given number of threads, which wait as the services' do: awake for milliseconds, as is libgomp's
    habit, they would take the cores from one another wherever something else runs too."""
    wait_briefly()
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    device = job["device"] if job["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(job["threads"])
    model: Any = AutoModelForImageTextToText.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    processors: Any = AutoImageProcessor
    processor = processors.from_pretrained(job["model"], backend="pil")
    answers = []
    for number, item in enumerate([*job["items"][:1], *job["items"]]):  # the first is asked twice, and counted once
        begun = time.perf_counter()
        text = _answer(model, tokenizer, processor, item["image"], item["question"], job["max_tokens"])
        if number > 0:
            answers.append({"text": text, "ms": (time.perf_counter() - begun) * 1000})
    return {"device": str(model.device), "threads": torch.get_num_threads(), "answers": answers}


def _answer(model: Any, tokenizer: Any, processor: Any, image: str, question: str, max_tokens: int) -> str:
    import torch
    from PIL import Image

    with Image.open(image) as file:
        cut = processor(images=[file.convert("RGB")], return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pads = int(cut["image_grid_thw"].prod()) // processor.merge_size**2
    pad = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    prompt = prompt.replace(pad, pad * pads, 1)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
        "pixel_values": cut["pixel_values"].to(model.dtype),
        "image_grid_thw": cut["image_grid_thw"],
    }
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    json.dump(answer_all(json.load(sys.stdin)), sys.stdout)
