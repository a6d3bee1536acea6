"""Two ways to ask a checkpoint folder, both `evaluate.AnswerMany`: the lean model here, and plain transformers."""

import io
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from . import pack, pixels, tokenizer
from .answers import attention_mask
from .evaluate import Answer
from .model import Qwen2VL, Shape2VL
from .stage_vision import normalise

LONGEST = 64  # answer tokens at most


def sizes_of(config: dict) -> Shape2VL:
    vision = config["vision_config"]
    return Shape2VL(
        vocab=config["vocab_size"],
        vision_dim=vision["embed_dim"],
        vision_depth=vision["depth"],
        vision_heads=vision["num_heads"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        ffn=config["intermediate_size"],
        rope_theta=config["rope_theta"],
        mrope=tuple(config["rope_scaling"]["mrope_section"]),
        eps=config["rms_norm_eps"],
    )


class Lean:
    """Greedy answers of the lean model in float32: one image encoded once, its questions packed behind it."""

    def __init__(self, checkpoint: Path):
        config = json.loads((checkpoint / "config.json").read_text())
        self.model = Qwen2VL(sizes_of(config)).eval()
        weights = load_file(checkpoint / "model.safetensors")
        self.model.load_state_dict({name: value.float() for name, value in weights.items()})
        self.words = tokenizer.load(checkpoint / "tokenizer.json")
        self.yes, self.no = self.words.encode("yes")[0], self.words.encode("no")[0]

    def _prefix(self, grid: tuple[int, int]) -> pack.Row:
        row = pack.Row()
        opening = f"<|im_start|>system\n{tokenizer.DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        at = row.add(self.words.encode(opening), 0, 0)
        at = row.add_image(grid, self.words.ids["<|image_pad|>"], at)
        row.after = row.add(self.words.encode("<|vision_end|>"), 0, at)
        return row

    @torch.no_grad()
    def __call__(self, image: bytes, questions: Sequence[str]) -> list[Answer]:
        patches, grid = pixels.patches(Image.open(io.BytesIO(image)))
        image_tokens = self.model.visual(normalise(patches)[None], grid)
        said: list[list[int]] = [[] for _ in questions]
        p_yes: list[float] = []
        running = list(range(len(questions)))
        for step in range(LONGEST):
            row, ends = self._prefix(grid), []
            for number, index in enumerate(running):
                text = self.words.encode(questions[index]) + self.words.encode(pack.ASSISTANT) + tuple(said[index])
                row.add(text, number + 1, row.after)
                ends.append(len(row.ids) - 1)
            logits = self._logits(row, image_tokens, ends)
            if step == 0:
                p_yes = (logits[:, self.yes] - logits[:, self.no]).sigmoid().tolist()
            for index, token in zip(list(running), logits.argmax(-1).tolist(), strict=True):
                if token == self.words.ids["<|im_end|>"]:
                    running.remove(index)
                else:
                    said[index].append(token)
            if not running:
                break
        return [Answer(self.words.decode(ids), p) for ids, p in zip(said, p_yes, strict=True)]

    def _logits(self, row: pack.Row, image_tokens: torch.Tensor, ends: list[int]) -> torch.Tensor:
        batch = pack.collate([row])
        ids, segment = torch.from_numpy(batch["ids"]), torch.from_numpy(batch["segment"])
        x = self.model.embed(ids, ids == self.words.ids["<|image_pad|>"], image_tokens.flatten(0, 1))
        keep = torch.zeros_like(ids, dtype=torch.bool)
        keep[0, ends] = True
        mask = attention_mask(segment, torch.from_numpy(batch["sees"]))
        return self.model.lm_head(self.model.model(x, torch.from_numpy(batch["positions"]), mask, keep=keep))


class Transformers:
    """Greedy answers of plain transformers, one question at a time, any messages: the judge of everything else."""

    def __init__(self, checkpoint: Path):
        from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.images = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
        self.patches = lru_cache(maxsize=4)(self._patches)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def __call__(self, image: bytes, questions: Sequence[str]) -> list[Answer]:
        return [Answer(self.converse([{"role": "user", "content": [image, question]}])) for question in questions]

    def _patches(self, image: bytes) -> dict:
        return dict(self.images([Image.open(io.BytesIO(image)).convert("RGB")], return_tensors="pt"))

    @torch.no_grad()
    def would_say(self, image: bytes, questions: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """For each question about an image whether its greedy answer is the given one, in one forward pass.

        Greedy decoding gives an answer exactly if each of its tokens, and then the end of the turn, is the likeliest
        behind those before it. A text may be written in other tokens than the tokenizer's, so False is no proof.
        """
        prompts = [self._prompt([{"role": "user", "content": [image, question]}]) for question in questions]
        ends = [[*self.tokenizer(answer).input_ids, self.tokenizer.eos_token_id] for answer in answers]
        whole = [torch.tensor(ids[0].tolist() + end) for (ids, _), end in zip(prompts, ends, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row in whole])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        logits = self._logits(ids, mask, self.patches(image))
        return [
            logits[i, length - len(end) - 1 : length - 1].argmax(-1).tolist() == end
            for i, (length, end) in enumerate(zip(lengths.tolist(), ends, strict=True))
        ]

    def _logits(self, ids: torch.Tensor, mask: torch.Tensor, seen: dict) -> torch.Tensor:
        """Logits [n, t, vocabulary] of n prompts about one image, which is encoded once."""
        tokens = self.model.get_image_features(seen["pixel_values"], seen["image_grid_thw"]).pooler_output[0]
        places = ids == self.model.config.image_token_id
        embeds = self.model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(places[..., None], tokens.repeat(len(ids), 1))
        grids = seen["image_grid_thw"].repeat(len(ids), 1)
        rope = self.model.model.get_rope_index
        positions, _ = rope(ids, mm_token_type_ids=places.int(), image_grid_thw=grids, attention_mask=mask)
        return self.model(inputs_embeds=embeds, position_ids=positions, attention_mask=mask).logits

    @torch.no_grad()
    def converse(self, messages: list[dict]) -> str:
        """The reply to chat messages whose content is a string or a list of strings (text) and bytes (images)."""
        ids, inputs = self._prompt(messages)
        mask = torch.ones_like(ids)
        out = self.model.generate(input_ids=ids, attention_mask=mask, **inputs, do_sample=False, max_new_tokens=LONGEST)
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def _prompt(self, messages: list[dict]) -> tuple[torch.Tensor, dict]:
        """Token ids [1, n] up to where the assistant speaks, and the model's other inputs."""
        images = [
            p for m in messages if not isinstance(m["content"], str) for p in m["content"] if isinstance(p, bytes)
        ]
        chat = [
            m | {"content": m["content"] if isinstance(m["content"], str) else [_part(p) for p in m["content"]]}
            for m in messages
        ]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs: dict = {}
        if images:
            seen = [self.patches(data) for data in images]
            inputs = {key: torch.cat([one[key] for one in seen]) for key in ("pixel_values", "image_grid_thw")}
            pieces = text.split("<|image_pad|>")
            text = pieces[0]
            for grid, piece in zip(inputs["image_grid_thw"], pieces[1:], strict=True):
                text += "<|image_pad|>" * (int(grid.prod()) // 4) + piece
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        if images:
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        return ids, inputs


def _part(piece: str | bytes) -> dict:
    return {"type": "image"} if isinstance(piece, bytes) else {"type": "text", "text": piece}
