"""Stage two: the language model learns to read codes, from scenes that are never drawn.

The image tokens are codes.py's, blurred as a vision tower's would be. One or two shapes and lookups first, then all.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from . import codes, feed, pack
from .answers import Tally, answer_loss
from .model import Qwen2VL, Shape2VL
from .optim import Average, Optimisers, schedule
from .questions import PLURAL
from .scenes import COLOURS, KINDS
from .tokenizer import Words


def blur(code: torch.Tensor, strength: float) -> torch.Tensor:
    """Codes as an imperfect tower would write them: noise on all, some amplitude lost."""
    noisy = code * (1 - 0.3 * strength * torch.rand(code.shape[0], code.shape[1], 1))
    return noisy + 0.12 * strength * torch.randn_like(code)


@torch.no_grad()
def align(model: Qwen2VL, words: Words, directions: torch.Tensor) -> None:
    """Start with words that lie along the codes they name, and attention that finds and copies what is alike.

    Without this the model names what is in the image but does not look up what was asked for: nothing at the start
    ties the word "star" to a star's token, and two unknowns that only help together are learned late or never.
    """
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    embedding.mul_(0.6)
    names = [(codes.KIND + i, (kind, PLURAL[kind])) for i, kind in enumerate(KINDS)]
    names += [(codes.COLOUR + i, (colour,)) for i, colour in enumerate(COLOURS)]
    for direction, forms in names:
        for text in (form for word in forms for form in (word, f" {word}", word.capitalize())):
            ids = words.encode(text)
            if len(ids) == 1:
                embedding[ids[0]] += codes.SCALE * directions[direction]
                head[ids[0]] += 0.3 * directions[direction]
    for layer in model.model.layers:
        attention = layer.self_attn
        size = attention.q_proj.weight.shape[0] // attention.heads
        shared = attention.heads // attention.kv_heads
        for number in range(attention.heads):
            here, theirs = slice(number * size, (number + 1) * size), number // shared
            there = slice(theirs * size, (theirs + 1) * size)
            attention.q_proj.weight[here] = attention.k_proj.weight[there]
            attention.o_proj.weight[:, here] = attention.v_proj.weight[there].T


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    model = Qwen2VL(Shape2VL(layers=4))
    if args.resume:
        model.load_state_dict(load_file(args.resume), strict=False)
    words = feed.words(str(args.tokenizer))
    directions = codes.basis(model.sizes.hidden)
    if not args.resume:
        align(model, words, directions)
    optimisers = Optimisers([model.model, model.lm_head], muon_lr=args.muon_lr, adam_lr=args.adam_lr)
    language = torch.nn.ModuleDict({"model": model.model, "lm_head": model.lm_head})
    average = Average(language, decay=0.99)
    lessons = [(0.12, 3, pack.LOOKUPS), (0.25, 4, pack.MIXED), (1.0, 6, pack.HARD)]
    begun, step, kept, tally = time.process_time(), 0, time.monotonic(), Tally()
    for number, (until, most, weights) in enumerate(lessons):
        if args.resume and number < 2:
            continue
        first = args.seed * 1_000_000 + number * 100_000
        lesson = feed.stream(
            feed.layout_batch, first, str(args.tokenizer), args.batch, most, weights, args.length, 0.15
        )
        for data in lesson:
            progress = (time.process_time() - begun) / (60 * args.minutes)
            if progress >= until:
                break
            code = codes.write(
                data["grid"][0] * data["grid"][1],
                [torch.from_numpy(m) for m in data["marks"]],
                [torch.from_numpy(n) for n in data["numbers"]],
            )
            image_tokens = codes.tokens(blur(code, args.blur), directions)
            result = answer_loss(model, image_tokens, data, words.ids["<|image_pad|>"], words.ids["<|im_end|>"])
            (result.loss + args.guide * (1 - progress) * result.guide).backward()
            norm = optimisers.step(schedule(progress, flat=args.flat))
            average.update(language)
            tally.add(result.total, result.right)
            step += 1
            if step % 20 == 0:
                figures = f"loss {result.loss.item():.4f} guide {result.guide.item():.4f} norm {norm:.2f}"
                print(f"step {step} {60 * args.minutes * progress:.0f}s most {most} {figures} {tally}", flush=True)
            if time.monotonic() - kept > 60:
                save_file(average.weights, args.out)
                kept = time.monotonic()
        lesson.close()
    save_file(average.weights, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15, help="of the processor's time, not of the clock's")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--length", type=int, default=240)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--flat", type=float, default=0.5, help="progress until which the learning rate is held")
    parser.add_argument("--blur", type=float, default=0.5)
    parser.add_argument("--guide", type=float, default=0.5, help="weight of the guide's loss at the start")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--resume", type=Path)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
