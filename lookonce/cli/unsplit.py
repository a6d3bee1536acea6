"""`python -m lookonce.cli.unsplit`: what transformers' own class over the whole checkpoint makes of a split model's
answers.

Reads a job from standard input and writes lines of JSON: {"note": text} while it works, then {"result": ...}, or
{"error": sentence}. The answers' tokens are given to the model as they are, so one forward says for each of them what
else could have stood there. The model and its inputs are transformers' own; where its
processors want torchvision, those of the general path stand in.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from lookonce.core.process import wait_briefly

_OF_TEXT = {"input_ids": None, "attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}
"""Inputs that are as long as the prompt, and what each further token adds; None: itself."""
_FORMS = {"blip-2": "Question: {} Answer:", "instructblip": "{}", "paligemma": "<image>{}"}
"""Of a question, for model types without a chat template."""
_SAMPLED = 64
"""Tokens of the vocabulary, at equal distances, whose log-probabilities tell how far these are spread."""


class Unsplit:
    """A whole checkpoint as transformers runs it."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        torch.set_num_threads(job["threads"])
        self.path = job["model"]
        model: Any = AutoModelForImageTextToText.from_pretrained(self.path, dtype=getattr(torch, job["dtype"]))
        device = job["device"] if job["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if job.get("adapter"):
            merge(model, job["adapter"])
        model.to(device).eval()
        self.model = model
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.path)
        self._processor: Any = None

    def cut(self, image: Any) -> dict[str, Any]:
        """What the vision tower takes of an image."""
        from transformers import AutoImageProcessor

        if self._processor is None:
            processors: Any = AutoImageProcessor
            self._processor = processors.from_pretrained(self.path, backend="pil")
        return dict(self._processor(images=[image], return_tensors="pt"))

    def inputs(self, image: Any, question: str) -> dict[str, Any]:
        """Of a prompt that ends where the assistant is to speak."""
        import torch

        content = [{"type": "image"}, {"type": "text", "text": question}]
        cut = self.cut(image)
        if "image_grid_thw" not in cut:
            return self._by_processor(image, question)
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        number = self.model.config.image_token_id
        pad = self.tokenizer.convert_ids_to_tokens(number)
        pads = int(cut["image_grid_thw"].prod()) // self._processor.merge_size**2
        ids = self.tokenizer(prompt.replace(pad, pad * pads, 1), return_tensors="pt")["input_ids"]
        return cut | {
            "input_ids": ids,
            "mm_token_type_ids": (ids == number).long(),
            "attention_mask": torch.ones_like(ids),
        }

    def _by_processor(self, image: Any, question: str) -> dict[str, Any]:
        """By the checkpoint's own processor, or, where that wants torchvision for videos, by the general path's."""
        from transformers import AutoProcessor

        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat: dict[str, Any] = {"conversation": [{"role": "user", "content": content}], "add_generation_prompt": True}
        try:
            processors: Any = AutoProcessor
            processor = processors.from_pretrained(self.path)
        except (ImportError, ValueError):
            return self._by_general_processor(image, self.tokenizer.apply_chat_template(**chat, tokenize=False))
        if processor.chat_template is None and self.tokenizer.chat_template is None:
            form = _FORMS.get(self.model.config.model_type, _FORMS["blip-2"])
            made = dict(processor(images=image, text=form.format(question), return_tensors="pt"))
            return {name: x for name, x in made.items() if name != "labels"}
        text = processor.apply_chat_template(**chat, tokenize=False)
        whole = {"add_special_tokens": not self._begun(text), "return_tensors": "pt"}
        return dict(processor(images=[image], text=[text], **whole))

    def _by_general_processor(self, image: Any, text: str) -> dict[str, Any]:
        import torch

        from lookonce.models.general.processor import Processor

        processor = Processor(Path(self.path), self.model.config, tokenizer=True)
        inputs = processor.whole([image], text)
        if not self._begun(text):
            before = self.tokenizer("")["input_ids"]
            inputs["input_ids"] = torch.tensor([before + inputs["input_ids"][0].tolist()])
        return inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}

    def _begun(self, text: str) -> bool:
        """Whether the template has written the first token already."""
        return self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)

    def rows(self, image: Any) -> Any:
        """Float32 [1 + deepstack, tokens, hidden] of the tower."""
        import torch

        cut = self.cut(image)
        if "image_grid_thw" not in cut:  # a processor may ask its image processor for more, such as tiles
            cut = {name: x for name, x in self.inputs(image, "?").items() if name not in _OF_TEXT}
        if self._reads_text:
            return self._folded(self.model.vision_model(**self._placed(cut)).last_hidden_state[0]).float().cpu()
        out = self.model.get_image_features(**self._placed(cut), return_dict=True)
        levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
        return torch.stack([_joined(level) for level in levels])

    def logprobs(self, inputs: dict[str, Any], answer: list[int]) -> Any:
        """Float64 [1 + len(answer), vocabulary]: after the prompt, and after each token of the answer."""
        import torch

        grown = dict(inputs)
        if self.model.config.get_text_config().is_encoder_decoder:
            start = self.model.language_model.generation_config.decoder_start_token_id
            grown["decoder_input_ids"] = torch.tensor([[start, *answer]])
            answer, length = [], len(answer)
        else:
            length = len(answer)
        for name, filler in _OF_TEXT.items():
            if name in grown:
                if name == "token_type_ids":  # PaliGemma's 0 is a prompt's
                    filler = int(self.model.config.model_type == "paligemma")
                more = torch.tensor([answer if filler is None else [filler] * len(answer)], dtype=grown[name].dtype)
                grown[name] = torch.cat([grown[name], more], dim=1)
        logits = self.model(**self._placed(grown), use_cache=False).logits[0, -length - 1 :]
        return logits.double().log_softmax(-1).cpu()

    def exam_scores(self, exam: Any) -> list[float]:
        """Log-probabilities of the start check's choices, by the text model alone."""
        import numpy as np
        import torch

        from lookonce.models.self_check import scores_of

        inner, head = getattr(self.model, "model", self.model), self.model.get_output_embeddings()
        text = getattr(inner, "language_model", None) or inner.text_model
        text = getattr(text, "model", text)  # without a head of its own
        logits = []
        for question in exam.questions:
            ids = torch.tensor([[*question.token_ids, question.choices[-1][0]]])
            hidden = text.get_input_embeddings()(ids.to(self.model.device))
            rows, seen = exam.rows.to(hidden), torch.zeros(ids.shape, dtype=torch.bool, device=hidden.device)
            seen[0, 1 : 1 + rows.shape[1]] = True
            hidden[seen] = rows[0]
            further = {"visual_pos_masks": seen, "deepstack_visual_embeds": [*rows[1:]]} if len(rows) > 1 else {}
            last = np.full((len(question.positions), 1), question.next_position)
            places = torch.from_numpy(np.concatenate([question.positions, last], axis=1)).to(hidden.device)
            places = places[:, None] if len(places) > 1 else places
            out = text(inputs_embeds=hidden, position_ids=places, use_cache=False, **further).last_hidden_state
            logits.append(head(out[0, -2:]).float().cpu())
        return scores_of(logits, exam)

    @property
    def _reads_text(self) -> bool:
        """Whether a Q-Former reads the question, on the language half's side."""
        return bool(self.model.config.model_type == "instructblip")

    def _folded(self, rows: Any) -> Any:
        """The tower's rows as they are stored: one behind the other in as many rows as the Q-Former has queries."""
        from torch.nn.functional import pad

        tokens = int(self.model.config.num_query_tokens)
        return pad(rows.flatten(), (0, -rows.numel() % tokens)).view(tokens, -1)

    def _placed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        device, dtype = self.model.device, self.model.dtype
        return {
            name: x.to(device, dtype if x.is_floating_point() else x.dtype) if hasattr(x, "to") else x
            for name, x in inputs.items()
        }


def _joined(rows: Any) -> Any:
    """Float32 [tokens, hidden] of an image, which a class may answer with in parts."""
    import torch

    parts = [rows] if torch.is_tensor(rows) else list(rows)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).float().cpu()


def merge(model: Any, source: str) -> None:
    """Add a LoRA adapter to the model's own weights, W + scale * B A, in float64; what it brings whole takes a weight's
    place."""
    import torch
    from safetensors import safe_open

    from lookonce.models.checkpoint.adapter import WEIGHTS, open_adapter
    from lookonce.models.registry import family_of

    family = family_of(model.config.to_dict(), Path(model.name_or_path))
    adapter = open_adapter(source, family)
    changed = 0
    with safe_open(adapter.path / WEIGHTS, framework="pt") as stored, torch.no_grad():
        for name, weight in model.named_parameters():
            place = family.locate(name)
            if place is None:
                continue
            half, own = place
            if (pair := adapter.added[half].get(own)) is not None:
                a, b = (stored.get_tensor(part.stored_name).double() for part in (pair.a, pair.b))
                delta = pair.scale * (b.flatten(1) @ a.flatten(1))
                weight.copy_(weight.double() + (delta.t() if pair.embedding else delta).reshape(weight.shape))
                changed += 1
            if (whole := adapter.replaced[half].get(own)) is not None:
                weight.copy_(stored.get_tensor(whole.stored_name))
                changed += 1
    wanted = sum(len(found[half]) for found in (adapter.added, adapter.replaced) for half in found)
    if changed != wanted:
        raise ValueError(f"{wanted - changed} of the adapter's weights are none of the class's")


def class_name(model: str) -> str | None:
    """Of transformers' class for a checkpoint's config.json; None: it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    kind = json.loads((Path(model) / "config.json").read_text()).get("model_type")
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    return name if isinstance(name, str) or name is None else str(name[0])


def examined(job: dict[str, Any]) -> dict[str, Any]:
    """What the unsplit model says to each item: its image's rows go to a file, numbers into the result."""
    import torch

    tell("loading the unsplit model")
    with torch.inference_mode():
        unsplit, items = Unsplit(job), job["items"]
        rows = {name: unsplit.rows(opened(name)) for name in dict.fromkeys(item["image"] for item in items)}
        for number, name in enumerate(rows):
            rows[name].numpy().tofile(Path(job["rows"]) / f"{number}.f32")
        answers = []
        for number, item in enumerate(items, 1):
            tell(f"the unsplit model: question {number} of {len(items)}")
            answers.append(_examined(unsplit, item))
        recorded = _recorded(unsplit, job["record"]) if job.get("record") else {}
    return {"answers": answers, "recorded": recorded}


def _examined(unsplit: Unsplit, item: dict[str, Any]) -> dict[str, Any]:
    inputs = unsplit.inputs(opened(item["image"]), item["question"])
    tokens = item["tokens"]
    steps = unsplit.logprobs(inputs, tokens)[: len(tokens)]
    scores = []
    for choice in item["choices"]:
        ids = unsplit.tokenizer(choice, add_special_tokens=False)["input_ids"]
        found = unsplit.logprobs(inputs, ids)
        scores.append(math.fsum(float(found[at, token]) for at, token in enumerate(ids)))
    return {
        "best": [int(step.argmax()) for step in steps],
        "best_logprobs": [float(step.max()) for step in steps],
        "token_logprobs": [float(step[token]) for step, token in zip(steps, tokens, strict=True)],
        "top": [[float(step[token]) for token in ids] for step, ids in zip(steps, item["top"], strict=True)],
        "scores": scores,
        "sample": [float(each) for step in steps for each in step[:: -(-len(step) // _SAMPLED)]],
    }


def _recorded(unsplit: Unsplit, model: str) -> dict[str, list[float]]:
    """What the check at start is to find, by half."""
    from lookonce.models.checkpoint.check import check_checkpoint
    from lookonce.models.family import unpacked_reason
    from lookonce.models.registry import Half
    from lookonce.models.self_check import check_exam, check_image

    tell("recording what the check at start is to find")
    checkpoint = check_checkpoint(model).usable()[Half.LANGUAGE]
    recorded = {"vision": unsplit.rows(check_image(checkpoint)).flatten().tolist()}
    if unpacked_reason(checkpoint.family, checkpoint.config) is None:  # the plain engine is held to its class instead
        exam = check_exam(checkpoint, unsplit.model.get_output_embeddings().weight.shape[0])
        recorded["language"] = unsplit.exam_scores(exam)
    return recorded


def opened(name: str) -> Any:
    """An image file as RGB: turned as its EXIF says, what is transparent white."""
    from PIL import Image, ImageOps

    with Image.open(name) as file:
        image = ImageOps.exif_transpose(file)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def tell(text: str) -> None:
    """A line for whoever waits."""
    print(json.dumps({"note": text}), flush=True)


def main() -> None:
    """One job."""
    wait_briefly()
    job = json.load(sys.stdin)
    try:
        name = class_name(job["model"])
        if name is None:
            kind = json.loads((Path(job["model"]) / "config.json").read_text()).get("model_type")
            print(json.dumps({"error": f"transformers has no class for model_type {kind!r}: nothing to compare with"}))
            return
        result = {"class": name} | (examined(job) if "items" in job else {})
    except Exception as error:  # noqa: BLE001 - whatever a library raises, the command says it in one sentence
        first = next(iter(str(error).strip().splitlines()), "no reason given")
        print(json.dumps({"error": f"transformers could not run the unsplit model ({type(error).__name__}: {first})"}))
        return
    print(json.dumps({"result": result}))


if __name__ == "__main__":
    main()
