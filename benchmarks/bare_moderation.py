"""The second floor of benchmarks.moderate, which runs this: transformers' modules, called as directly as can be.

A process of its own, so that nothing else computes in it. Vision tower, text model and head are transformers', as they
are: attention by sdpa, nothing compiled. Encodes take the patches of several images end to end. Scores take several
images of one size as a batch without padding; the questions about an image are one row, in which a mask lets each
token see what it follows. Several ways to pack are tried on some images, and the fastest is timed on all: twice, of
which the better counts. So is the plain one: eight images at once, of each what its questions share, then the tails.
Patches, prompts and masks are made outside the timed part, and logits are those that are read.
Prints JSON: seconds of both stages, and how far the probabilities are from those of our engine. Status 1: too far.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import DynamicCache

from benchmarks.moderate import PACK, Floor, Preparation
from lm_service.engine.types import ScoreItem, Scoring
from lookonce.core.process import keep_freed_memory
from lookonce.models.checkpoint import open_checkpoint
from lookonce.models.family import Patches
from lookonce.models.omp_thread import run_in_omp_thread
from lookonce.moderation.policy import parse_policy
from tests.modules import load_language_model, load_vision_tower

PACKS = (4, PACK, 16)
SAMPLE = 96  # images on which ways are compared
TURNS = 2
FARTHEST = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
Grid = tuple[int, int, int]
Answers = list[list[list[float]]]  # of image, rule and choice: a probability
W = TypeVar("W")


@dataclass(frozen=True)
class Layout:
    """The questions about an image, and their choices, as one row: each token sees those that it follows."""

    ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [3, T]
    mask: torch.Tensor  # [T, T], added to the scores of attention: 0 where a row sees a column, else -inf
    image: tuple[int, int]  # where its tokens begin and end
    shared: int  # tokens that all questions begin with
    rows: torch.Tensor  # int64: those whose logits are read
    reads: list[list[list[tuple[int, int]]]]  # of question and choice: places in `rows`, and the token read there


def common(items: Sequence[ScoreItem]) -> int:
    """Tokens that all prompts begin with, but not the last one of any."""
    columns = zip(*(item.prompt.token_ids[:-1] for item in items), strict=False)
    shortest = min(len(item.prompt.token_ids) for item in items) - 1
    return next((at for at, column in enumerate(columns) if len(set(column)) > 1), shortest)


def lay_out(items: Sequence[ScoreItem], *, tree: bool, dtype: torch.dtype) -> Layout:
    """Questions about one image share what all begin with; with `tree` also what only some begin with."""
    shared, places, ids = common(items), dict[tuple[int, int, int], int](), list[int]()
    parents: list[int] = []
    positions: list[torch.Tensor] = []

    def follow(parent: int, token: int, position: torch.Tensor, owner: int) -> int:
        place = places.setdefault((parent, token, owner), len(ids))
        if place == len(ids):
            parents.append(parent)
            ids.append(token)
            positions.append(position)
        return place

    reads: list[list[list[tuple[int, int]]]] = []
    for number, item in enumerate(items):
        at, laid_out = -1, torch.from_numpy(item.prompt.positions)
        for depth, token in enumerate(item.prompt.token_ids):
            at = follow(at, token, laid_out[:, depth], -1 if tree or depth < shared else number)
        reads.append([])
        for choice in item.choices:
            row, path = at, [(at, choice[0])]
            for step, (token, following) in enumerate(pairwise(choice)):
                row = follow(row, token, torch.full((3,), item.prompt.next_position + step), number)
                path.append((row, following))
            reads[-1].append(path)
    sees = torch.eye(len(ids), dtype=torch.bool)
    for row, parent in enumerate(parents[1:], start=1):
        sees[row] |= sees[parent]
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, float("-inf"))
    rows = sorted({row for item in reads for path in item for row, _ in path})
    numbered = [[[(rows.index(row), token) for row, token in path] for path in item] for item in reads]
    [span] = items[0].prompt.images
    image = (span.start, span.end)
    return Layout(torch.tensor(ids), torch.stack(positions, 1), mask, image, shared, torch.tensor(rows), numbered)


@dataclass(frozen=True)
class Way:
    """How scores are packed."""

    images: int  # in a batch
    tree: bool = False
    twice: bool = False  # a forward for what all questions share, and one for the rest with that in a KV cache
    chat: bool = False  # what stands before the image comes from a KV cache made before

    def __str__(self) -> str:
        parts = ["a tree" if self.tree else "tails", "in two forwards" * self.twice, "chat in a cache" * self.chat]
        return ", ".join([f"{self.images} images", *filter(None, parts)])


WAYS = (
    *(Way(images) for images in (1, PACK)),
    *(Way(images, tree=True, chat=chat) for images in (1, PACK, 16, 32) for chat in (False, True)),
    *(Way(images, tree=True, twice=True, chat=True) for images in (PACK, 16)),
)


class Bare:
    """transformers' modules of a checkpoint."""

    def __init__(self, model: Path, dtype: torch.dtype) -> None:
        checkpoint = open_checkpoint(str(model))
        self.tower = load_vision_tower(checkpoint, dtype)
        self.model, self.head = load_language_model(checkpoint, dtype)
        self._chat: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer: keys and values before the image

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Embeddings of all images, one behind the other."""
        rows: torch.Tensor = self.tower(pixels, grids).pooler_output
        return rows

    @torch.inference_mode()
    def score(self, way: Way, layout: Layout, images: torch.Tensor) -> torch.Tensor:
        """Logits [n, rows that are read, vocabulary] of images [n, tokens, hidden]."""
        cache = DynamicCache() if way.twice or way.chat else None
        start = 0
        if way.chat and cache is not None:
            start = layout.image[0]
            for index, (keys, values) in enumerate(self._chat or self.read_chat(layout)):
                keys, values = (x.expand(len(images), -1, -1, -1) for x in (keys, values))
                cache.update(keys, values, index)
        if way.twice:
            self._forward(layout, start, layout.shared, images, cache)
            start = layout.shared
        hidden = self._forward(layout, start, len(layout.ids), images, cache)
        logits: torch.Tensor = self.head(hidden[:, layout.rows - start])
        return logits

    def read_chat(self, layout: Layout) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of what stands before the image: the same for every image."""
        cache: Any = DynamicCache()
        self._forward(layout, 0, layout.image[0], torch.empty(1, 0), cache)
        self._chat = [(layer.keys, layer.values) for layer in cache.layers]
        return self._chat

    def _forward(self, layout: Layout, start: int, end: int, images: torch.Tensor, cache: Any) -> torch.Tensor:
        """Of tokens `start` to `end`."""
        hidden = self.model.embed_tokens(layout.ids[start:end]).repeat(len(images), 1, 1)
        first, last = layout.image
        if start <= first < end:
            hidden[:, first - start : last - start] = images
        out: torch.Tensor = self.model(
            inputs_embeds=hidden,
            position_ids=layout.positions[:, None, start:end].expand(3, len(images), -1),
            attention_mask={"full_attention": layout.mask[None, None, start:end, :end]},
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return out


PLAIN = Way(PACK)


def seconds(function: Callable[..., object], *args: object) -> float:
    """That a call takes."""
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began


def fastest(ways: Sequence[W], measured: Callable[[W], float]) -> W:
    """Each way takes its turn, several times; its best counts."""
    times = {way: [measured(way)] for way in ways}  # the first warms up, and seldom is the best
    for _ in range(TURNS):
        for way in ways:
            times[way].append(measured(way))
    for way in ways:
        print(f"  {1000 * min(times[way]):8.2f} ms an image: {way}", file=sys.stderr)
    return min(ways, key=lambda way: min(times[way]))


class Stages:
    """Both stages of some images."""

    def __init__(self, bare: Bare, preparation: Preparation, cut: Sequence[Patches]) -> None:
        self.bare, self.preparation, self.cut = bare, preparation, cut
        self.rows: list[torch.Tensor] = []

    def packs(self, size: int, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pixels and grids of the first `count` images."""
        for start in range(0, count, size):
            some = self.cut[start : min(start + size, count)]
            pixels = [torch.from_numpy(self.preparation.preprocess.pixel_values(patches)) for patches in some]
            yield torch.cat(pixels), torch.tensor([patches.grid_thw for patches in some])

    def encode(self, size: int, count: int) -> float:
        """Seconds an image, with what the caller does between two packs left out."""
        return sum(seconds(self.bare.encode, *pack) for pack in self.packs(size, count)) / count

    def keep_rows(self) -> None:
        """Embeddings of all images."""
        area = self.preparation.merge**2
        for start, pack in zip(range(0, len(self.cut), PACK), self.packs(PACK, len(self.cut)), strict=True):
            counts = [patches.count // area for patches in self.cut[start : start + PACK]]
            self.rows += self.bare.encode(*pack).split(counts)

    def batches(self, size: int) -> Iterator[tuple[Grid, list[int]]]:
        """Images of one size, the most frequent one first."""
        groups: dict[Grid, list[int]] = {}
        for number, patches in enumerate(self.cut):
            groups.setdefault(patches.grid_thw, []).append(number)
        for grid, group in sorted(groups.items(), key=lambda entry: -len(entry[1])):
            for start in range(0, len(group), size):
                yield grid, group[start : start + size]

    def score(self, way: Way, layouts: dict[tuple[Grid, bool], Layout], sample: int | None = None) -> float:
        """Seconds an image: of all, or of batches that make up `sample` images."""
        most = None if sample is None else -(-sample // way.images)
        total, count = 0.0, 0
        for grid, group in islice(self.batches(way.images), most):
            images = torch.stack([self.rows[number] for number in group])
            total += seconds(self.bare.score, way, layouts[grid, way.tree], images)
            count += len(group)
        return total / count

    def answers(self, way: Way, layouts: dict[tuple[Grid, bool], Layout], count: int) -> Answers:
        """Of the first `count` images."""
        found: dict[int, list[list[float]]] = {}
        for grid, group in self.batches(way.images):
            layout = layouts[grid, way.tree]
            logits = self.bare.score(way, layout, torch.stack([self.rows[number] for number in group]))
            for number, values in zip(group, logits.float().log_softmax(-1), strict=True):
                sums = [[float(sum(values[at] for at in path)) for path in item] for item in layout.reads]
                found[number] = [probabilities(item) for item in sums]
            if all(number in found for number in range(count)):
                break
        return [found[number] for number in range(count)]


def probabilities(logprobs: Sequence[float]) -> list[float]:
    """Of a question's choices, which are all there is."""
    found: list[float] = torch.tensor(logprobs, dtype=torch.float64).softmax(0).tolist()
    return found


async def own_answers(floor: Floor, cut: Sequence[Patches], asked: Sequence[tuple[ScoreItem, ...]]) -> Answers:
    """By our encoder and our engine."""
    floor.encode([items[0].prompt.images[0].reference.key for items in asked], cut)
    await floor.engine.start(floor.rows)
    scores = [await floor.engine.score(Scoring(str(number), items)) for number, items in enumerate(asked)]
    await floor.engine.close()
    return [[probabilities(item) for item in one.logprobs] for one in scores]


def farthest(one: Answers, other: Answers) -> float:
    """The largest difference of two probabilities."""
    flat = [[value for rules in answers for item in rules for value in item] for answers in (one, other)]
    return max(abs(a - b) for a, b in zip(*flat, strict=True))


def main() -> int:
    """Measure, then check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="a folder of PNG files")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    preparation, bare = Preparation(options.model), Bare(options.model, dtype)
    keep_freed_memory()  # as the services do
    cut = [preparation.patches(path.read_bytes()) for path in sorted(options.images.rglob("*.png"))]
    policy = parse_policy(options.policy.read_text())
    asked = [preparation.items(policy, number.to_bytes(32, "big"), patches) for number, patches in enumerate(cut)]
    pairs = zip(cut, asked, strict=True)
    layouts = {
        (patches.grid_thw, tree): lay_out(items, tree=tree, dtype=dtype)
        for patches, items in {patches.grid_thw: (patches, items) for patches, items in pairs}.values()
        for tree in (False, True)
    }
    stages, sample = Stages(bare, preparation, cut), min(SAMPLE, len(cut))
    pack = fastest(PACKS, partial(stages.encode, count=sample))
    encodes = {size: min(stages.encode(size, len(cut)) for _ in range(TURNS)) for size in {pack, PACK}}
    stages.keep_rows()
    way = fastest(WAYS, partial(stages.score, layouts=layouts, sample=sample))
    scores = {one: min(stages.score(one, layouts) for _ in range(TURNS)) for one in {way, PLAIN}}
    found = {}
    for kind, size, one in (("transformers", pack, way), ("transformers, plain", PACK, PLAIN)):
        found |= {f"bare encodes, {kind}": encodes[size] * len(cut), f"bare scores, {kind}": scores[one] * len(cut)}
    few = min(PACK, len(cut))
    own = asyncio.run(own_answers(run_in_omp_thread(Floor, preparation, dtype), cut[:few], asked[:few]))
    difference = max(farthest(own, stages.answers(way, layouts, few)) for way in WAYS)
    print(f"transformers' floor: encodes of {pack}; scores: {way}; from ours by {difference:.1e}", file=sys.stderr)
    print(json.dumps({"seconds": found, "difference": difference}))
    return int(not difference <= FARTHEST[dtype])


if __name__ == "__main__":
    sys.exit(main())
