"""The compiled products, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lookonce.models.kernels import program
from lookonce.models.kernels.compiling import LANES
from lookonce.models.kernels.panels import PanelGatedUnit, PanelLinear, panels_serve
from lookonce.models.kernels.products import HEIGHT, WIDTH

SIZES = [(16, LANES), (128, 2 * WIDTH), (300, WIDTH + LANES), (1, WIDTH // 2 + LANES), (1000, 3 * WIDTH - LANES)]
ROWS = [1, HEIGHT - 1, HEIGHT, HEIGHT + 1, 100, 16 * HEIGHT, 301]


def exact(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("depth", "columns"), SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_products(depth, columns, rows):
    torch.manual_seed(rows)
    weight, bias = torch.randn(columns, depth) / depth**0.5, torch.randn(columns)
    other = torch.randn(columns, depth) / depth**0.5
    x, residual = torch.randn(depth, rows).t(), torch.randn(rows, columns)
    linear, expected = PanelLinear(weight, bias), functional.linear(x.double(), weight.double(), bias.double())
    exact(linear(x), expected)
    exact(linear.plus(x, residual), expected + residual)
    exact(PanelLinear(weight)(x), expected - bias)
    gate, up = (functional.linear(x.double(), matrix.double()) for matrix in (weight, other))
    exact(PanelGatedUnit(weight, other)(x), functional.silu(gate) * up)


def test_large_gates_neither_overflow_nor_vanish():
    weight = torch.eye(LANES)
    x = torch.tensor([[1e4], [-1e4], [88.8], [-88.8], [-104.0], [0.0]]).expand(-1, LANES)
    expected = functional.silu(x.double()) * x.double()
    torch.testing.assert_close(PanelGatedUnit(weight, weight)(x).double(), expected, atol=1e-25, rtol=1e-5)


@pytest.mark.parametrize(("depth", "columns"), SIZES)
def test_a_row_is_the_same_among_any_others_and_by_any_number_of_threads(depth, columns, monkeypatch):
    torch.manual_seed(0)
    matrices = [torch.randn(columns, depth) for _ in range(2)]
    linear, unit = PanelLinear(matrices[0]), PanelGatedUnit(*matrices)
    x = torch.randn(500, depth)
    whole, gated = linear(x), unit(x)
    for begin, end in ((0, 1), (3, 4), (7, 100), (250, 500), (499, 500)):
        assert torch.equal(linear(x[begin:end]), whole[begin:end])
        assert torch.equal(unit(x[begin:end]), gated[begin:end])
    monkeypatch.setattr("lookonce.models.kernels.panels._SINGLE_THREADED", 0)
    for threads in (1, 2, 3):
        monkeypatch.setattr(program, "threads", lambda threads=threads: threads)
        assert torch.equal(linear(x), whole) and torch.equal(unit(x), gated)


def test_what_is_no_number_harms_no_other_row():
    weight, x = torch.randn(WIDTH, 64), torch.randn(20, 64)
    clean, x[7] = PanelLinear(weight)(x), torch.nan
    found = PanelLinear(weight)(x)
    assert found[7].isnan().all()
    others = [row for row in range(20) if row != 7]
    assert torch.equal(found[others], clean[others])


def test_no_rows_give_none():
    assert PanelLinear(torch.randn(WIDTH, 8))(torch.empty(0, 8)).shape == (0, WIDTH)


def test_whom_they_serve():
    assert panels_serve(torch.empty(LANES, 3))
    assert not panels_serve(torch.empty(LANES + 1, 3))
    assert not panels_serve(torch.empty(LANES, 3, dtype=torch.bfloat16))
    assert not panels_serve(torch.empty(LANES, 3, device="meta"))


def test_threads_that_they_could_not_use_are_left_to_others(monkeypatch):
    monkeypatch.setattr(program, "_PARALLEL", None)  # another OpenMP than libgomp
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert panels_serve(torch.empty(LANES, 3)) is (count == 1)
    finally:
        torch.set_num_threads(before)
