"""The loss of answering: image tokens and a packed batch in, cross entropy over answer tokens out."""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import guide
from .model import Qwen2VL


def attention_mask(segment: Tensor, sees: Tensor) -> Tensor:
    """bool [b, 1, t, t]: earlier tokens of one's own segment, and the prefix (segment 0) where one may see it."""
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    own = segment[:, :, None] == segment[:, None, :]
    prefix = (segment[:, None, :] == 0) & sees[:, :, None]
    return ((own | prefix) & causal)[:, None]


@dataclass
class Result:
    """Weighted mean cross entropy, the guide's loss, and per question type how many answers and how many right
    throughout."""

    loss: Tensor
    guide: Tensor
    total: Counter
    right: Counter


def answer_loss(model: Qwen2VL, image_tokens: Tensor, batch: dict, pad: int, end: int) -> Result:
    """Predict every answer token of a fed batch. pad, end: ids of <|image_pad|> and <|im_end|>."""
    ids, segment = torch.from_numpy(batch["ids"]), torch.from_numpy(batch["segment"])
    positions = torch.from_numpy(batch["positions"])
    x = model.embed(ids, (ids == pad) & (segment == 0), image_tokens.flatten(0, 1))
    mask = attention_mask(segment, torch.from_numpy(batch["sees"]))
    weight = torch.from_numpy(batch["loss"])
    wanted = weight > 0
    before = torch.zeros_like(wanted)
    before[:, :-1] = wanted[:, 1:]  # the token before an answer token predicts it: segments are contiguous
    inputs: list[Tensor] = []
    logits = model.lm_head(model.model(x, positions, mask, keep=before, inputs=inputs))
    target, weight = ids[wanted], weight[wanted]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    guides = {key: tuple(torch.from_numpy(a) for a in arrays) for key, arrays in batch["guides"].items()}
    return Result(
        loss, guide.loss(model, inputs, positions, mask, guides), *_tally(logits, target, batch["types"], end)
    )


@torch.no_grad()
def _tally(logits: Tensor, target: Tensor, types: list[str], end: int) -> tuple[Counter, Counter]:
    total: Counter = Counter()
    right: Counter = Counter()
    whole = True
    hits = (logits.argmax(-1) == target).tolist()
    for kind, hit, token in zip(types, hits, target.tolist(), strict=True):
        whole = whole and hit
        if token == end:
            total[kind] += 1
            right[kind] += whole
            whole = True
    return total, right


class Tally:
    """Fading share of right answers per question type, for the progress line."""

    def __init__(self, fade: float = 0.97):
        self.fade, self.total, self.right = fade, Counter(), Counter()

    def add(self, total: Counter, right: Counter) -> None:
        for kind in sorted(set(self.total) | set(total)):
            self.total[kind] = self.total[kind] * self.fade + total[kind]
            self.right[kind] = self.right[kind] * self.fade + right[kind]

    def __str__(self) -> str:
        return " ".join(f"{k}={self.right[k] / max(self.total[k], 1e-9):.3f}" for k in sorted(self.total))
