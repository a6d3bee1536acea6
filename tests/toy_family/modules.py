"""The two halves, in torch: how each service computes them."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from lookonce.models.checkpoint.weights import load_weights
from lookonce.models.family import Half, Patches
from lookonce.models.linear import gated_unit, linear
from lookonce.models.text_adapter import ModelShape, Stage
from tests.toy_family.family import MERGE

EPSILON = 1e-6
THETA = 10_000.0


class _Named(torch.nn.Module):
    """Nothing but parameters under the names of a half."""

    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, torch.nn.Parameter(torch.empty(shape), requires_grad=False))


def weights(family, checkpoint, half, dtype, where):
    """The tensors of a half by name."""
    with torch.device("meta"):
        module = _Named(family.tensor_shapes(checkpoint.config, half, head=True))
    load_weights(module, checkpoint, half, dtype=dtype, device=where)
    return {name: parameter.data for name, parameter in module.named_parameters()}


class ToyEncoder:
    def __init__(self, family, checkpoint, dtype, device):
        self.dtype, self.device = dtype, device
        self._family, self._config = family, checkpoint.config
        self._tower = family.vision_config(checkpoint.config)
        self._weights = weights(family, checkpoint, Half.VISION, dtype, device)

    def prepare(self, image, min_pixels, max_pixels):
        width, height = image.size
        grid, side = self._family.image_grid(self._config, width, height, min_pixels, max_pixels), self._tower["patch"]
        (_, h, w) = grid
        pixels = np.asarray(image.resize((w * side, h * side)))
        cut = pixels.reshape(h, side, w, side, 3).transpose(0, 2, 1, 3, 4).reshape(h * w, -1)
        return Patches(np.ascontiguousarray(cut), grid, width, height)

    @torch.inference_mode()
    def encode(self, batch, pause=lambda: None):
        rows = []
        for patches in batch:
            rows.append(self._one(patches).cpu())
            pause()
        return rows

    def warm_up(self):
        self.encode([self.prepare(Image.new("RGB", (16, 16)), 1, 256)])

    def _one(self, patches):
        (_, h, w), tensors, heads = patches.grid_thw, self._weights, self._tower["heads"]
        values = torch.from_numpy(patches.pixels).to(self.device).to(self.dtype) / 255 - 0.5
        hidden = values @ tensors["patch.weight"].T
        steps = torch.arange(h * w, device=self.device)
        place = torch.stack([steps // w, steps % w], 1).to(self.dtype)
        hidden = hidden + functional.pad(torch.cat([place.sin(), place.cos()], 1), (0, hidden.shape[1] - 4))
        for number in range(self._tower["blocks"]):
            block = {name: tensors[f"blocks.{number}.{name}.weight"] for name in ("norm", "qkv", "proj", "up", "down")}
            normed = functional.rms_norm(hidden, hidden.shape[1:], block["norm"], EPSILON)
            q, k, v = (normed @ block["qkv"].T).view(h * w, 3, heads, -1).permute(1, 2, 0, 3)
            mixed = functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(h * w, -1)
            hidden = hidden + mixed @ block["proj"].T
            hidden = hidden + functional.gelu(hidden @ block["up"].T) @ block["down"].T
        cells = hidden.view(h // MERGE, MERGE, w // MERGE, MERGE, -1).mean((1, 3))
        return cells.flatten(0, 1) @ tensors["out.weight"].T


class ToyText:
    """A packed adapter."""

    def __init__(self, family, checkpoint, dtype, where, devices, *, quantization, native):
        dims = family.dimensions(checkpoint.config)
        tensors = weights(family, checkpoint, Half.LANGUAGE, dtype, where)
        self._table, self._norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
        self._head = linear([tensors["lm_head.weight"]], native=native)
        self._layers = []
        for number, device in enumerate(devices):
            layer = {
                name: tensors[f"model.layers.{number}.{name}.weight"].to(device)
                for name in ("norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")
            }
            how = {"quantization": quantization, "native": native}
            self._layers.append(
                {
                    "norm": layer["norm"],
                    "mlp_norm": layer["mlp_norm"],
                    "qkv": linear([layer["q"], layer["k"], layer["v"]], **how),
                    "o": linear([layer["o"]], **how),
                    "gate_up": gated_unit(layer["gate"], layer["up"], **how),
                    "down": linear([layer["down"]], **how),
                }
            )
        self._devices = devices
        self.shape = ModelShape(
            layers=dims.layers,
            heads=dims.heads,
            kv_heads=dims.kv_heads,
            head_dim=dims.head_dim,
            hidden=dims.hidden,
            vocabulary=dims.vocabulary,
            context=family.text_config(checkpoint.config)["max_position_embeddings"],
            dtype=dtype,
            stages=tuple(Stage(device, len(list(group))) for device, group in groupby(devices)),
        )

    def embed(self, token_ids):
        return functional.embedding(token_ids, self._table)

    def forward(self, hidden, positions, attend, rows):
        shape = self.shape
        assert positions.shape == (1, hidden.shape[0])
        steps = torch.arange(0, shape.head_dim, 2, device=hidden.device) / shape.head_dim
        angles = (positions[0, :, None] * THETA**-steps)[:, None]  # [T, 1, d / 2]
        cos, sin = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
        for number, layer in enumerate(self._layers):
            hidden, cos, sin = (x.to(self._devices[number]) for x in (hidden, cos, sin))
            heads = layer["qkv"](self._rms(hidden, layer["norm"])).reshape(hidden.shape[0], -1, shape.head_dim)
            turning, values = heads.split([shape.heads + shape.kv_heads, shape.kv_heads], 1)
            first, second = turning.chunk(2, -1)
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
            mixed = attend(number, turned[:, : shape.heads], turned[:, shape.heads :], values)
            hidden = layer["o"].plus(mixed, hidden)
            hidden = layer["down"].plus(layer["gate_up"](self._rms(hidden, layer["mlp_norm"])), hidden)
        return self._head(self._rms(hidden.index_select(0, rows.to(hidden.device)), self._norm))

    def _rms(self, x, weight):
        return functional.rms_norm(x, (x.shape[-1],), weight, EPSILON)
