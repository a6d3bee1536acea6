"""Asks an answerer about freshly drawn scenes and reports accuracy by type, held-out pairs, ROC AUC and reliability.

An answerer takes one encoded image and its questions at once, so the same evaluation runs through a gateway, through
transformers or through the lean model here:

    answer_many(image: bytes, questions: list[str]) -> list[Answer]

`one_by_one` adapts a plain answer(image, question) -> str.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import questions, scenes

NAMED = ("fresh", "held-out pairs", "jpeg", "photograph", "icon")
BUNDLED = Path(__file__).resolve().parents[2] / "lookonce" / "data" / "shapes"
FRESH = 7_000_000_000  # seeds from here on are never trained on
AT_ONCE = 4  # scenes under way at a gateway
SORTS = ("plain", "jpeg", "photograph", "icon")


@dataclass(frozen=True)
class Answer:
    """What was said, and for yes/no questions P(yes) against no, where the answerer tells."""

    text: str
    p_yes: float | None = None


AnswerMany = Callable[[bytes, Sequence[str]], Sequence[Answer]]


def one_by_one(answer: Callable[[bytes, str], str]) -> AnswerMany:
    """An `AnswerMany` from a function of one image and one question."""
    return lambda image, asked: [Answer(answer(image, question)) for question in asked]


def drawn(seed: int, sort: str = "plain", held_out: str = "never") -> tuple[scenes.Scene, bytes]:
    """A fresh scene and the bytes a user would send.

    sort: "plain" (PNG, 64 to 512 px) | "jpeg" (quality 40 to 90) | "photograph" (1200 to 2000 px JPEG) | "icon" (48
    to 64 px).
    """
    rng = np.random.default_rng([seed, 11])
    if sort == "photograph":
        side = int(rng.integers(1200, 2001))
        scene = scenes.draw(seed, size=(side, round(side * rng.uniform(0.66, 1.0))), held_out=held_out)
        return scene, scene.jpeg(85)
    if sort == "icon":
        side = int(rng.integers(48, 65))
        scene = scenes.draw(seed, int(rng.integers(1, 4)), size=(side, side), held_out=held_out, wear=False)
        return scene, scene.png()
    scene = scenes.draw(seed, held_out=held_out)
    return scene, scene.jpeg(int(rng.integers(40, 91))) if sort == "jpeg" else scene.png()


def roc_auc(scores: Sequence[float], truths: Sequence[bool]) -> float:
    """Area under the ROC curve by ranks; ties count half."""
    scores_, truths_ = np.asarray(scores, float), np.asarray(truths, bool)
    order = np.unique(scores_, return_inverse=True)[1]
    counts = np.bincount(order)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[order]
    positive = truths_.sum()
    negative = len(truths_) - positive
    if not positive or not negative:
        return float("nan")
    return float((ranks[truths_].sum() - positive * (positive + 1) / 2) / (positive * negative))


@dataclass
class Report:
    """Counts by question type, scored yes/no questions, and some wrong answers to look at."""

    asked: Counter = field(default_factory=Counter)
    right: Counter = field(default_factory=Counter)
    scored: list[tuple[float, bool]] = field(default_factory=list)
    wrong: list[dict] = field(default_factory=list)
    hits: Counter = field(default_factory=Counter)  # describe: shapes named rightly, named, there

    def add(self, seed: int, question: questions.Question, answer: Answer) -> None:
        accepted = question.accepts(answer.text)
        self.asked[question.type] += 1
        self.right[question.type] += accepted
        if question.type == "policy" and answer.p_yes is not None:
            self.scored.append((answer.p_yes, question.answer == "yes"))
        if question.type == "describe":
            said, there = questions.listed(answer.text), questions.listed(question.answer)
            self.hits.update(both=sum((said & there).values()), said=sum(said.values()), there=sum(there.values()))
        if not accepted and len(self.wrong) < 200:
            self.wrong.append(
                {"seed": seed, "question": question.text, "truth": question.answer, "answer": answer.text}
            )

    def accuracy(self) -> dict[str, float]:
        return {kind: self.right[kind] / self.asked[kind] for kind in questions.TYPES if self.asked[kind]}

    def reliability(self, bins: int = 10) -> list[dict]:
        """Per bin of P(yes): how many, mean score, share truly yes."""
        scores, truths = (np.array(column, dtype=float) for column in zip(*self.scored, strict=True))
        which = np.minimum((scores * bins).astype(int), bins - 1)
        return [
            {
                "from": round(b / bins, 2),
                "count": int((which == b).sum()),
                "mean_p_yes": round(float(scores[which == b].mean()), 4),
                "truly_yes": round(float(truths[which == b].mean()), 4),
            }
            for b in range(bins)
            if (which == b).any()
        ]

    def summary(self) -> dict:
        result: dict = {
            "accuracy": {kind: round(value, 4) for kind, value in self.accuracy().items()},
            "asked": dict(self.asked),
        }
        if self.asked["describe"]:
            named = self.hits["said"] + self.hits["there"]
            result["describe_item_f1"] = round(2 * self.hits["both"] / max(named, 1), 4)
        if self.scored:
            result["policy_auc"] = round(roc_auc(*zip(*self.scored, strict=True)), 5)
            result["policy_reliability"] = self.reliability()
        return result


def evaluate(
    answer_many: AnswerMany,
    count: int = 2000,
    seed: int = 1,
    sort: str = "plain",
    held_out: str = "never",
    types: Sequence[str] = questions.TYPES,
    at_once: int = 1,
) -> Report:
    """Ask one question of each type about `count` fresh scenes. held_out: "never" | "any" | "one" (see scenes.draw).

    With held_out="one" only questions that name or are answered by a held-out pair's shape are asked. at_once: scenes
    under way at the same time, each in a thread, for answerers that mostly wait.
    """

    def about(number: int) -> tuple[int, list[questions.Question], Sequence[Answer]]:
        scene, data = drawn(number, sort, held_out)
        asked = questions.ask_all(scene, np.random.default_rng([number, 13]), types)
        if held_out == "one":
            asked = [question for question in asked if _concerns(question, scene.shapes[0])]
        return number, asked, answer_many(data, [question.text for question in asked]) if asked else []

    report, first = Report(), FRESH + seed * 1_000_000
    with ThreadPoolExecutor(at_once) as pool:
        for done, (number, asked, answers) in enumerate(pool.map(about, range(first, first + count)), 1):
            for question, answer in zip(asked, answers, strict=True):
                report.add(number, question, answer)
            if done % 100 == 0:
                print(f"{sort} {done} of {count}", file=sys.stderr, flush=True)
    return report


FORMATS = (
    "picture first", "picture last", "own system prompt", "second turn", "lower case", "upper case",
    "two letters swapped",
)  # fmt: skip
PLAIN_TYPES = ("colour", "kind", "count_colour", "exists", "policy")


def formats(converse: Callable[[list[dict]], str], count: int = 100, seed: int = 50) -> dict[str, float]:
    """Share of right answers by the conversation's form.

    converse: from chat messages, whose content is a string or a list of strings and (image) bytes, to text.
    """
    right: Counter = Counter()
    for number in range(FRESH + seed * 1_000_000, FRESH + seed * 1_000_000 + count):
        scene, data = drawn(number)
        rng = np.random.default_rng([number, 19])
        types = PLAIN_TYPES[number % 5], PLAIN_TYPES[(number + 2) % 5]
        first, second = (questions.ask(kind, scene.shapes, scene.image.size, rng) for kind in types)
        if first is None or second is None:
            first, second = (questions.ask("policy", scene.shapes, scene.image.size, rng) for _ in range(2))
        user = {"role": "user", "content": [data, first.text]}
        chats = (
            [user],
            [user | {"content": [first.text, data]}],
            [{"role": "system", "content": "You inspect pictures. Be brief."}, user],
            [user | {"content": [data, second.text]}, *_turn(second.answer, first.text)],
            [user | {"content": [data, first.text.lower()]}],
            [user | {"content": [data, first.text.upper()]}],
            [user | {"content": [data, _slip(first.text, rng)]}],
        )
        for name, chat in zip(FORMATS, chats, strict=True):
            right[name] += first.accepts(converse(chat))
    return {name: round(right[name] / count, 4) for name in FORMATS}


def _slip(text: str, rng: np.random.Generator) -> str:
    """The text with two neighbouring letters swapped."""
    at = int(rng.integers(1, len(text) - 2))
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def _turn(answer: str, question: str) -> list[dict]:
    return [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]


def _concerns(question: questions.Question, shape: scenes.Shape) -> bool:
    words = questions.normal(question.text + " " + question.answer)
    names = (f"{shape.colour} {shape.kind}", f"{shape.colour} {questions.PLURAL[shape.kind]}")
    lookup = question.type in ("colour", "kind") and shape.colour in words and shape.kind in words
    return lookup or any(name in words for name in names)


def table(rows: Iterable[tuple[str, dict]]) -> str:
    """Markdown table of accuracies: one column per named summary."""
    named = list(rows)
    lines = ["| type | " + " | ".join(name for name, _ in named) + " |", "|---" * (len(named) + 1) + "|"]
    for kind in questions.TYPES:
        values = [summary["accuracy"].get(kind) for _, summary in named]
        if any(value is not None for value in values):
            cells = ("" if value is None else f"{100 * value:.1f}" for value in values)
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def whole(answer_many: AnswerMany, count: int, seed: int, at_once: int = 1) -> dict[str, dict]:
    """The evaluation that the model card quotes: fresh scenes, held-out pairs, and worn images."""
    results = {"fresh": evaluate(answer_many, count, seed, at_once=at_once)}
    some = max(count // 5, 20)
    results["held-out pairs"] = evaluate(answer_many, some, seed + 1, held_out="one", at_once=at_once)
    for offset, sort in enumerate(SORTS[1:]):
        results[sort] = evaluate(answer_many, max(count // 10, 20), seed + 2 + offset, sort=sort, at_once=at_once)
    summaries = {name: report.summary() for name, report in results.items()}
    summaries["fresh"]["wrong"] = results["fresh"].wrong[:60]
    return summaries


def asked_of(args: argparse.Namespace) -> tuple[AnswerMany, Callable[[list[dict]], str], Callable[[], dict]]:
    """How to ask about an image, how to converse, and what there is to tell of the answerer afterwards."""
    from .answerers import Lean, Transformers
    from .served import Compared, Gateway

    if not args.gateway:
        return Lean(args.checkpoint), Transformers(args.checkpoint).converse, lambda: {"asked": "the lean model"}
    gateway = Gateway(args.gateway)
    if not args.unsplit:
        return gateway, gateway.converse, lambda: {"asked": "a gateway"}
    both = Compared(gateway, Transformers(args.checkpoint))
    return both, both.converse, lambda: {"asked": "a gateway", "unsplit": both.summary()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED, help="checkpoint folder as export writes it")
    parser.add_argument("--gateway", metavar="URL", help="ask a running gateway that serves this checkpoint")
    parser.add_argument(
        "--unsplit", action="store_true", help="compare each of the gateway's answers with plain transformers'"
    )
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument(
        "--conversations", type=int, default=100, help="scenes for the conversation forms (gateway or transformers)"
    )
    args = parser.parse_args()
    if args.unsplit and not args.gateway:
        parser.error("--unsplit compares a gateway's answers: name it with --gateway")
    answer_many, converse, told = asked_of(args)
    summaries = whole(answer_many, args.scenes, args.seed, AT_ONCE if args.gateway else 1)
    if args.conversations:
        summaries["formats"] = formats(converse, args.conversations)
        summaries["conversations"] = args.conversations
    summaries["system"] = told()
    if args.out:
        args.out.write_text(json.dumps(summaries, indent=1) + "\n", encoding="utf-8")
    print(table((name, summary) for name, summary in summaries.items() if name in NAMED))
    fresh = summaries["fresh"]
    print(summaries.get("formats", ""))
    print(summaries["system"])
    print({key: fresh[key] for key in ("describe_item_f1", "policy_auc", "policy_reliability")})


if __name__ == "__main__":
    main()
