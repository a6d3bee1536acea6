"""Stage four: the deepened language model learns to list and count, behind a vision tower that no longer changes.

The worker that draws the images encodes them, too. The learning rate falls to zero at the end; the running average
is what is kept.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from . import codes, feed, pack, ranks
from .answers import Tally, answer_loss
from .model import Qwen2VL
from .optim import Average, Optimisers, schedule
from .ranks import Report, meet, share
from .stage_joint import load
from .stage_vision import normalise


class Encoded:
    """Draws batches as feed.image_batch does and encodes their images: `image_tokens` [size, cells, hidden]."""

    def __init__(self, model: Qwen2VL):
        self.visual, self.directions = model.visual, codes.basis(model.sizes.hidden)

    @torch.no_grad()
    def __call__(self, seed: int, *args) -> dict:
        torch.set_num_threads(1)
        return feed.image_batch(seed, *args, see=self.see)

    def see(self, batch: dict) -> None:
        """Replace a batch's patches by image tokens, and its marks by the cells that really hold the shapes."""
        tokens = self.visual(normalise(batch.pop("patches")), batch["grid"])
        placed = codes.target(batch, tokens, self.directions)[1]
        batch |= {"image_tokens": tokens.numpy(), "marks": [mark.numpy() for mark in placed]}


def train(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One rank's share of the training; with one rank, all of it."""
    first = meet(rank, args, meeting)
    model = load([args.start])
    model.visual.requires_grad_(False)
    words = feed.words(str(args.tokenizer))
    optimisers = Optimisers([model.model, model.lm_head], muon_lr=args.rate, adam_lr=args.rate / 10)
    language = torch.nn.ModuleDict({"model": model.model, "lm_head": model.lm_head})
    average = Average(language)
    weights = pack.WEIGHTS[args.weights]
    lesson = (str(args.tokenizer), args.batch // args.ranks, 6, weights, args.length, args.variety, args.alike)
    source = feed.stream(Encoded(model), first, *lesson)
    tally, begun = Tally(0.98), time.process_time()

    def keep() -> None:
        visual = {f"visual.{name}": value for name, value in model.visual.state_dict().items()}
        save_file(visual | average.weights, args.out)

    report = Report(rank, keep)
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
        report.step(step, progress, figures, tally)
    source.close()
    report.end()


def main() -> None:
    parser = ranks.parser(__doc__, length=260, weights="lists", seed=4)
    parser.add_argument("--start", type=Path, required=True, help="a whole checkpoint, as deepen.py writes it")
    parser.add_argument("--minutes", type=float, default=25, help="of the processor's time, not of the clock's")
    parser.add_argument("--flat", type=float, default=0.4, help="progress until which the learning rate is held")
    parser.add_argument("--variety", type=float, default=0.2, help="share of unusual conversations")
    parser.add_argument("--alike", type=float, default=0.7, help="share of scenes in which alike shapes abound")
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate of Muon; AdamW has a tenth")
    parser.add_argument("--guide", type=float, default=0.5, help="weight of the guide's loss at the start")
    ranks.start(train, parser.parse_args())


if __name__ == "__main__":
    main()
