"""Stage four: the deepened language model learns to list and count, behind a vision tower that no longer changes.

The worker that draws the pictures encodes them, too. The learning rate falls to zero at the end; the running average
is what is kept.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.multiprocessing import start_processes

from . import codes, feed, pack
from .answers import Tally, answer_loss
from .model import Qwen2VL
from .optim import Average, Optimisers, schedule
from .stage_joint import load, share
from .stage_vision import normalise


class Encoded:
    """Draws batches as feed.picture_batch does and encodes their pictures: `image_tokens` [size, cells, hidden]."""

    def __init__(self, model: Qwen2VL):
        self.visual, self.directions = model.visual, codes.basis(model.sizes.hidden)

    @torch.no_grad()
    def __call__(self, seed: int, *args) -> dict:
        torch.set_num_threads(1)
        return feed.picture_batch(seed, *args, see=self.see)

    def see(self, batch: dict) -> None:
        """Replace a batch's patches by image tokens, and its marks by the cells that really hold the shapes."""
        tokens = self.visual(normalise(batch.pop("patches")), batch["grid"])
        placed = codes.target(batch, tokens, self.directions)[1]
        batch |= {"image_tokens": tokens.numpy(), "marks": [mark.numpy() for mark in placed]}


def train(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One rank's share of the training; with one rank, all of it."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    if args.ranks > 1:
        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.ranks)
    model = load([args.start])
    model.visual.requires_grad_(False)
    words = feed.words(str(args.tokenizer))
    optimisers = Optimisers([model.model, model.lm_head], muon_lr=args.rate, adam_lr=args.rate / 10)
    language = torch.nn.ModuleDict({"model": model.model, "lm_head": model.lm_head})
    average = Average(language)
    first = args.seed * 1_000_000 + rank * 400_000
    weights = pack.WEIGHTS[args.weights]
    lesson = (str(args.tokenizer), args.batch // args.ranks, 6, weights, args.length, args.variety, args.alike)
    source = feed.stream(Encoded(model), first, *lesson)
    kept, tally, seen = time.monotonic(), Tally(0.98), {}
    begun = time.process_time()

    def keep() -> None:
        visual = {f"visual.{name}": value for name, value in model.visual.state_dict().items()}
        save_file(visual | average.weights, args.out)

    for step, data in enumerate(source, 1):
        image_tokens = torch.from_numpy(data["image_tokens"])
        result = answer_loss(model, image_tokens, data, words.ids["<|image_pad|>"], words.ids["<|im_end|>"])
        progress = (time.process_time() - begun) / (60 * args.minutes)
        (result.loss + max(0.0, 1 - progress) * args.guide * result.guide).backward()
        progress = share(optimisers.params, progress)
        if progress >= 1:
            break
        norm = optimisers.step(schedule(progress, flat=args.flat))
        average.update(language)
        tally.add(result.total, result.right)
        figures = {"answer": result.loss.item(), "guide": result.guide.item(), "norm": norm}
        seen = {key: 0.97 * seen.get(key, value) + 0.03 * value for key, value in figures.items()}
        if rank == 0 and step % 20 == 0:
            text = " ".join(f"{key} {value:.4f}" for key, value in seen.items())
            print(f"step {step} at {progress:.3f} {text} | {tally}", flush=True)
        if rank == 0 and time.monotonic() - kept > 60:
            keep()
            kept = time.monotonic()
    source.close()
    if rank == 0:
        keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, required=True, help="a whole checkpoint, as deepen.py writes it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25, help="of the processor's time, not of the clock's")
    parser.add_argument("--flat", type=float, default=0.4, help="progress until which the learning rate is held")
    parser.add_argument("--batch", type=int, default=12, help="pictures a step, over all ranks")
    parser.add_argument("--length", type=int, default=260, help="tokens per picture")
    parser.add_argument("--variety", type=float, default=0.2, help="share of unusual conversations")
    parser.add_argument("--alike", type=float, default=0.7, help="share of scenes in which alike shapes abound")
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate of Muon; AdamW has a tenth")
    parser.add_argument("--weights", choices=pack.WEIGHTS, default="lists", help="how often each type is asked")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the work, one core each")
    parser.add_argument("--guide", type=float, default=0.5, help="weight of the guide's loss at the start")
    parser.add_argument("--seed", type=int, default=4)
    args = parser.parse_args()
    if args.ranks == 1:
        train(0, args, "")
        return
    with tempfile.TemporaryDirectory() as folder:
        start_processes(train, (args, f"{folder}/meeting"), nprocs=args.ranks, start_method="fork")


if __name__ == "__main__":
    main()
