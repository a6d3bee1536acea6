"""What the kernels are told of a step: a table of int64, and tables that it points to."""

from __future__ import annotations

from enum import IntEnum


class Field(IntEnum):
    """What the table holds at each place. Sizes and distances count elements, pointers are addresses."""

    LOOK_COUNTER = 0  # both counters start at zero
    FINISH_COUNTER = 1
    LOOKS = 2  # pieces of work of `look`
    STORED = 3  # tokens whose keys and values are to be stored, from the first on
    BEGIN = 4  # tokens [BEGIN, END) are to be finished
    END = 5
    NODES = 6  # pointer to int64 [stretches, 3]: keys, values, distance of heads, in the layer at hand
    QUERY = 7  # pointer to float32, tokens QUERY_STEP apart, heads one after the other
    QUERY_STEP = 8
    KEY = 9  # the tokens' new keys and values
    KEY_STEP = 10
    VALUE = 11
    VALUE_STEP = 12
    POOL_KEYS = 13  # float32 [rows, d]
    POOL_VALUES = 14
    OUT = 15  # float32 [tokens, heads * d]
    ITEMS = 16  # pointer to int64 [LOOKS, len(Item)]
    PARTS = 17  # int64 [stretches, len(Part)]
    POOL_ROWS = 18  # int64 [tokens, kv_heads]: where a token's new keys and values go
    VISIBLE = 19  # int64 [tokens]: keys of the token's own tail that it may see, the last of them its own
    MASK_ROWS = 20  # int64 [tokens]: row of MASKS, or -1
    MASKS = 21  # uint8 [rows, MASK_WIDTH]: 0 for a key among VISIBLE that may not be seen
    MASK_WIDTH = 22
    SEEN = 23  # int64 [tokens + 1]: token t sees the stretches SEEN_PARTS[SEEN[t] : SEEN[t + 1]]
    SEEN_PARTS = 24
    PARTIAL = 25  # pointer to float32: what `look` found
    BARRIER = 26  # pointer to a function that returns when all threads have called it; 0 for a lone thread


class Item(IntEnum):
    """A piece of work of `look`: rows [ROW, ROW + ROWS) of one key-value head over keys [BEGIN, END). Row
    token * group + g is query head g of that token in the head's group."""

    PART = 0
    HEAD = 1
    ROW = 2
    ROWS = 3
    BEGIN = 4
    END = 5
    HEIGHT = 6  # rows that it has room for in PARTIAL
    PLACE = 7  # in PARTIAL: output [HEIGHT, d], maxima [HEIGHT], sums [HEIGHT]


class Part(IntEnum):
    """How a stretch was cut: its pieces leave HEIGHT * (d + 2) float32 each in PARTIAL, from PLACE on, in the order
    [head, chunk of keys, block of rows]."""

    FIRST_ROW = 0
    PLACE = 1
    CHUNKS = 2
    BLOCKS = 3
    HEIGHT = 4
