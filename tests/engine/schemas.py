"""Random JSON Schemas, and random answers that a grammar lets through: what a model knows plays no part."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lm_service.engine.grammar import Grammar, Masks

FORMATS = ["date", "date-time", "time", "email", "uuid", "ipv4", "ipv6", "hostname"]
PATTERNS = ["^[a-z]{2,5}$", "^[A-Z]-[0-9]{3}$", "ab+c", "^(red|green|blue)$"]
WORDS = ["red", "green", "it's", 'a "b"', "x\ny", "naïve", "", "3"]
DEFS = {"pair": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}}


class TooComplex(Exception):
    """A bound of llguidance's was met."""


class Schemas:
    """Made of one random number generator."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def schema(self) -> dict[str, Any]:
        """A whole one, with definitions that it may refer to."""
        tree = {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}, "n": self._value(1)}}
        return {**self._value(3), "$defs": {**DEFS, "tree": tree}}

    def _value(self, depth: int) -> dict[str, Any]:
        kinds: list[Callable[[int], dict[str, Any]]] = [self._text, self._number, self._choice, self._plain]
        if depth:
            kinds += [self._object, self._object, self._array, self._any_of, self._reference]
        return self._chance.choice(kinds)(depth - 1)

    def _maybe(self, **fields: Any) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if self._chance.random() < 0.4}

    def _text(self, depth: int) -> dict[str, Any]:
        kind = self._chance.randrange(4)
        if kind == 0:
            return {"type": "string", "format": self._chance.choice(FORMATS)}
        if kind == 1:
            return {"type": "string", "pattern": self._chance.choice(PATTERNS)}
        low = self._chance.randrange(4)
        return {"type": "string", **self._maybe(minLength=low, maxLength=low + self._chance.randrange(6))}

    def _number(self, depth: int) -> dict[str, Any]:
        low = self._chance.randint(-1000, 1000) / self._chance.choice([1, 1, 10, 8])
        high = low + self._chance.randrange(1, 300)
        bounds = self._chance.choice(
            [{"minimum": low}, {"exclusiveMaximum": high}, {"minimum": low, "maximum": high}, {}]
        )
        if self._chance.random() < 0.5:
            whole = {name: int(value) for name, value in bounds.items()}
            return {"type": "integer", **(whole or self._maybe(multipleOf=self._chance.randint(2, 9)))}
        return {"type": "number", **bounds}

    def _choice(self, depth: int) -> dict[str, Any]:
        values = [*self._chance.sample(WORDS, 3), 7, -1.5, None, True, [1, "a"], {"k": 2}]
        return self._chance.choice([{"enum": self._chance.sample(values, 4)}, {"const": self._chance.choice(values)}])

    def _plain(self, depth: int) -> dict[str, Any]:
        return {"type": self._chance.choice(["boolean", "null", ["string", "null"], ["integer", "boolean"]])}

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._chance.sample(["a", "b", "long name", "é", "x_1", "n"], self._chance.randrange(1, 5))
        properties = {name: self._value(depth) for name in names}
        required = [name for name in names if self._chance.random() < 0.6]
        more = self._chance.choice([{}, {}, {"additionalProperties": False}, {"additionalProperties": self._value(0)}])
        return {"type": "object", "properties": properties, "required": required, **more}

    def _array(self, depth: int) -> dict[str, Any]:
        low = self._chance.randrange(3)
        bounds = self._maybe(minItems=low, maxItems=low + self._chance.randrange(4))
        if self._chance.random() < 0.3:
            return {"type": "array", "prefixItems": [self._value(depth), self._value(0)], "items": self._value(0)}
        return {"type": "array", "items": self._value(depth), **bounds}

    def _any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._value(depth) for _ in range(self._chance.randint(1, 3))]}

    def _reference(self, depth: int) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{self._chance.choice(['pair', 'tree'])}"}


def random_answer(
    grammar: Grammar, pieces: Sequence[bytes], chance: random.Random, most: int = 400, begun: Sequence[int] = ()
) -> str | None:
    """What follows the tokens `begun`: drawn token by token among those that may follow, those that close something
    preferred; None: not finished."""
    matcher, masks, said = grammar.matcher(), Masks(1), list[int]()
    for token in begun:
        matcher.take(token)
    while len(said) < most and not matcher.complete:
        bits = np.unpackbits(masks.of([matcher]).view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits)
        if matcher.failed:
            raise TooComplex(matcher.state.get_error()[:300])
        closing = matcher.closing(lambda token, bits=bits: bool(bits[token])) if chance.random() < 0.4 else None
        token = int(chance.choice(allowed.tolist())) if closing is None else closing
        matcher.take(token)
        if token in matcher.end_ids:
            break
        said.append(token)
        for forced in matcher.forced():
            matcher.take(forced)
            said.append(forced)
    else:
        if not matcher.complete:
            return None
    return b"".join(pieces[token] for token in said).decode()
