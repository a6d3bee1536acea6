"""Qwen3-VL's halves in their plain form (arXiv:2511.21631): where they differ from Qwen2-VL's."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from lookonce.models.plain import Weights, rms_normed
from lookonce.models.qwen2_vl.plain import Angles, PlainQwen2VL, layer_normed
from lookonce.models.qwen2_vl.rope import mrope_section
from lookonce.models.qwen3_vl.config import SECTION


class PlainQwen3VL(PlainQwen2VL):
    """A `Plain`."""

    width = "hidden_size"

    def computed(self, weights: Weights, x: torch.Tensor, angles: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """With learned positions before the first block, and rows taken behind some: [1 + deepstack, tokens, n]."""
        x = x + self._learned(weights("pos_embed.weight"), place)
        blocks = self.vision["deepstack_visual_indexes"]
        levels = {}
        for number in range(self.vision["depth"]):
            x = self.block(weights, number, x, angles, place)
            if number in blocks:
                at = blocks.index(number)
                levels[at] = self._merged(weights, f"deepstack_merger_list.{at}", x, together=True)
        return torch.stack([self._merged(weights, "merger", x, together=False), *(levels[at] for at in sorted(levels))])

    def block(
        self, weights: Weights, number: int, x: torch.Tensor, angles: torch.Tensor, place: torch.Tensor
    ) -> torch.Tensor:
        """LayerNorm, attention over the image, an MLP with tanh's GELU."""
        name = f"blocks.{number}"
        x = x + self.attention(weights, f"{name}.attn", layer_normed(weights, f"{name}.norm1", x), angles, None)
        inner = weights.linear(f"{name}.mlp.linear_fc1", layer_normed(weights, f"{name}.norm2", x))
        return x + weights.linear(f"{name}.mlp.linear_fc2", functional.gelu(inner, approximate="tanh"))

    def angles(self, positions: torch.Tensor) -> Angles:
        """Time, height and width take turns among the frequencies; what is left follows time."""
        found, scale = self.frequencies(self.text["head_dim"], 500_000.0)
        row = torch.zeros(len(found), dtype=torch.long)
        for axis, count in enumerate(mrope_section(self.text, SECTION)[1:], 1):
            row[axis : 3 * count : 3] = axis
        return positions[row].T * found, scale

    def head_normed(self, weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
        """Each head's."""
        return rms_normed(x, weights(f"{name}.weight"), float(self.text["rms_norm_eps"]))

    def _merged(self, weights: Weights, name: str, x: torch.Tensor, *, together: bool) -> torch.Tensor:
        """[patches, width] -> [tokens, hidden]; a token's patches normed as one row, or each by itself."""
        wide = x.shape[1] * self.vision["spatial_merge_size"] ** 2
        cells = layer_normed(weights, f"{name}.norm", x.view(-1, wide) if together else x).view(-1, wide)
        return weights.linear(f"{name}.linear_fc2", functional.gelu(weights.linear(f"{name}.linear_fc1", cells)))

    def _learned(self, table: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """[patches, width] of a square table whose corners are those of the image."""
        side, (rows, columns) = math.isqrt(len(table)), (place.amax(0) + 1).tolist()
        squares = table.T.view(1, -1, side, side)
        grid = functional.interpolate(squares, size=(rows, columns), mode="bilinear", align_corners=True)[0]
        return grid[:, place[:, 0], place[:, 1]].T


class PlainQwen3VLMoe(PlainQwen3VL):
    """A `Plain`, with a mixture of experts in every layer."""

    def mlp(self, weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
        """Token by token, expert by expert: those of the highest probabilities, in proportion."""
        odds = weights.linear(f"{name}.gate", x).softmax(-1)
        shares, which = odds.topk(self.text["num_experts_per_tok"], dim=-1)
        shares = shares / shares.sum(-1, keepdim=True)
        inner, total = self.text["moe_intermediate_size"], torch.zeros_like(x)
        for expert in sorted({*which.flatten().tolist()}):
            token, place = (which == expert).nonzero(as_tuple=True)
            both = weights(f"{name}.experts.gate_up_proj", (expert, expert + 1))[0]
            down = weights(f"{name}.experts.down_proj", (expert, expert + 1))[0]
            both = both if len(both) == 2 * inner else both.t()  # stacks are stored either way round
            down = down if len(down) == x.shape[1] else down.t()
            gate, up = functional.linear(x[token], both).chunk(2, dim=-1)
            total[token] += functional.linear(functional.silu(gate) * up, down) * shares[token, place, None]
        return total
