"""Adds layers to a language model without changing what it says: they begin as identities.

They come before the last layer, which turns what was found into words. Their queries, keys and values are copies of
the layer that looks at shapes, so that a little training makes them look, too.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from . import guide

LAYERS = 2


def deepen(state: dict[str, torch.Tensor], more: int = LAYERS) -> dict[str, torch.Tensor]:
    """A whole state with `more` layers in front of its last one."""
    last = max(int(name.split(".")[2]) for name in state if name.startswith("model.layers."))
    deeper: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        parts = name.split(".")
        if name.startswith("model.layers.") and int(parts[2]) == last:
            parts[2] = str(last + more)
        deeper[".".join(parts)] = value
        if name.startswith(f"model.layers.{guide.LOOK}."):
            silent = name.endswith(("o_proj.weight", "down_proj.weight"))
            for number in range(last, last + more):
                parts[2] = str(number)
                deeper[".".join(parts)] = torch.zeros_like(value) if silent else value.clone()
    return deeper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="a whole checkpoint's safetensors file")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    save_file(deepen(load_file(args.state)), args.out)


if __name__ == "__main__":
    main()
