"""Random-weight checkpoints of Qwen3-VL's true architecture: `lookonce.models.qwen2_vl.synthetic` with its sizes.

`python -m lookonce.models.qwen3_vl.synthetic OUT --size tiny` writes one; `moe-tiny`, `30b-a3b` ... have experts.
"""

from __future__ import annotations

from functools import partial

from lookonce.models.qwen2_vl import synthetic
from lookonce.models.qwen3_vl.architecture import MOE_SIZES, SIZES

ALL_SIZES = {**SIZES, **MOE_SIZES}
make_random_checkpoint = partial(synthetic.make_random_checkpoint, sizes=ALL_SIZES)

if __name__ == "__main__":
    synthetic.main(sizes=ALL_SIZES)
