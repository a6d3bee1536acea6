"""LoRA adapters as PEFT's save_pretrained writes them, with random values."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct",
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "init_lora_weights": True,
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "task_type": "CAUSAL_LM",
}


def adapter(path: Path, modules: dict[str, tuple[int, ...]], *, seed=0, r=4, whole=(), rename=str, **config) -> Path:
    """As PEFT's save_pretrained writes it. `whole`: weights that were trained whole, by name; with `use_dora`, each
    module has a magnitude."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, shape in modules.items():
        a, b = (r, *shape[1:]), (shape[0], r, *(1 for _ in shape[2:]))
        for letter, sides in (("A", a), ("B", b)):
            values = torch.randn(sides, generator=generator) / 8
            tensors[f"base_model.model.{rename(module)}.lora_{letter}.weight"] = values
        if config.get("use_dora"):
            lengths = torch.rand(1, shape[0], *(1 for _ in shape[2:]), generator=generator) + 0.5
            tensors[f"base_model.model.{rename(module)}.lora_magnitude_vector"] = lengths.squeeze()
    tensors |= {f"base_model.model.{name}": tensor for name, tensor in dict(whole).items()}
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return path
