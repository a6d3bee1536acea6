"""Processes that train one model together: how they start, share gradients and tell how far they are."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed
from torch.multiprocessing import start_processes

from . import pack

Train = Callable[[int, argparse.Namespace, str], None]


def parser(description: str | None, *, length: int, weights: str, seed: int) -> argparse.ArgumentParser:
    """What the command lines of the stages that share their work have in common."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--tokenizer", type=Path, required=True)
    made.add_argument("--batch", type=int, default=12, help="images a step, over all ranks")
    made.add_argument(
        "--length", type=int, default=length, help="tokens per image: prefix and as many questions as fit"
    )
    made.add_argument("--weights", choices=pack.WEIGHTS, default=weights, help="how often each question type is asked")
    made.add_argument("--ranks", type=int, default=1, help="processes that share the work, one core each")
    made.add_argument("--seed", type=int, default=seed)
    return made


def start(train: Train, args: argparse.Namespace) -> None:
    """Run `train(rank, args, meeting)` in as many processes as were asked for; one alone stays in this."""
    if args.ranks == 1:
        train(0, args, "")
        return
    with tempfile.TemporaryDirectory() as folder:
        start_processes(train, (args, f"{folder}/meeting"), nprocs=args.ranks, start_method="fork")


def meet(rank: int, args: argparse.Namespace, meeting: str) -> int:
    """Begin a rank's work, at the file where all of them meet; the number of its first batch, which no other draws."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    if args.ranks > 1:
        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.ranks)
    return args.seed * 1_000_000 + rank * 400_000


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


class Report:
    """The first rank's words: running means every 20 steps, and the weights kept once a minute."""

    def __init__(self, rank: int, keep: Callable[[], None]) -> None:
        self._first, self._keep = rank == 0, keep
        self._means: dict[str, float] = {}
        self._kept = time.monotonic()

    def step(self, number: int, progress: float, figures: dict[str, float], tally: object) -> None:
        """Take a step's figures."""
        for key, value in figures.items():
            self._means[key] = 0.97 * self._means.get(key, value) + 0.03 * value
        if self._first and number % 20 == 0:
            text = " ".join(f"{key} {value:.4f}" for key, value in self._means.items())
            print(f"step {number} at {progress:.3f} {text} | {tally}", flush=True)
        if self._first and time.monotonic() - self._kept > 60:
            self._keep()
            self._kept = time.monotonic()

    def end(self) -> None:
        """Keep the weights a last time."""
        if self._first:
            self._keep()
