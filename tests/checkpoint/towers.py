"""Checkpoints that have one vision half, bit for bit, and differ in all else; and one that differs in one weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from tests.checkpoint.quantisers import gptq, quantised

PIXELS = {"max_pixels": 100 * 28 * 28}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return load_file(path / "model.safetensors")


def copy_with(source: Path, path: Path, **tensors: np.ndarray) -> Path:
    """A copy of a checkpoint of one file, some of its tensors replaced."""
    shutil.copytree(source, path)
    (path / "model.safetensors").unlink()
    save_file(weights_of(source) | tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def resaved(source: Path, path: Path) -> Path:
    """As transformers writes what it has read, in many small files."""
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = Qwen2VLForConditionalGeneration.from_pretrained(source, dtype="auto")
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    for file in ("generation_config.json", "tokenizer_config.json"):
        shutil.copy(source / file, path / file)
    model.save_pretrained(path, max_shard_size="300KB")
    Qwen2VLImageProcessorPil.from_pretrained(source).save_pretrained(path)
    assert AutoConfig.from_pretrained(path).vision_config.depth == 2
    return path


def sharing(folder: Path) -> dict[str, Path]:
    """By what is done to them; "plain" is what the others have their vision half from."""
    plain = make_random_checkpoint(folder / "plain", **PIXELS)
    other = weights_of(make_random_checkpoint(folder / "other", seed=7, **PIXELS))
    language = {name: tensor for name, tensor in other.items() if not name.startswith("visual.")}
    rope = shutil.copytree(plain, folder / "rope")
    edit(rope / "config.json", rope_theta=100.0)
    return {
        "plain": plain,
        "renamed": make_random_checkpoint(folder / "renamed", layout="nested", **PIXELS),
        "untied": make_random_checkpoint(folder / "untied", tied=False, shards=3, **PIXELS),
        "re-saved": resaved(plain, folder / "re-saved"),
        "rope": rope,
        "fine-tuned": copy_with(plain, folder / "fine-tuned", **language),
        "quantised": quantised(plain, folder / "gptq", gptq(), GPTQ) / "quantised",
    }


def unsplit_of(path: Path) -> Path:
    """The same model as transformers can load it."""
    return path.parent / "plain" if path.name == "quantised" else path


def one_weight_changed(source: Path, path: Path) -> Path:
    """The least that a weight of the vision half can change by."""
    name = "visual.blocks.1.mlp.fc1.weight"
    tensor = weights_of(source)[name].copy()
    tensor[3, 5] = np.nextafter(tensor[3, 5], np.float32(np.inf))
    return copy_with(source, path, **{name: tensor})
