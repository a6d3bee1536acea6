"""The family: names, settings, images and prompts, without torch."""

from __future__ import annotations

import math

import numpy as np

from lookonce.core.errors import CheckpointError, invalid
from lookonce.models.family import Dimensions, Half, SpecialTokens

MERGE = 2
TOWER = {"patch": 8, "dim": 32, "heads": 2, "blocks": 2}


class Toy:
    model_type = "toy_vl"
    label = "Toy"
    layouts = "tower.* and speaker.*"
    token_id_fields = ("picture_token", "row_end_token")
    words = r"\s*\S+|\s+"
    cpu_max_pixels = 64 * 16 * 16

    def locate(self, name):
        if name.startswith("tower."):
            return Half.VISION, name.removeprefix("tower.")
        rest = name.removeprefix("speaker.")
        if rest == name:
            raise CheckpointError(f"tensor {name!r} is not of a Toy; take another checkpoint")
        renamed = {"table": "model.embed_tokens.weight", "head": "lm_head.weight", "norm": "model.norm.weight"}
        return Half.LANGUAGE, renamed.get(rest, "model." + rest)

    def tensor_shapes(self, config, half, *, head):
        tower, text = self.vision_config(config), self.text_config(config)
        if self.problems(config, None, [half]):
            raise CheckpointError(*self.problems(config, None, [half]))
        dim, wide = tower["dim"], text["width"]
        if half is Half.VISION:
            shapes = {"patch.weight": (dim, 3 * tower["patch"] ** 2), "out.weight": (wide, dim)}
            for number in range(tower["blocks"]):
                sizes = {"norm": (dim,), "qkv": (3 * dim, dim), "proj": (dim, dim), "up": (2 * dim, dim)}
                sizes["down"] = (dim, 2 * dim)
                shapes |= {f"blocks.{number}.{name}.weight": size for name, size in sizes.items()}
            return shapes
        keys = wide // text["heads"] * text["kv_heads"]
        shapes = {"model.embed_tokens.weight": (text["vocab_size"], wide), "model.norm.weight": (wide,)}
        for number in range(text["depth"]):
            sizes = {"norm": (wide,), "q": (wide, wide), "k": (keys, wide), "v": (keys, wide), "o": (wide, wide)}
            sizes |= {"mlp_norm": (wide,), "gate": (text["ffn"], wide), "up": (text["ffn"], wide)}
            sizes["down"] = (wide, text["ffn"])
            shapes |= {f"model.layers.{number}.{name}.weight": size for name, size in sizes.items()}
        return shapes | ({"lm_head.weight": (text["vocab_size"], wide)} if head else {})

    def tied_head(self, config):
        return False

    def vision_config(self, config):
        return TOWER | config.get("tower", {})

    def text_config(self, config):
        return dict(config.get("speaker", {}))

    def problems(self, config, preprocessor, halves):
        sizes = (*self.vision_config(config).values(), *self.text_config(config).values())
        if all(isinstance(size, int) and size > 0 for size in sizes) and "width" in self.text_config(config):
            return []
        return ["config.json: a size of the tower or the speaker is missing or not a number; take it from the maker"]

    def hidden_size(self, config):
        return int(self.text_config(config).get("width", 0))

    def dimensions(self, config):
        tower, text = self.vision_config(config), self.text_config(config)
        return Dimensions(
            layers=text["depth"],
            hidden=text["width"],
            heads=text["heads"],
            kv_heads=text["kv_heads"],
            head_dim=text["width"] // text["heads"],
            ffn=text["ffn"],
            vocabulary=text["vocab_size"],
            patches_per_token=MERGE**2,
            patch_numbers=8 * tower["dim"],
        )

    def preprocessor(self, stored):
        return {"min_pixels": 16 * 16, "max_pixels": 256 * 256} | stored

    def fingerprint_preprocessor(self, preprocessor):
        return {"centre": 0.5}

    def merge_size(self, config):
        return MERGE

    def _side(self, config):
        return self.vision_config(config)["patch"] * MERGE

    def least_pixels(self, config):
        return self._side(config) ** 2

    def image_grid(self, config, width, height, min_pixels, max_pixels):
        side, scale = self._side(config), 1.0
        if width * height > max_pixels:
            scale = math.sqrt(max_pixels / (width * height))
        elif width * height < min_pixels:
            scale = math.sqrt(min_pixels / (width * height))
        rows, columns = (max(1, int(length * scale) // side) for length in (height, width))
        return 1, MERGE * rows, MERGE * columns

    def tokens_per_grid(self, config, grid_thw):
        t, h, w = grid_thw
        if t != 1 or min(h, w) < 1 or h % MERGE or w % MERGE:
            raise invalid(f"image.grid {t}x{h}x{w} is no Toy's", param="image.grid")
        return h * w // MERGE**2

    def encode_flops(self, config, tokens):
        tower, patches = self.vision_config(config), tokens * MERGE**2
        return tower["blocks"] * (16 * patches * tower["dim"] ** 2 + 4 * patches**2 * tower["dim"])

    def special_tokens(self, config):
        return SpecialTokens(image_id=config["picture_token"], image="<pic>", marker="<pic>", turn_end="<end>")

    def markers(self, config, grid_thw):
        """The end of every row."""
        rows, columns = grid_thw[1] // MERGE, grid_thw[2] // MERGE
        return tuple((row * (columns + 1) + columns, config["row_end_token"]) for row in range(rows))

    def positions(self, config, length, images):
        return np.arange(length, dtype=np.int64)[None], length

    def load_encoder(self, checkpoint, dtype, device, *, quantization="none", native=True):
        from tests.toy_family.modules import ToyEncoder

        return ToyEncoder(self, checkpoint, dtype, device)

    def load_text(self, checkpoint, dtype, where, devices, *, quantization="none", native=True):
        from tests.toy_family.modules import ToyText

        return ToyText(self, checkpoint, dtype, where, devices, quantization=quantization, native=native)


FAMILY = Toy()
