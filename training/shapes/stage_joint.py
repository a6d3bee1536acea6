"""Stage three: images in, answers out, everything trained together from the two halves that share a code.

The code's loss stays on as a fading helper. The learning rate falls to zero at the end; the running average is what
is kept.
"""

import argparse
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

from . import codes, feed, guide, pack, ranks
from .answers import Tally, answer_loss
from .model import Qwen2VL, Shape2VL, layers_of
from .optim import Average, Optimisers, schedule
from .ranks import Report, meet, share
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


def train(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One rank's share of the training; with one rank, all of it."""
    first = meet(rank, args, meeting)
    model = load(args.start)
    words = feed.words(str(args.tokenizer))
    directions = codes.basis(model.sizes.hidden)
    slow = args.rate * args.vision_rate
    vision = Optimisers([model.visual], muon_lr=slow, adam_lr=slow / 10)
    language = Optimisers([model.model, model.lm_head], muon_lr=args.rate, adam_lr=args.rate / 10)
    params = vision.params + language.params
    average = Average(model)
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
    source = feed.stream(feed.image_batch, first, *lesson)
    report = Report(rank, lambda: save_file(average.weights, args.out))
    begun, progress, tally = time.process_time(), args.done, Tally(0.98)
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
        report.step(step, progress, figures, tally)
    source.close()
    report.end()


def main() -> None:
    parser = ranks.parser(__doc__, length=230, weights="hard", seed=3)
    parser.add_argument(
        "--start", type=Path, nargs="+", required=True, help="a whole checkpoint, or vision and language halves"
    )
    parser.add_argument("--minutes", type=float, default=50, help="of the processor's time, not of the clock's")
    parser.add_argument("--done", type=float, default=0.0, help="progress in 0..1 at which to resume the schedule")
    parser.add_argument("--flat", type=float, default=0.1, help="progress until which the learning rate is held")
    parser.add_argument("--variety", type=float, default=0.25, help="share of unusual conversations")
    parser.add_argument("--alike", type=float, default=0.0, help="share of scenes in which alike shapes abound")
    parser.add_argument("--worn", type=float, default=0.0, help="share of images that are JPEG files of low quality")
    parser.add_argument("--rate", type=float, default=0.004, help="learning rate of Muon; AdamW has a tenth")
    parser.add_argument("--vision-rate", type=float, default=0.25, help="the vision tower's share of the learning rate")
    parser.add_argument("--helper", type=float, default=0.5, help="weight of the code's loss at the start")
    parser.add_argument("--guide", type=float, default=0.4, help="weight of the guide's loss at the start")
    ranks.start(train, parser.parse_args())


if __name__ == "__main__":
    main()
