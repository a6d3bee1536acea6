"""Embedding models over the tower of a random checkpoint: as transformers saves ColQwen2, as colpali-engine does, and
as sentence-transformers lays out GME. And what transformers' own classes make of inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.colqwen2 import ColQwen2Config, ColQwen2ForRetrieval, ColQwen2Processor

from tests.checkpoint.towers import edit
from tests.unsplit import Unsplit

WIDTH = 128


def gme(base: Path, path: Path, pooling: str | None = None, **config: Any) -> Path:
    """The base with sentence-transformers' files beside it; `pooling`: a mode of theirs."""
    shutil.copytree(base, path)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "custom_st.MultiModalTransformer"}]
    if pooling is not None:
        modules.append({"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
        (path / "1_Pooling").mkdir()
        modes = {f"pooling_mode_{name}": name == pooling for name in ("cls_token", "lasttoken", "mean_tokens")}
        (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **modes}))
    (path / "modules.json").write_text(json.dumps(modules))
    edit(path / "config.json", **config)
    return path


def colqwen2(base: Path, path: Path, seed: int = 0) -> Path:
    """As transformers saves it, around the model of the base."""
    within = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    config = ColQwen2Config(vlm_config=AutoConfig.from_pretrained(base).to_dict(), embedding_dim=WIDTH)
    torch.manual_seed(seed)
    model = ColQwen2ForRetrieval(config).float()
    model.vlm.load_state_dict(within.model.state_dict())
    torch.nn.init.normal_(model.embedding_proj_layer.bias, 0, 0.1)
    shutil.copytree(base, path, ignore=shutil.ignore_patterns("*.safetensors*", "config.json", "*chat_template*"))
    model.save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def colpali_engine(base: Path, path: Path, source: Path) -> Path:
    """As colpali-engine saves it: the names of the base, the head of `source`."""
    shutil.copytree(base, path, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    saved = load_file(source / "model.safetensors")
    for part in ("weight", "bias"):
        tensors[f"custom_text_proj.{part}"] = saved[f"embedding_proj_layer.{part}"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    edit(path / "config.json", architectures=["ColQwen2"])
    return path


def chat_prompt(instruction: str, *parts: Any) -> list[tuple[str, list[Any]]]:
    """Turns of a pooled prompt."""
    return [("system", [instruction]), ("user", list(parts))]


class UnsplitGme(Unsplit):
    """Pooled by hand over transformers' class."""

    @torch.inference_mode()
    def vector(
        self, turns: list[tuple[str, list[Any]]], ending: str = "<|endoftext|>", pooling: str = "last"
    ) -> torch.Tensor:
        """Float32 [hidden] of length 1."""
        inputs = self.inputs(turns)
        end = torch.tensor([self.tokenizer.convert_tokens_to_ids([ending] if ending else [])], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], end], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).long()
        rows = self.model.model(**inputs).last_hidden_state[0]
        return torch.nn.functional.normalize(rows[-1] if pooling == "last" else rows.mean(0), dim=0)


class UnsplitColQwen2:
    """Transformers' class and its processor."""

    def __init__(self, path: Path) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.model = ColQwen2ForRetrieval.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.processor = ColQwen2Processor(Qwen2VLImageProcessorPil.from_pretrained(path), tokenizer)

    @torch.inference_mode()
    def queries(self, texts: list[str]) -> list[torch.Tensor]:
        """Float32 [tokens, width] of each text, all in one padded batch."""
        inputs = self.processor.process_queries(text=texts)
        found = self.model(**inputs).embeddings
        return [rows[mask.bool()] for rows, mask in zip(found, inputs["attention_mask"], strict=True)]

    @torch.inference_mode()
    def image(self, image: Image.Image) -> torch.Tensor:
        """Float32 [tokens, width]."""
        return self.model(**self.processor.process_images(images=[image])).embeddings[0]
