"""Asks questions about scenes, knows their answers, and judges what a model said.

Needs only a scene's shapes and size. Every type has eight phrasings or more; `ask_all` gives one question of each
type that the scene allows without ambiguity.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .scenes import COLOURS, HELD_OUT, KINDS, Shape

PLURAL = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
REGIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")

PHRASES = {
    "colour": (
        "What colour is the {k}?", "What color is the {k}?", "Which colour is the {k}?", "Which color is the {k}?",
        "What is the colour of the {k}?", "What is the color of the {k}?", "Tell me the colour of the {k}.",
        "Tell me the color of the {k}.", "Name the color of the {k}.", "The {k} is what colour?",
        "What colour does the {k} have?", "What's the color of the {k}?", "The colour of the {k}?",
    ),
    "kind": (
        "What shape is the {c} object?", "What shape is {c}?", "Which shape is {c}?", "What is the {c} shape?",
        "What kind of shape is the {c} one?", "What is the shape of the {c} object?", "Name the {c} shape.",
        "What is the {c} object?", "Which shape is the {c} one?", "What {c} shape is there?",
        "Tell me the shape of the {c} object.", "What is the {c} thing?", "What shape does the {c} object have?",
    ),
    "count_all": (
        "How many shapes are there?", "How many objects are there?", "How many shapes are in the image?",
        "How many objects are in the picture?", "Count the shapes.", "Count the objects.",
        "What is the number of shapes?", "How many shapes do you see?", "How many things are in this image?",
        "How many shapes can you see in this picture?", "How many shapes are there in total?",
        "How many objects does the image contain?",
    ),
    "count_kind": (
        "How many {ks} are there?", "How many {ks} are in the image?", "Count the {ks}.", "How many {ks} do you see?",
        "What is the number of {ks}?", "How many {ks} are in the picture?", "How many {ks} does the image contain?",
        "How many {ks} can you see?", "How many of the shapes are {ks}?", "Number of {ks}?",
    ),
    "count_colour": (
        "How many {c} shapes are there?", "How many {c} objects are there?", "How many shapes are {c}?",
        "Count the {c} shapes.", "How many {c} objects are in the image?", "How many objects are {c}?",
        "How many {c} things do you see?", "What is the number of {c} shapes?", "How many of the shapes are {c}?",
        "How many {c} shapes are in the picture?", "Number of {c} objects?",
    ),
    "count_pair": (
        "How many {c} {ks} are there?", "How many {c} {ks} are in the image?", "Count the {c} {ks}.",
        "How many {c} {ks} do you see?", "What is the number of {c} {ks}?", "How many {c} {ks} can you see?",
        "How many {c} {ks} are in the picture?", "How many {c} {ks} does the image contain?",
    ),
    "exists": (
        "Is there {a}?", "Is there {a} in the image?", "Is there {a} in the picture?", "Can you see {a}?",
        "Do you see {a}?", "Does the image contain {a}?", "Does the picture show {a}?", "Is {a} in the image?",
        "Is there {a} here?", "Is {a} present?", "Do you see {a} in this image?", "Is there {a} in this picture?",
    ),
    "policy": (
        "Does this image contain {a}? Answer yes or no.", "Does the image contain {a}? Answer yes or no.",
        "Does this picture contain {a}? Answer yes or no.", "Does this image show {a}? Answer with yes or no.",
        "Answer yes or no: is there {a} in this image?", "Answer yes or no: does this image contain {a}?",
        "Is there {a} in this image? Answer yes or no.", "Is there {a} in the picture? Reply with yes or no.",
        "Yes or no: does the picture contain {a}?", "Does this image violate the rule: no {x}? Answer yes or no.",
        "Policy: no {x} allowed. Does this image break it? Answer yes or no.",
        "Does this photo contain {a}? Yes or no?",
    ),
    "where": (
        "Where is the {o}?", "Where is the {o} in the image?", "Where in the picture is the {o}?",
        "In which part of the image is the {o}?", "What is the position of the {o}?", "Where do you see the {o}?",
        "Where can I find the {o}?", "Which part of the picture holds the {o}?", "Location of the {o}?",
    ),
    "relation": (
        "Is the {o} {r} the {p}?", "Is the {o} located {r} the {p}?", "Does the {o} lie {r} the {p}?",
        "Is the {o} {r} the {p}? Answer yes or no.", "Can you see the {o} {r} the {p}?",
        "Answer yes or no: is the {o} {r} the {p}?",
        "Is it true that the {o} is {r} the {p}?", "Yes or no: is the {o} {r} the {p}?",
    ),
    "extreme": (
        "What is the {e} shape?", "Which shape is the {e}?", "Which object is the {e}?", "What is the {e} object?",
        "Name the {e} shape.", "Which shape is {e}?", "What is the {e} thing in the image?", "Tell me the {e} shape.",
        "Which is the {e} object in the picture?",
    ),
    "describe": (
        "Describe the image.", "Describe this image.", "Describe the picture.", "Describe this picture.",
        "What is in the image?", "What is in this picture?", "What do you see?", "What shapes are in the image?",
        "List the shapes.", "List all shapes in the picture.", "What does the image show?", "What objects are there?",
        "Describe the image in one sentence.", "Describe what you see.", "What can you see in this image?",
    ),
}  # fmt: skip
TYPES = tuple(PHRASES)
BIGGEST, SMALLEST = ("biggest", "largest"), ("smallest",)
RELATIONS = {
    "left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
    "above": ("above", "higher than"), "below": ("below", "lower than", "under"),
}  # fmt: skip


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def normal(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[^a-z0-9 ]", " ", text.lower())).strip()


def listed(text: str) -> Counter:
    """The multiset of (colour, kind) that a description names, however it is punctuated."""
    found: Counter = Counter()
    singular = {plural: kind for kind, plural in PLURAL.items()} | {kind: kind for kind in KINDS}
    words = normal(text).split()
    for i in range(1, len(words)):
        if words[i] in singular and words[i - 1] in COLOURS:
            before = words[i - 2] if i >= 2 else "a"
            amount = int(before) if before.isdigit() else NUMBERS.index(before) if before in NUMBERS else 1
            found[words[i - 1], singular[words[i]]] += amount
    return found


def describe(shapes: Sequence[Shape]) -> str:
    """One sentence, colours in COLOURS' order, then kinds in KINDS' order: 'A red circle, two blue stars.'"""
    counts = Counter((COLOURS.index(s.colour), KINDS.index(s.kind)) for s in shapes)
    parts = []
    for (colour, kind), amount in sorted(counts.items()):
        word = f"{COLOURS[colour]} {KINDS[kind]}"
        parts.append(article(word) if amount == 1 else f"{NUMBERS[amount]} {COLOURS[colour]} {PLURAL[KINDS[kind]]}")
    text = ", ".join(parts) + "."
    return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Question:
    """A question of one type, its true answer, and the answers between which a model chooses (empty: free text)."""

    type: str
    text: str
    answer: str
    choices: tuple[str, ...] = ()
    about: dict = field(default_factory=dict)

    def accepts(self, text: str) -> bool:
        """Whether `text` is right: the same words whatever case and punctuation; a description by its multiset."""
        if self.type == "describe":
            return listed(text) == listed(self.answer)
        said = normal(text)
        if said in NUMBERS:
            said = str(NUMBERS.index(said))
        return said == normal(self.answer)


def _pick(rng: np.random.Generator, items: Sequence):
    return items[int(rng.integers(len(items)))]


def _question(
    kind: str, rng: np.random.Generator, answer: str, choices: tuple[str, ...] = (), **words: str
) -> Question:
    return Question(kind, _pick(rng, PHRASES[kind]).format(**words), answer, choices, words)


def _lookup(shapes, rng, kind: str) -> Question | None:
    """Colour of a kind or kind of a colour, where every shape so named agrees."""
    given, wanted, names = ("kind", "colour", COLOURS) if kind == "colour" else ("colour", "kind", KINDS)
    values: dict[str, set] = {}
    for shape in shapes:
        values.setdefault(getattr(shape, given), set()).add(getattr(shape, wanted))
    clear = sorted(key for key, found in values.items() if len(found) == 1)
    if not clear:
        return None
    key = _pick(rng, clear)
    return _question(kind, rng, next(iter(values[key])), names, **{"k" if kind == "colour" else "c": key})


def _missing(shapes, rng) -> Question:
    """A lookup of what is not there; asked in training so that the model says so."""
    kinds = [k for k in KINDS if all(s.kind != k for s in shapes)]
    if not kinds:
        colours = [c for c in COLOURS if all(s.colour != c for s in shapes)]
        colour = _pick(rng, colours or COLOURS)
        return Question("missing", _pick(rng, PHRASES["kind"]).format(c=colour), f"There is no {colour} shape.")
    kind = _pick(rng, kinds)
    return Question("missing", _pick(rng, PHRASES["colour"]).format(k=kind), f"There is no {kind}.")


def _count(shapes, rng, kind: str) -> Question:
    choices = tuple(str(n) for n in range(10))
    if kind == "count_all":
        return _question(kind, rng, str(len(shapes)), choices)
    shape = _pick(rng, shapes)
    colour, sort = shape.colour, shape.kind
    if rng.random() < (0.2 if kind != "count_pair" else 0.35):
        colour, sort = _absent(rng, shapes, "pair" if kind == "count_pair" else "any")
    if kind == "count_kind":
        return _question(kind, rng, str(sum(s.kind == sort for s in shapes)), choices, ks=PLURAL[sort])
    if kind == "count_colour":
        return _question(kind, rng, str(sum(s.colour == colour for s in shapes)), choices, c=colour)
    amount = sum((s.colour, s.kind) == (colour, sort) for s in shapes)
    return _question(kind, rng, str(amount), choices, c=colour, ks=PLURAL[sort])


def _absent(rng, shapes, level: str) -> tuple[str, str]:
    """A (colour, kind) to ask about that probably is not there; half the time both occur, but apart."""
    here = {(s.colour, s.kind) for s in shapes}
    for _ in range(20):
        if level == "pair" and rng.random() < 0.6:
            pair = (_pick(rng, shapes).colour, _pick(rng, shapes).kind)
        elif level == "pair" and rng.random() < 0.5:
            one = _pick(rng, shapes)
            pair = (one.colour, _pick(rng, KINDS)) if rng.random() < 0.5 else (_pick(rng, COLOURS), one.kind)
        else:
            pair = (_pick(rng, COLOURS), _pick(rng, KINDS))
        if pair not in here and pair not in HELD_OUT:
            return pair
    return pair


def _exists(shapes, rng, kind: str) -> Question:
    level = _pick(rng, ("pair", "pair", "kind", "colour"))
    if rng.random() < 0.5:
        one = _pick(rng, shapes)
        colour, sort = one.colour, one.kind
    elif level == "pair":
        colour, sort = _absent(rng, shapes, "pair")
    else:
        colour = _pick(rng, [c for c in COLOURS if all(s.colour != c for s in shapes)] or COLOURS)
        sort = _pick(rng, [k for k in KINDS if all(s.kind != k for s in shapes)] or KINDS)
    if level == "pair":
        named, plural = f"{colour} {sort}", f"{colour} {PLURAL[sort]}"
        truth = any((s.colour, s.kind) == (colour, sort) for s in shapes)
    elif level == "kind":
        named, plural, truth = sort, PLURAL[sort], any(s.kind == sort for s in shapes)
    else:
        noun = _pick(rng, ("shape", "object"))
        named, plural, truth = f"{colour} {noun}", f"{colour} {noun}s", any(s.colour == colour for s in shapes)
    return _question(kind, rng, "yes" if truth else "no", ("yes", "no"), a=article(named), x=plural)


def _unique(shapes) -> list[tuple[str, Shape]]:
    """Every name (kind alone, or colour and kind) that picks out exactly one shape."""
    kinds, pairs = Counter(s.kind for s in shapes), Counter((s.colour, s.kind) for s in shapes)
    names = [(s.kind, s) for s in shapes if kinds[s.kind] == 1]
    return names + [(f"{s.colour} {s.kind}", s) for s in shapes if pairs[s.colour, s.kind] == 1]


def _where(shapes, rng, size: tuple[int, int]) -> Question | None:
    """Ninth of the image, asked only where the centre is clearly inside one."""
    found = []
    for name, shape in _unique(shapes):
        x, y = shape.cx / size[0] * 3, shape.cy / size[1] * 3
        if all(abs(v - edge) > 0.18 for v in (x, y) for edge in (1, 2)):
            found.append((name, REGIONS[min(int(y), 2) * 3 + min(int(x), 2)]))
    if not found:
        return None
    name, region = _pick(rng, found)
    return _question("where", rng, region, REGIONS, o=name)


def _relation(shapes, rng, size: tuple[int, int]) -> Question | None:
    names = _unique(shapes)
    relation = _pick(rng, tuple(RELATIONS))
    pairs = []
    for name, one in names:
        for other_name, other in names:
            gap = (other.cx - one.cx) / size[0] if relation in ("left", "right") else (other.cy - one.cy) / size[1]
            if one is not other and abs(gap) > 0.12:
                pairs.append((name, other_name, (gap > 0) == (relation in ("left", "above"))))
    if not pairs:
        return None
    name, other_name, truth = _pick(rng, pairs)
    words = {"o": name, "p": other_name, "r": _pick(rng, RELATIONS[relation])}
    return _question("relation", rng, "yes" if truth else "no", ("yes", "no"), **words)


def _extreme(shapes, rng) -> Question | None:
    if len(shapes) < 2:
        return None
    ranked = sorted(shapes, key=lambda s: s.radius)
    biggest = rng.random() < 0.5
    first, second = (ranked[-1], ranked[-2]) if biggest else (ranked[1], ranked[0])
    if first.radius < 1.25 * second.radius:
        return None
    chosen = ranked[-1] if biggest else ranked[0]
    return _question("extreme", rng, f"{chosen.colour} {chosen.kind}", e=_pick(rng, BIGGEST if biggest else SMALLEST))


def ask(kind: str, shapes: Sequence[Shape], size: tuple[int, int], rng: np.random.Generator) -> Question | None:
    """A question of a type, or None where the scene allows no unambiguous one. size: the image's (width, height)."""
    if kind in ("colour", "kind"):
        return _lookup(shapes, rng, kind)
    if kind.startswith("count"):
        return _count(shapes, rng, kind)
    if kind in ("exists", "policy"):
        return _exists(shapes, rng, kind)
    if kind == "where":
        return _where(shapes, rng, size)
    if kind == "relation":
        return _relation(shapes, rng, size)
    if kind == "extreme":
        return _extreme(shapes, rng)
    if kind == "missing":
        return _missing(shapes, rng)
    if kind == "describe":
        return _question("describe", rng, describe(shapes))
    raise ValueError(f"unknown question type {kind!r}; known: {', '.join((*TYPES, 'missing'))}")


def ask_all(scene, rng: np.random.Generator, types: Sequence[str] = TYPES) -> list[Question]:
    """One question of each type that the scene allows."""
    asked = (ask(kind, scene.shapes, scene.image.size, rng) for kind in types)
    return [question for question in asked if question is not None]
