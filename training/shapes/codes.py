"""The code by which vision and language are taught apart: what an image token should say about the shape centred in it.

Stage one teaches the vision tower to write this code; stage two teaches the language model to read it without drawing a
single image; stage three trains both together and lets them drift. Fixed orthonormal directions of the hidden space.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import COLOURS, KINDS

K, C, N = len(KINDS), len(COLOURS), 3  # N: dx, dy in the cell; size
EMPTY, PRESENT, KIND, COLOUR, NUMBER = 0, 1, 2, 2 + K, 2 + K + C
WIDTH = NUMBER + N
ROWS = [*range(NUMBER + 2), NUMBER + 4]  # of the random basis
SCALE = 4.0  # length of one direction's unit in the hidden space
SHARPNESS = 8.0  # logit of one unit: a clean code is read with probability 0.998


def basis(hidden: int) -> Tensor:
    """Orthonormal rows [WIDTH, hidden], the same on every machine run."""
    generator = torch.Generator().manual_seed(20)
    return torch.linalg.qr(torch.randn(hidden, hidden, generator=generator, dtype=torch.float64))[0][ROWS].float()


EDGE = 0.75  # beyond this |dx| or |dy| (of 1 at the cell's border) the neighbouring cell may hold the shape as well


def place(
    marks: list[Tensor], numbers: list[Tensor], columns: int, presence: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Move shapes near a border to whichever adjoining free cell already claims them most.

    presence: [batch, cells] logits. No tower can tell a centre's side of a border to a fraction of a pixel; what later
    stages need is that exactly one cell speaks for a shape, so the loss takes the assignment that is nearest.
    """
    moved, shifted = [], []
    for row, (mark, number) in enumerate(zip(marks, numbers, strict=True)):
        mark, number = mark.clone(), number.clone()
        taken = set(mark[:, 0].tolist())
        for i in range(len(mark)):
            cell, (dx, dy) = int(mark[i, 0]), number[i, :2].tolist()
            across = (0,) if abs(dx) < EDGE else (0, 1 if dx > 0 else -1)
            down = (0,) if abs(dy) < EDGE else (0, 1 if dy > 0 else -1)
            options = [(cell, 0, 0)]
            for x in across:
                for y in down:
                    other = cell + y * columns + x
                    inside = 0 <= cell % columns + x < columns and 0 <= other < presence.shape[1]
                    if (x or y) and inside and other not in taken:
                        options.append((other, x, y))
            if len(options) > 1:
                best, x, y = max(options, key=lambda option: float(presence[row, option[0]]))
                taken.discard(cell)
                taken.add(best)
                mark[i, 0] = best
                number[i, 0] -= 2 * x
                number[i, 1] -= 2 * y
        moved.append(mark)
        shifted.append(number)
    return moved, shifted


def write(cell_count: int, marks: list[Tensor], numbers: list[Tensor]) -> Tensor:
    """Codes [batch, cells, WIDTH] of scenes given as (cell, kind, colour) rows and (dx, dy, size) rows."""
    code = torch.zeros(len(marks), cell_count, WIDTH)
    code[:, :, EMPTY] = 1
    for row, (mark, number) in enumerate(zip(marks, numbers, strict=True)):
        cell, kind, colour = mark.unbind(1)
        code[row, cell, EMPTY] = 0
        code[row, cell, PRESENT] = 1
        code[row, cell, KIND + kind] = 1
        code[row, cell, COLOUR + colour] = 1
        code[row, cell, NUMBER:] = number * 0.5
    return code


def tokens(code: Tensor, directions: Tensor) -> Tensor:
    """Image tokens [..., hidden] that carry the codes [..., WIDTH]."""
    return code @ directions * SCALE


def read(image_tokens: Tensor, directions: Tensor) -> Tensor:
    """Codes [..., WIDTH] that image tokens [..., hidden] carry."""
    return image_tokens @ directions.T / SCALE


def target(batch: dict, image_tokens: Tensor, directions: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Codes [batch, cells, WIDTH] that `image_tokens` should carry for a fed batch's scenes, and the marks so
    placed."""
    with torch.no_grad():
        got = read(image_tokens, directions)
        presence = got[..., PRESENT] - got[..., EMPTY]
    marks, numbers = ([torch.from_numpy(a) for a in batch[key]] for key in ("marks", "numbers"))
    marks, numbers = place(marks, numbers, batch["grid"][1], presence)
    return write(image_tokens.shape[1], marks, numbers), marks


def loss(image_tokens: Tensor, directions: Tensor, target: Tensor) -> tuple[Tensor, dict[str, float]]:
    """How far tokens are from saying the code: presence, kind and colour as probabilities, all of it as numbers."""
    got = read(image_tokens, directions)
    here = target[..., PRESENT] > 0.5
    presence = F.binary_cross_entropy_with_logits(
        SHARPNESS * (got[..., PRESENT] - got[..., EMPTY]), target[..., PRESENT], reduction="none"
    )
    kind = F.cross_entropy(SHARPNESS * got[here][:, KIND:COLOUR], target[here][:, KIND:COLOUR].argmax(1))
    colour = F.cross_entropy(SHARPNESS * got[here][:, COLOUR:NUMBER], target[here][:, COLOUR:NUMBER].argmax(1))
    square = ((got - target) ** 2).sum(-1)
    ghost = (image_tokens - tokens(got, directions)).pow(2).mean()  # nothing outside the code's directions
    total = 3 * presence.mean() + kind + colour + square[here].mean() + square[~here].mean() + 0.02 * ghost
    with torch.no_grad():
        found = (got[..., PRESENT] > got[..., EMPTY]) == here
        scene_right = found.all(-1).float().mean().item()
        right_kind = (
            (got[here][:, KIND:COLOUR].argmax(1) == target[here][:, KIND:COLOUR].argmax(1)).float().mean().item()
        )
        right_colour = (
            (got[here][:, COLOUR:NUMBER].argmax(1) == target[here][:, COLOUR:NUMBER].argmax(1)).float().mean().item()
        )
    return total, {"loss": total.item(), "presence_scene": scene_right, "kind": right_kind, "colour": right_colour}
