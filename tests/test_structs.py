"""What kernels are told: nothing that they would misread, or read beyond, reaches them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.compiled import panel_linear, text_rows
from lookonce.models.kernels.structs import BYTE, FLOAT32, INT64, Along, Struct, address, addresses, integer, pointer
from lookonce.models.kernels.vision.tower_kernels import Kernels, Shape
from lookonce.models.qwen2_vl.modules import load_language_model
from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint
from lookonce.models.qwen2_vl.text import Qwen2VLAdapter


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory):
    return make_random_checkpoint(tmp_path_factory.mktemp("structs") / "tiny", size="tiny")


class Item(Struct):
    place = integer()
    count = integer()


class Table(Struct):
    rows = integer()
    width = integer()
    values = pointer(FLOAT32, "rows", "width", 2)
    which = pointer(INT64, "rows")
    shown = pointer(BYTE, "rows", "width")
    items = pointer(Item, "item_count")
    heads = pointer(FLOAT32, "rows", "head_count", "width", step="step")
    step = integer()


SIZES = {"item_count": 4, "head_count": 3}
GOOD = {
    "values": torch.empty(5, 14),
    "which": np.arange(5),
    "shown": torch.ones(5, 7, dtype=torch.bool),
    "items": Item.zeros(2, 2),
    "heads": torch.empty(5, 4, 7)[:, :3],
}


def test_fields_lie_where_they_are_declared():
    told = Table.fill(Table.one(), SIZES, rows=5, width=7, **GOOD)
    assert [field.place for field in Table.fields.values()] == list(range(8)) and len(told.tobytes()) == 64
    assert told[Table.rows.place] == 5 and told[Table.values.place] == GOOD["values"].data_ptr()
    assert told[Table.which.place] == GOOD["which"].ctypes.data
    assert told[Table.step.place] == 28, "how far rows are apart comes from the tensor"
    each = Table.fill(Table.zeros(2), rows=5, width=7, values=Along(torch.empty(2, 70)))
    assert each["values"][1] - each["values"][0] == 280
    both = Table.fill(Table.zeros(2), SIZES, rows=5, width=7, **GOOD)
    assert [list(map(int, one)) for one in both] == [told.tolist()] * 2, "one is written as many are"
    empty, still = np.empty((0, 3)), np.arange(5)
    still.flags.writeable = False
    assert (address(empty), address(still)) == (0, still.ctypes.data)
    assert addresses(both).tolist() == [both.ctypes.data, both.ctypes.data + 64]


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("values", torch.empty(5, 14, dtype=torch.float64)),
        ("values", torch.empty(5, 14, dtype=torch.bfloat16)),
        ("values", torch.empty(14, 5).t()),
        ("values", torch.empty(5, 28)[:, ::2]),
        ("values", torch.empty(5, 13)),
        ("values", torch.empty(5, 14, device="meta")),
        ("values", Along(torch.empty(2, 69))),
        ("which", np.arange(5, dtype=np.int32)),
        ("which", np.arange(10)[::2]),
        ("which", torch.arange(4)),
        ("shown", torch.ones(5, 7)),
        ("items", Item.zeros(3)),
        ("items", np.zeros(8, dtype=np.int64)),
        ("heads", torch.empty(5, 2, 7)),
        ("heads", torch.empty(4, 3, 7)),
        ("heads", torch.empty(3, 5, 7).transpose(0, 1)),
        ("heads", torch.empty(5, 3, 14)[:, :, ::2]),
    ],
)
def test_what_a_pointer_may_not_point_to_is_refused(field, wrong):
    one, many = Table.one(), Table.zeros(2)
    for table in (one, many):
        with pytest.raises(ValueError, match=rf"^{field} points to"):
            Table.fill(table, SIZES, rows=5, width=7, **{**GOOD, field: wrong})
    assert not one[Table.fields[field].place] and not many[field].any()


def test_kernels_refuse_what_they_would_read_beyond():
    """Through the doors that models use."""
    linear, rows = panel_linear(torch.zeros(64, 32)), text_rows(32, 8, 3, 1e-6, torch.zeros(1))
    x = torch.zeros(5, 32)
    for wrong in (x.double(), torch.zeros(5, 31), x.bfloat16()):
        with pytest.raises(ValueError, match="points to"):
            linear(wrong)
        with pytest.raises(ValueError, match="points to"):
            rows.norm(wrong, torch.ones(32))
    with pytest.raises(ValueError, match="points to"):
        linear.plus(x, torch.zeros(5, 63))
    with pytest.raises(ValueError, match="points to"):
        rows.rotate(torch.zeros(5, 3, 8), torch.zeros(5, 1, 3), torch.zeros(5, 1, 4))
    tower = Kernels(Shape(8, 2, 64, 1e-6))
    packed = tower.pack([4, 6], torch.zeros(10, 4), torch.zeros(10, 4))
    for wrong in (torch.zeros(9, 48), torch.zeros(10, 47), torch.zeros(10, 48).double()):
        with pytest.raises(ValueError, match="points to"):
            tower.attend(wrong, packed)
    with pytest.raises(ValueError, match="points to"):
        tower.norm(torch.zeros(10, 16), nn.LayerNorm(8))


def test_a_step_of_layers_refuses_too(checkpoint_path):
    checkpoint = open_checkpoint(str(checkpoint_path), needs=Half.LANGUAGE)
    adapter = Qwen2VLAdapter(*load_language_model(checkpoint, torch.float32))
    layers, hidden = adapter._compiled, adapter.shape.hidden
    half = adapter.shape.head_dim // 2
    good = [torch.zeros(4, hidden), torch.zeros(4, 1, half), torch.zeros(4, 1, half), torch.arange(2)]
    wrong = [torch.zeros(4, hidden - 1), torch.zeros(3, 1, half), torch.zeros(4, 1, half).double(), torch.zeros(2)]
    for place, value in enumerate(wrong):
        hidden, cos, sin, rows = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises(ValueError, match="points to"):
            layers(hidden, cos, sin, pytest.fail, rows)
    with pytest.raises(ValueError, match="5 rows of 4 tokens"):
        layers(*good[:3], pytest.fail, torch.arange(5))


TORCH_ONLY = """
import sys, torch
from lm_service.engine.packed.options import PackedOptions
from lm_service.engine.packed.engine_core import EngineCore
from lookonce.models.checkpoint import Half, open_checkpoint
from lookonce.models.qwen2_vl.modules import load_language_model
from lookonce.models.qwen2_vl.text import Qwen2VLAdapter
from lookonce.models.qwen2_vl.vision import Encoder

native = sys.argv[2] == "native"
vision, language = (open_checkpoint(sys.argv[1], needs=half) for half in (Half.VISION, Half.LANGUAGE))
encoder = Encoder.load(vision, torch.float32, torch.device("cpu"), native=native)
adapter = Qwen2VLAdapter(*load_language_model(language, torch.float32), native=native)
options = PackedOptions(native=native, kv_bytes=1 << 22, prefix_bytes=1 << 22)
core = EngineCore(adapter, options, load=print)
assert core.native is native and encoder.native is native
print("llvmlite" in sys.modules, "torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize(("kernels", "imported"), [("torch", "False"), ("native", "True")])
def test_compilers_stay_out_of_a_process_that_does_not_use_them(checkpoint_path, kernels, imported):
    command = [sys.executable, "-c", TORCH_ONLY, str(checkpoint_path), kernels]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    assert done.stdout.split() == [imported, "False"]
