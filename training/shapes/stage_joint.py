"""Stage three: pictures in, answers out, everything trained together from the two halves that share a code.

The code's loss stays on as a fading helper. The learning rate falls to zero at the end; the running average is what
is kept.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.multiprocessing import start_processes

from . import codes, feed, guide, pack
from .answers import Tally, answer_loss
from .model import Qwen2VL, Shape2VL, layers_of
from .optim import Average, Optimisers, schedule
from .stage_vision import normalise


def load(paths: list[Path]) -> Qwen2VL:
    """A model from one whole file, or from a vision half and a language half."""
    state: dict = {}
    for path in paths:
        tensors = load_file(path)
        whole = any(name.startswith("visual.") for name in tensors)
        half = not whole and any(name.startswith("blocks.") for name in tensors)
        state |= {f"visual.{name}": value for name, value in tensors.items()} if half else tensors
    model = Qwen2VL(Shape2VL(layers=layers_of(state)))
    model.load_state_dict(state)
    return model


def share(params: list[torch.Tensor], progress: float) -> float:
    """Average gradients over the ranks in place; returns the ranks' mean progress, the same on all."""
    if not distributed.is_initialized():
        return progress
    flat = torch.cat([p.grad.flatten() for p in params] + [torch.tensor([progress])])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for p, piece in zip(params, flat[:-1].split([p.numel() for p in params]), strict=True):
        p.grad.copy_(piece.view_as(p))
    return float(flat[-1])


def train(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One rank's share of the training; with one rank, all of it."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    if args.ranks > 1:
        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.ranks)
    model = load(args.start)
    words = feed.words(str(args.tokenizer))
    directions = codes.basis(model.sizes.hidden)
    slow = args.rate * args.vision_rate
    vision = Optimisers([model.visual], muon_lr=slow, adam_lr=slow / 10)
    language = Optimisers([model.model, model.lm_head], muon_lr=args.rate, adam_lr=args.rate / 10)
    params = vision.params + language.params
    average = Average(model)
    first = args.seed * 1_000_000 + rank * 400_000
    weights = pack.WEIGHTS[args.weights]
    lesson = (
        str(args.tokenizer),
        args.batch // args.ranks,
        6,
        weights,
        args.length,
        args.variety,
        args.alike,
        args.worn,
    )
    source = feed.stream(feed.picture_batch, first, *lesson)
    begun, kept, progress, tally, seen = time.process_time(), time.monotonic(), args.done, Tally(0.98), {}
    for step, data in enumerate(source, 1):
        image_tokens = model.visual(normalise(data["patches"]), data["grid"])
        target, placed = codes.target(data, image_tokens, directions)
        guide.follow(data, placed, words.ids["<|image_pad|>"])
        helper, figures = codes.loss(image_tokens, directions, target)
        result = answer_loss(model, image_tokens, data, words.ids["<|image_pad|>"], words.ids["<|im_end|>"])
        (result.loss + (1 - progress) * (args.helper * helper + args.guide * result.guide)).backward()
        passed = (time.process_time() - begun) / (60 * args.minutes)
        progress = share(params, args.done + passed * (1 - args.done))
        if progress >= 1:
            break
        rate = schedule(progress, flat=args.flat)
        norm = max(vision.step(rate), language.step(rate))
        average.update(model)
        tally.add(result.total, result.right)
        figures |= {"answer": result.loss.item(), "guide": result.guide.item(), "norm": norm}
        seen = {key: 0.97 * seen.get(key, value) + 0.03 * value for key, value in figures.items()}
        if rank == 0 and step % 20 == 0:
            text = " ".join(f"{key} {value:.4f}" for key, value in seen.items())
            print(f"step {step} at {progress:.3f} {text} | {tally}", flush=True)
        if rank == 0 and time.monotonic() - kept > 60:
            save_file(average.weights, args.out)
            kept = time.monotonic()
    source.close()
    if rank == 0:
        save_file(average.weights, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--start", type=Path, nargs="+", required=True, help="a whole checkpoint, or vision and language halves"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=50, help="of the processor's time, not of the clock's")
    parser.add_argument("--done", type=float, default=0.0, help="progress in 0..1 at which to resume the schedule")
    parser.add_argument("--flat", type=float, default=0.1, help="progress until which the learning rate is held")
    parser.add_argument("--batch", type=int, default=12, help="pictures a step, over all ranks")
    parser.add_argument(
        "--length", type=int, default=230, help="tokens per picture: prefix and as many questions as fit"
    )
    parser.add_argument("--variety", type=float, default=0.25, help="share of unusual conversations")
    parser.add_argument("--alike", type=float, default=0.0, help="share of scenes in which alike shapes abound")
    parser.add_argument("--worn", type=float, default=0.0, help="share of pictures that are JPEG files of low quality")
    parser.add_argument("--rate", type=float, default=0.004, help="learning rate of Muon; AdamW has a tenth")
    parser.add_argument("--vision-rate", type=float, default=0.25, help="the vision tower's share of the learning rate")
    parser.add_argument("--weights", choices=pack.WEIGHTS, default="hard", help="how often each question type is asked")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the work, one core each")
    parser.add_argument("--helper", type=float, default=0.5, help="weight of the code's loss at the start")
    parser.add_argument("--guide", type=float, default=0.4, help="weight of the guide's loss at the start")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    if args.ranks == 1:
        train(0, args, "")
        return
    with tempfile.TemporaryDirectory() as folder:
        start_processes(train, (args, f"{folder}/meeting"), nprocs=args.ranks, start_method="fork")


if __name__ == "__main__":
    main()
