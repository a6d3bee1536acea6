"""What the kernels of attention are written for, and what they are told of a step. Imports no kernel.

Sizes of pointers that are no fields: `size` places of a head, `heads` query heads, `kv_heads`, and those of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from lookonce.models.kernels.structs import BYTE, FLOAT32, INT64, Struct, integer, pointer

LOG2_E = math.log2(math.e)  # e to the power of x is 2 to the power of x times that
CHUNK = 4  # tokens, or heads of tokens, that a thread takes at once


@dataclass(frozen=True)
class Heads:
    """`group` query heads of `size` places on each of `kv_heads`; `lanes` float32 make a vector, of which a block of
    rows has up to `vectors` side by side."""

    size: int
    group: int
    kv_heads: int
    lanes: int
    vectors: int

    @cached_property
    def block(self) -> int:
        """Rows of a block: query heads of tokens that see the same keys."""
        return self.lanes * self.vectors

    @cached_property
    def block_tokens(self) -> int:
        """Tokens whose rows fill a block; 0: the heads of one token are too many."""
        return self.block // self.group

    @property
    def scale(self) -> float:
        """Of scores, whose weights are powers of two."""
        return float(self.size**-0.5) * LOG2_E

    @cached_property
    def sizes(self) -> dict[str, int]:
        """By the names that shapes go by."""
        return {"size": self.size, "heads": self.group * self.kv_heads, "kv_heads": self.kv_heads}


class KVSpan(Struct):
    """Keys and values of neighbouring tokens of a prefix in one layer."""

    keys = pointer(FLOAT32, "kv_heads", "tokens", "size", step="head_step")
    values = pointer(FLOAT32, "kv_heads", "tokens", "size", step="head_step")
    tokens = integer()
    head_step = integer()  # float32 from one head to the next


class SharedItem(Struct):
    """A work item of `attend_shared`: `rows` rows of one key-value head from `row` on, over keys [begin, end) of a
    span. Row token * group + g is query head g of that token in the head's group."""

    span = integer()
    head = integer()
    row = integer()
    rows = integer()
    begin = integer()
    end = integer()
    height = integer()  # rows that it has room for in `partial`
    place = integer()  # in `partial`: output [height, size], maxima [height], sums [height]


class SharedSplit(Struct):
    """How a span was split: its work items leave height * (size + 2) float32 each in `partial`, from `place` on, in the
    order [head, chunk of keys, block of rows]."""

    first_row = integer()
    place = integer()
    chunks = integer()
    blocks = integer()
    height = integer()


class SuffixAttention(Struct):
    """Tokens of suffixes in one layer: their new keys and values are stored, and they attend. `total` tokens."""

    shared_counter = integer()  # both counters start at zero
    own_counter = integer()
    item_count = integer()  # work items of `attend_shared`
    stored = integer()  # tokens whose keys and values are to be stored, from the first on
    begin = integer()  # tokens [begin, end) attend
    end = integer()
    spans = pointer(KVSpan, "span_count")
    query = pointer(FLOAT32, "total", "heads", "size", step="query_step")
    query_step = integer()
    key = pointer(FLOAT32, "total", "kv_heads", "size", step="key_step")  # the tokens' new keys and values
    key_step = integer()
    value = pointer(FLOAT32, "total", "kv_heads", "size", step="value_step")
    value_step = integer()
    pool_keys = pointer(FLOAT32, "pool_size", "size")
    pool_values = pointer(FLOAT32, "pool_size", "size")
    out = pointer(FLOAT32, "total", "heads", "size")
    items = pointer(SharedItem, "item_count")
    splits = pointer(SharedSplit, "span_count")
    pool_rows = pointer(INT64, "total", "kv_heads")  # where a token's new keys and values go
    visible = pointer(INT64, "total")  # keys of its own suffix that a token may see, the last of them its own
    mask_rows = pointer(INT64, "total")  # row of `masks`, or -1
    masks = pointer(BYTE, "mask_count", "mask_width")  # 0 for a key among `visible` that may not be seen
    mask_width = integer()
    seen = pointer(INT64, "seen_places")  # token t sees the spans seen_spans[seen[t] : seen[t + 1]]
    seen_spans = pointer(INT64, "seen_count")
    partial = pointer(FLOAT32, "partial_count")  # what `attend_shared` found
    barrier = integer()  # address of a function that returns when all threads have called it; 0 for a lone thread


class PrefillItem(Struct):
    """A work item of `prefill`: one key-value head of `count` of the step's tokens, from `token` on. They lie in the
    span `own`, from `place` on, behind the spans [first, own)."""

    head = integer()
    token = integer()
    count = integer()
    place = integer()
    first = integer()
    own = integer()


class PrefillPlace(Struct):
    """Where a token lies: a span, and its place there."""

    span = integer()
    place = integer()


class PrefillAttention(Struct):
    """Tokens of prefixes in one layer: their new keys and values are stored, and they attend."""

    store_counter = integer()  # both counters start at zero
    attend_counter = integer()
    tokens = integer()
    item_count = integer()
    spans = pointer(KVSpan, "span_count")
    query = pointer(FLOAT32, "tokens", "heads", "size", step="query_step")
    query_step = integer()
    key = pointer(FLOAT32, "tokens", "kv_heads", "size", step="key_step")  # the tokens' new keys and values
    key_step = integer()
    value = pointer(FLOAT32, "tokens", "kv_heads", "size", step="value_step")
    value_step = integer()
    out = pointer(FLOAT32, "tokens", "heads", "size")
    items = pointer(PrefillItem, "item_count")
    places = pointer(PrefillPlace, "tokens")
    barrier = integer()  # address of a function that returns when all threads have called it; 0 for a lone thread
