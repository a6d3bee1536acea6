"""Lays conversations out for training: each image once, many questions behind it that cannot see each other.

A row is a prefix (system prompt, image) and segments; a segment sees the prefix and itself, or itself alone (text
without an image). Positions are Qwen2-VL's M-RoPE, each segment starting where the prefix ends.
"""

from dataclasses import dataclass, field

import numpy as np

from . import guide, questions
from .tokenizer import CHATTER, DEFAULT_SYSTEM, NO_IMAGE, OFF_TOPIC, SYSTEMS, Words

ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
NEXT_TURN = "\n<|im_start|>user\n"
LOOKUPS = {"colour": 3, "kind": 4, "exists": 3, "count_colour": 1, "count_kind": 1, "missing": 0.3}
MIXED = {
    "colour": 1.0, "kind": 1.2, "count_all": 1.3, "count_kind": 1.4, "count_colour": 1.2, "count_pair": 0.8,
    "exists": 1.2,
    "policy": 1.2, "where": 0.9, "relation": 0.5, "extreme": 0.8, "describe": 2.0, "missing": 0.25,
}  # fmt: skip

HARD = {
    "colour": 0.5, "kind": 0.6, "count_all": 1.6, "count_kind": 2.0, "count_colour": 1.8, "count_pair": 0.7,
    "exists": 0.9, "policy": 0.9, "where": 0.1, "relation": 0.1, "extreme": 0.4, "describe": 3.0, "missing": 0.2,
}  # fmt: skip

LISTS = {
    "colour": 0.5, "kind": 0.6, "count_all": 1.4, "count_kind": 1.4, "count_colour": 1.4, "count_pair": 1.0,
    "exists": 0.9, "policy": 0.9, "where": 0.1, "relation": 0.1, "extreme": 0.3, "describe": 5.0, "missing": 0.2,
}  # fmt: skip

AMOUNT = 4.0  # loss weight of how many in a description against its other tokens: the hardest to learn
WEIGHTS = {"lists": LISTS, "lookups": LOOKUPS, "mixed": MIXED, "hard": HARD}


@dataclass(frozen=True)
class Guided:
    """Where a token should look from its place `query`: at words (places by head) and at shapes (indices by head).

    counting: whether the answer is how many; at_once: whether layer LOOK already counts, as the question names what.
    """

    query: int
    words: list[list[int]] | None
    shapes: tuple[list[int], list[int]]
    counting: bool
    at_once: bool


@dataclass
class Row:
    """One image's tokens. Lists run over tokens; loss is the weight of predicting that very token."""

    ids: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)  # 0: prefix
    sees_prefix: list[bool] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    types: list[str] = field(default_factory=list)  # question type of each answer token, else ""
    guides: list[Guided] = field(default_factory=list)
    heavy: set[int] = field(default_factory=set)  # places of tokens whose loss counts AMOUNT times
    segments: int = 0
    after: int = 0  # first position behind the prefix

    def add(self, ids, segment: int, start: int, sees: bool = True, kind: str = "") -> int:
        """Append text at positions from `start`; a kind marks an answer. Returns the next position."""
        weight = len(ids) ** -0.5 if kind else 0.0
        for offset, token in enumerate(ids):
            self.ids.append(token)
            self.positions.append((start + offset,) * 3)
            self.segment.append(segment)
            self.sees_prefix.append(sees)
            self.loss.append(weight)
            self.types.append(kind)
        return start + len(ids)

    def cut(self, length: int) -> None:
        """Forget the last segment if the row became longer than `length`."""
        if len(self.ids) > length and self.segments > 1:
            first = self.segment.index(self.segments)
            self.guides = [guided for guided in self.guides if guided.query < first]
            for tokens in (self.ids, self.positions, self.segment, self.sees_prefix, self.loss, self.types):
                del tokens[first:]
            self.segments -= 1

    def add_image(self, grid: tuple[int, int], pad: int, start: int) -> int:
        for row in range(grid[0]):
            for column in range(grid[1]):
                self.ids.append(pad)
                self.positions.append((start, start + row, start + column))
        count = grid[0] * grid[1]
        self.segment += [0] * count
        self.sees_prefix += [True] * count
        self.loss += [0.0] * count
        self.types += [""] * count
        return start + max(grid)


def rough(text: str, rng: np.random.Generator) -> str:
    """Now and then the same question typed carelessly."""
    dice = rng.random()
    if dice < 0.06:
        return text.lower()
    if dice < 0.10:
        return text.rstrip("?.")
    if dice < 0.13:
        return text.lower().rstrip("?.")
    if dice < 0.17:
        return text.upper()
    if dice < 0.22 and len(text) > 6:
        at = int(rng.integers(1, len(text) - 2))
        slips = (text[at + 1] + text[at], text[at], text[at] + text[at] + text[at + 1])  # swapped, dropped, doubled
        return text[:at] + slips[int(rng.integers(3))] + text[at + 2 :]
    if dice < 0.23:
        return text + " Please answer briefly."
    return text


def draw_question(shapes, size, rng: np.random.Generator, weights: dict[str, float]) -> questions.Question:
    names, values = list(weights), np.array(list(weights.values()))
    values = values / values.sum()
    while True:
        question = questions.ask(names[rng.choice(len(names), p=values)], shapes, size, rng)
        if question is not None and not _held_out(question):
            return question


def _held_out(question: questions.Question) -> bool:
    words = question.text.lower()
    return any(f"{colour} {kind}" in words for colour, kind in questions.HELD_OUT)


def pack_row(
    words: Words, shapes, size, grid, rng: np.random.Generator, weights: dict[str, float], length: int, variety: float
) -> Row:
    """One image with as many questions as `length` tokens hold; `variety` is the share of unusual conversations."""
    row = Row()
    user, close = words.encode("user\n"), words.encode(ASSISTANT)
    end, opening = (words.ids["<|im_end|>"],), (words.ids["<|im_start|>"],)
    system = DEFAULT_SYSTEM if rng.random() > 0.5 * variety else SYSTEMS[rng.integers(len(SYSTEMS))]
    at = row.add(words.encode(f"<|im_start|>system\n{system}<|im_end|>\n"), 0, 0)
    at = row.add(opening + user, 0, at)

    def asked() -> questions.Question:
        return draw_question(shapes, size, rng, weights)

    question_first = rng.random() < 0.5 * variety
    if question_first:
        question = asked()
        at = row.add(words.encode(rough(question.text, rng) + (" " if rng.random() < 0.2 else "")), 0, at)
    at = row.add((words.ids["<|vision_start|>"],), 0, at)
    at = row.add_image(grid, words.ids["<|image_pad|>"], at)
    at = row.add((words.ids["<|vision_end|>"],), 0, at)
    if question_first:
        at = row.add(close, 0, at)
        _guide(row, words, question, shapes, 0)
        at = row.add(words.encode(question.answer) + end, 0, at, kind=question.type)
    row.after = at
    while len(row.ids) < length:
        row.segments += 1
        segment, at = row.segments, row.after
        lead = NEXT_TURN if question_first else "\n" if rng.random() < 0.1 * variety else ""
        if rng.random() < 0.06 * variety:
            _text_only(row, words, rng, segment, asked())
            continue
        turns = 1 if rng.random() > 0.5 * variety else int(rng.integers(2, 5))
        for turn in range(turns):
            if rng.random() < 0.02:
                text, answer, kind = CHATTER[rng.integers(len(CHATTER))], OFF_TOPIC, "chatter"
            else:
                question = asked()
                text, answer, kind = rough(question.text, rng), question.answer, question.type
            turn_start = len(row.ids)
            at = row.add(words.encode((NEXT_TURN if turn else lead) + text), segment, at)
            at = row.add(close, segment, at)
            if kind != "chatter":
                _guide(row, words, question, shapes, turn_start)
            at = row.add(words.encode(answer) + end, segment, at, kind=kind)
    row.cut(length)
    return row


def _guide(row: Row, words: Words, question: questions.Question, shapes, start: int) -> None:
    """Note where the answer that comes next should look."""
    query = len(row.ids) - 1
    asked = range(start, len(row.ids))
    colours = [i for i in asked if row.ids[i] in words.colours]
    kinds = [i for i in asked if row.ids[i] in words.kinds]
    if question.type == "describe":
        answer = words.encode(question.answer)
        for offset, token in enumerate(guide.listing(answer, words.colours, words.kinds, shapes)):
            said = [[query + 1 + place] for place in token.said] if token.said else None
            row.guides.append(Guided(query + offset, said, (token.shapes,) * 2, token.amount, False))
            if token.amount:
                row.heavy.add(query + 1 + offset)
        return
    counting = question.type.startswith("count")
    row.guides.append(Guided(query, [colours, kinds], guide.referents(question, shapes), counting, counting))


def collate_guides(rows: list[Row], marks: list[np.ndarray], length: int, pad: int) -> dict:
    """Arrays for guide.loss by (layer, head): row [n], query [n], targets [n, length]."""
    found: dict = {}
    for number, (row, mark) in enumerate(zip(rows, marks, strict=True)):
        image = row.ids.index(pad)
        for guided in row.guides:
            for head, places in enumerate(guided.words or ()):
                if places:
                    found.setdefault((guide.READ, 2 * head), []).append((number, guided.query, places, 0.0))
            for head, chosen in enumerate(guided.shapes):
                places = [image + int(mark[i, 0]) for i in chosen]
                sinks = {guide.LOOK: guide.COUNTING if guided.at_once else float(not places)}
                if guided.counting:
                    sinks[guide.COUNT] = guide.COUNTING
                if not guided.at_once:
                    sinks[guide.AGAIN] = float(not places)
                for layer, sink in sinks.items():
                    found.setdefault((layer, 2 * head), []).append((number, guided.query, places, sink))
    arrays = {}
    for key, entries in found.items():
        targets = np.zeros((len(entries), length), dtype=np.float32)
        for i, (_, _, places, sink) in enumerate(entries):
            targets[i, places] = 1
            targets[i, guide.SINK] = sink
        arrays[key] = (np.array([e[0] for e in entries]), np.array([e[1] for e in entries]), targets)
    return arrays


def _text_only(row: Row, words: Words, rng: np.random.Generator, segment: int, question: questions.Question) -> None:
    system = DEFAULT_SYSTEM if rng.random() < 0.7 else SYSTEMS[rng.integers(len(SYSTEMS))]
    chat = rng.random() < 0.3
    text = CHATTER[rng.integers(len(CHATTER))] if chat else rough(question.text, rng)
    full = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{text}{ASSISTANT}"
    at = row.add(words.encode(full), segment, 0, sees=False)
    answer = words.encode(OFF_TOPIC if chat else NO_IMAGE)
    row.add((*answer, words.ids["<|im_end|>"]), segment, at, sees=False, kind="no_image")


def collate(rows: list[Row]) -> dict:
    """Arrays of a batch: ids [b, t], positions [3, b, t], segment [b, t] (-1: padding), sees [b, t], loss [b, t],
    types."""
    length = max(len(row.ids) for row in rows)
    batch = {
        "ids": np.zeros((len(rows), length), dtype=np.int64),
        "positions": np.zeros((3, len(rows), length), dtype=np.int64),
        "segment": np.full((len(rows), length), -1, dtype=np.int64),
        "sees": np.ones((len(rows), length), dtype=bool),
        "loss": np.zeros((len(rows), length), dtype=np.float32),
        "types": [],
    }
    for i, row in enumerate(rows):
        n = len(row.ids)
        batch["ids"][i, :n] = row.ids
        batch["positions"][:, i, :n] = np.array(row.positions).T
        batch["segment"][i, :n] = row.segment
        batch["sees"][i, :n] = row.sees_prefix
        batch["loss"][i, :n] = row.loss
        batch["loss"][i, [place for place in row.heavy if place < n]] *= AMOUNT
        batch["types"] += [kind for kind in row.types if kind]
    return batch
