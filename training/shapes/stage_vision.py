"""Stage one: the vision tower alone learns to write each shape's code into the image token at its centre."""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from . import codes, feed
from .model import Qwen2VL, Shape2VL
from .optim import Average, Optimisers, schedule
from .pixels import MEAN, STD
from .scenes import COLOURS, KINDS


def normalise(patches) -> torch.Tensor:
    """uint8 [..., 588] to what the image processor gives for one frame."""
    mean = torch.tensor(MEAN).repeat_interleave(196)
    std = torch.tensor(STD).repeat_interleave(196)
    return (torch.as_tensor(patches).float() / 255 - mean) / std


def train(
    out: Path, minutes: float, batch: int, seed: int, crowd: tuple[int, int], resume: Path | None, rate: float
) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    vision = Qwen2VL(Shape2VL()).visual
    if resume:
        vision.load_state_dict(load_file(resume))
    head = nn.Linear(vision.blocks[0].norm1.weight.shape[0], 1 + len(KINDS) * len(COLOURS))  # thrown away afterwards
    directions = codes.basis(Shape2VL().hidden)
    optimisers = Optimisers([vision, head], muon_lr=rate, adam_lr=rate / 10)
    average = Average(vision)
    begun, kept, seen = time.process_time(), time.monotonic(), {}
    for step, data in enumerate(feed.stream(feed.vision_batch, seed * 1_000_000, batch, crowd), 1):
        progress = (time.process_time() - begun) / (60 * minutes)
        if progress >= 1:
            break
        features = vision.features(normalise(data["patches"]), data["grid"])
        image_tokens = vision.merger(features)
        total, figures = codes.loss(image_tokens, directions, codes.target(data, image_tokens, directions)[0])
        labels = torch.from_numpy(data["labels"])
        dense = F.cross_entropy(head(features).flatten(0, 1), labels.flatten())
        (total + (0.5 + 1.5 * (1 - progress)) * dense).backward()
        norm = optimisers.step(schedule(progress, flat=0.3))
        average.update(vision)
        figures |= {"dense": dense.item(), "norm": norm}
        seen = {key: 0.95 * seen.get(key, value) + 0.05 * value for key, value in figures.items()}
        if step % 20 == 0:
            text = " ".join(f"{key} {value:.4f}" for key, value in seen.items())
            print(f"step {step} {60 * minutes * progress:.0f}s {text}", flush=True)
        if time.monotonic() - kept > 100:
            save_file(average.weights, out)
            kept = time.monotonic()
    save_file(average.weights, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25, help="of the processor's time, not of the clock's")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--crowd", type=int, nargs=2, default=(3, 9))
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate of Muon; AdamW has a tenth")
    args = parser.parse_args()
    train(args.out, args.minutes, args.batch, args.seed, tuple(args.crowd), args.resume, args.rate)


if __name__ == "__main__":
    main()
