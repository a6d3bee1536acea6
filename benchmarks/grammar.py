"""What it costs to hold answers to a form, over a vocabulary of Qwen's size: the start of a schema, a mask, a step.

    python -m benchmarks.grammar [--tokenizer FILE] [--text FOLDER]

llguidance is what the services use; xgrammar is measured beside it where it is installed. Both walk the same
documents. Without a tokenizer.json one is trained on the Python and text files of a folder, which takes a minute.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lm_service.engine.answer import TokenTable
from lm_service.engine.grammar import Grammars, Kind, Masks, Structure
from lm_service.engine.sampling import SamplerState, sample
from lm_service.engine.types import Sampling

VOCABULARY, WIDTH, BATCH = 151_643, 151_936, 32
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "home": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
        },
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
}
WIDE = {
    "type": "object",
    "properties": {
        f"field_{at}": {"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "null"}]} for at in range(200)
    },
    "required": [f"field_{at}" for at in range(200)],
    "additionalProperties": False,
}
DOCUMENTS = {
    "person": (
        PERSON,
        {
            "name": "Ada Lovelace of London",
            "age": 36,
            "tags": ["red", "blue"],
            "home": {"street": "12 St James's Square", "zip": "12345"},
        },
    ),
    "200 fields": (
        WIDE,
        {f"field_{at}": random.Random(at).choice(["some words here", 3.25, None]) for at in range(200)},
    ),
}


def trained(folder: Path) -> Tokenizer:
    """A byte-level BPE of VOCABULARY tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    files = [str(file) for kind in ("*.py", "*.txt", "*.md") for file in sorted(folder.rglob(kind))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<|im_end|>"])
    tokenizer.train(files[:20_000], trainer)
    return tokenizer


def milliseconds(call: Callable[[], Any], times: int = 5) -> float:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append((time.perf_counter() - began) * 1000)
    return min(found)


def walk(tokens: list[int], mask: Callable[[], Any], take: Callable[[int], Any]) -> Iterator[float]:
    for token in tokens:
        began = time.perf_counter()
        mask()
        yield (time.perf_counter() - began) * 1e6
        take(token)


def report(library: str, what: str, start: float, spent: list[float], memory: float) -> None:
    most = statistics.quantiles(spent, n=100)[98]
    mask = f"mask {statistics.median(spent):7.1f} us, p99 {most:8.1f} us"
    print(f"{library:11} {what:11} start {start:8.2f} ms   {mask}   {memory:6.1f} MB")


def resident() -> float:
    return psutil.Process().memory_info().rss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json")
    parser.add_argument(
        "--text", type=Path, default=Path(sysconfig.get_paths()["purelib"]), help="what one is trained on"
    )
    given = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(given.tokenizer)) if given.tokenizer else trained(given.text)
    end = tokenizer.token_to_id("<|im_end|>")
    added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
    pieces = TokenTable.of(tokenizer.get_vocab(), added, added).pieces
    print(f"{len(pieces)} tokens")

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    before = resident()
    began = time.perf_counter()
    grammars = Grammars(pieces, added, [end], encode)
    grammars.compile(Structure(Kind.REGEX, "a"), "")
    print(f"llguidance's vocabulary: {(time.perf_counter() - began) * 1000:.0f} ms, {resident() - before:.0f} MB")
    for what, (schema, document) in DOCUMENTS.items():
        tokens, before = encode(json.dumps(document)), resident()
        start = milliseconds(
            lambda schema=schema: Grammars._compiled(
                grammars,
                Structure(
                    Kind.JSON_SCHEMA,
                    json.dumps(
                        schema
                        | {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
                    ),
                ),
                "",
            )
        )  # type: ignore[misc]
        matcher, masks = grammars.compile(Structure(Kind.JSON_SCHEMA, json.dumps(schema)), "").matcher(), Masks(1)
        spent = list(walk(tokens, lambda matcher=matcher, masks=masks: masks.of([matcher]), matcher.take))  # type: ignore[misc]
        report("llguidance", what, start, spent, resident() - before)
    xgrammar_beside(pieces, end, encode)
    step(grammars, encode)


def xgrammar_beside(pieces: list[bytes], end: int, encode: Callable[[str], list[int]]) -> None:
    """The same by xgrammar."""
    try:
        import xgrammar
    except ImportError:
        print("xgrammar is not installed")
        return
    before, began = resident(), time.perf_counter()
    info = xgrammar.TokenizerInfo(
        pieces, vocab_type=xgrammar.VocabType.RAW, vocab_size=len(pieces), stop_token_ids=[end]
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    print(f"xgrammar's vocabulary: {(time.perf_counter() - began) * 1000:.0f} ms, {resident() - before:.0f} MB")
    bits = torch.from_numpy(np.zeros((1, (len(pieces) + 31) // 32), dtype=np.int32))
    for what, (schema, document) in DOCUMENTS.items():
        before, text = resident(), json.dumps(schema)
        start = milliseconds(lambda text=text: compiler.compile_json_schema(text, any_whitespace=False), 2)  # type: ignore[misc]
        matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(text, any_whitespace=False))
        spent = list(
            walk(
                encode(json.dumps(document)),
                lambda matcher=matcher: matcher.fill_next_token_bitmask(bits),
                matcher.accept_token,
            )
        )  # type: ignore[misc]
        report("xgrammar", what, start, spent, resident() - before)


def step(grammars: Grammars, encode: Callable[[str], list[int]]) -> None:
    """Sampling BATCH rows of WIDTH logits: free, and all held to a schema."""
    schema, document = DOCUMENTS["person"]
    grammar, tokens = (
        grammars.compile(Structure(Kind.JSON_SCHEMA, json.dumps(schema)), ""),
        encode(json.dumps(document)),
    )
    logits = torch.randn(BATCH, WIDTH)
    free, held = ([SamplerState(Sampling(100, grammar=one), ()) for _ in range(BATCH)] for one in (None, grammar))
    for number, state in enumerate(held):
        for token in tokens[: number % (len(tokens) - 2)]:
            state.append(token)
    plain, masked = milliseconds(lambda: sample(logits, free)), milliseconds(lambda: sample(logits, held))
    threads = torch.get_num_threads()
    print(f"sampling {BATCH} answers: {plain:.2f} ms free, {masked:.2f} ms held to a schema, on {threads} threads")


if __name__ == "__main__":
    main()
