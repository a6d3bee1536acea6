"""Shows the language model where to look: which words a question is about, and which image tokens its answer lies in.

Used in training only, fading out. From the place that predicts an answer, one head a group in layer READ should look
at the asked colour and kind words, and in layer LOOK at the shapes they name, or at the first token when there is none.
Without it the model lingers where it names what is there instead of what was asked for. A description must say how many
before it names what: its next group is looked for in LOOK and AGAIN, and counted in COUNT. Layers that a smaller model
lacks are left out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .model import Qwen2VL, rotate_half
from .questions import PLURAL, Question
from .scenes import COLOURS, KINDS, Shape

READ, LOOK, AGAIN, COUNT = 1, 2, 3, 4  # layers
WEIGHT = {COUNT: 4.0}  # of a layer's share in the loss, 1 elsewhere
SINK = 0  # token position that stands for "nothing"
COUNTING = (
    4.0  # share of the sink against one shape's when counting: attention only averages, so n shows as 4 / (4 + n)
)


def named(text: str, shapes: Sequence[Shape]) -> list[int]:
    """Indices of the shapes that fit the colour and kind words in a text; none if it has no such word."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    kinds = {kind for kind in KINDS if kind in words or PLURAL[kind] in words}
    colours = {colour for colour in COLOURS if colour in words}
    if not kinds and not colours:
        return []
    return [i for i, s in enumerate(shapes) if (not kinds or s.kind in kinds) and (not colours or s.colour in colours)]


def referents(question: Question, shapes: Sequence[Shape]) -> tuple[list[int], list[int]]:
    """Shapes that the answer depends on, for either guided head; two different ones for a relation."""
    if question.type == "count_all":
        everything = list(range(len(shapes)))
        return everything, everything
    if question.type == "relation":
        return named(question.about["o"], shapes), named(question.about["p"], shapes)
    if question.type == "extreme":
        ranked = sorted(range(len(shapes)), key=lambda i: shapes[i].radius)
        chosen = [ranked[0] if question.about["e"] == "smallest" else ranked[-1]]
        return chosen, chosen
    found = named(" ".join(question.about.get(key, "") for key in ("k", "c", "ks", "a", "o")), shapes)
    return found, found


@dataclass(frozen=True)
class Listed:
    """What one token of a description depends on.

    shapes: those of the group it belongs to, none at the end. amount: whether it says how many. said: places in the
    answer of the colour and the kind named last, where the token must know them to go on.
    """

    shapes: list[int]
    amount: bool = False
    said: tuple[int, int] | None = None


def listing(
    answer: Sequence[int], colours: dict[int, str], kinds: dict[int, str], shapes: Sequence[Shape]
) -> list[Listed]:
    """What each token of a description depends on.

    The comma belongs to the group behind it: whether one comes is whether there is a group left.
    """
    tokens: list[Listed] = []
    said, start = None, 0
    for i, token in enumerate(answer):
        if token in kinds:
            at = next(place for place in range(start, i + 1) if answer[place] in colours)
            found = [n for n, s in enumerate(shapes) if s.colour == colours[answer[at]] and s.kind == kinds[token]]
            amount = start if start == 0 else start + 1
            tokens += [
                Listed(found, place == amount, said if place <= amount else None) for place in range(start, i + 1)
            ]
            said, start = (at, i), i + 1
    return tokens + [Listed([], said=said if place == start else None) for place in range(start, len(answer))]


def follow(batch: dict, placed: list[Tensor], pad: int) -> None:
    """Point a fed batch's guides at the cells where codes.place put the shapes, in place."""
    for number, (before, after) in enumerate(zip(batch["marks"], placed, strict=True)):
        image = int((batch["ids"][number] == pad).argmax())
        for old, new in zip(before[:, 0].tolist(), after[:, 0].tolist(), strict=True):
            if old == new:
                continue
            for (layer, _), (row, _, targets) in batch["guides"].items():
                if layer != READ:
                    mine = row == number
                    targets[mine, image + new] = targets[mine, image + old]
                    targets[mine, image + old] = 0


def loss(model: Qwen2VL, inputs: list[Tensor], positions: Tensor, mask: Tensor, guides: dict) -> Tensor:
    """Mean cross entropy between the attention and where it should land.

    inputs: what each layer was given, [b, t, hidden]. guides: per (layer, head) the arrays row [n], query [n] and
    targets [n, t], how much attention each token should get, before normalising.
    """
    cos, sin = model.model.rotary(positions)
    total, count = inputs[0].new_zeros(()), 0
    for (number, head), (row, query, targets) in guides.items():
        if number >= len(inputs):
            continue
        layer = model.model.layers[number]
        attention = layer.self_attn
        size = attention.q_proj.weight.shape[0] // attention.heads
        group = head // (attention.heads // attention.kv_heads)
        hidden = layer.input_layernorm(inputs[number])
        here, there = slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)
        q = hidden[row, query] @ attention.q_proj.weight[here].T + attention.q_proj.bias[here]
        q = q * cos[row, 0, query] + rotate_half(q) * sin[row, 0, query]
        k = hidden @ attention.k_proj.weight[there].T + attention.k_proj.bias[there]
        k = (k * cos[:, 0] + rotate_half(k) * sin[:, 0])[row]
        scores = torch.einsum("nd,ntd->nt", q, k) * size**-0.5
        allowed = mask[row, 0, query]
        scores = scores.masked_fill(~allowed, -1e9)
        goal = targets * allowed
        missed = -((goal / goal.sum(1, keepdim=True)) * scores.log_softmax(1)).sum(1)
        total = total + WEIGHT.get(number, 1.0) * missed.sum()
        count += len(missed)
    return total / max(count, 1)
