"""Quantised checkpoints in the formats that libraries publish, made by code that shares nothing with the reader.

Each quantiser takes a matrix [outputs, inputs] in float32 and answers with the tensors that the library keeps of it, by
what their names end with, and with the matrix that they stand for. They are written from the formats' descriptions:
integers are assembled word by word, in Python's own arithmetic.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Quantiser = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]
GPTQMODEL_3 = (0x24924924, 0x92492492, 0x49249249)
"""What GPTQModel before 7 takes from the words of 3-bit zeros, in turn."""
PROJECTIONS = re.compile(r"model\.(language_model\.)?layers\..*_proj\.weight")


def words(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers [n, m] to int32 words [n * bits / 32, m], the first integers in the lowest bits; padded."""
    per = 32 // bits
    padded = np.zeros((-(-len(values) // per) * per, values.shape[1]), dtype=object)
    padded[: len(values)] = values
    rows = [sum(int(1 << bits * at) * padded[first + at] for at in range(per)) for first in range(0, len(padded), per)]
    return np.array(rows, dtype=object).astype(np.uint64).astype(np.uint32).view(np.int32)


def bitstream(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers [n, m] to int32 words [ceil(n * bits / 32), m]: one number of n * bits bits a column, cut."""
    size = -(-len(values) * bits // 32)
    columns = [sum(int(value) << bits * at for at, value in enumerate(column)) for column in values.T]
    return np.stack([np.frombuffer(number.to_bytes(4 * size, "little"), np.int32) for number in columns], 1)


def _half(values: np.ndarray, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, np.ndarray]:
    """Scales as stored, and their values."""
    stored = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(dtype)
    return stored, stored.float().numpy()


def _integers(grouped: np.ndarray, bits: int, symmetric: bool, dtype: torch.dtype = torch.float16):
    """[outputs, n] -> q [outputs, n] unsigned, scale [outputs] as stored and as a value, zero [outputs]."""
    top = (1 << bits) - 1
    low, high = np.minimum(grouped.min(1), 0), np.maximum(grouped.max(1), 0)
    if symmetric:
        zero = np.full(len(grouped), 1 << (bits - 1))
        stored, scale = _half(np.maximum(-low, high) * 2 / top + 1e-6, dtype)
    else:
        stored, scale = _half((high - low) / top + 1e-6, dtype)
        zero = np.clip(np.round(-low / scale), 0, top).astype(int)
        zero[:: max(1, len(zero) // 3)] = 0  # a zero of 0 is where stored zeros less one wrap around
    q = np.clip(np.round(grouped / scale[:, None]) + zero[:, None], 0, top).astype(int)
    return q, stored, scale, zero


def _by_group(weight: torch.Tensor, group: np.ndarray, bits: int, symmetric: bool, dtype: torch.dtype = torch.float16):
    """q [outputs, inputs], scales and zeros [outputs, groups], values."""
    matrix = weight.double().numpy()
    groups = int(group.max()) + 1
    q = np.zeros(matrix.shape, dtype=int)
    scales, zeros, values = [], np.zeros((len(matrix), groups), dtype=int), np.zeros(matrix.shape, dtype=np.float32)
    for number in range(groups):
        inputs = group == number
        q[:, inputs], stored, scale, zero = _integers(matrix[:, inputs], bits, symmetric, dtype)
        scales.append(stored)
        zeros[:, number] = zero
        values[:, inputs] = scale[:, None].astype(np.float32) * (q[:, inputs] - zero[:, None]).astype(np.float32)
    return q, torch.stack(scales, 1), zeros, torch.from_numpy(values)


def gptq(bits=4, group_size=32, *, sym=True, desc_act=False, v2=False, index=True, bias=False, whole_words=False):
    def quantise(weight):
        outputs, inputs = weight.shape
        size = group_size if group_size > 0 else inputs
        group = np.arange(inputs) // size
        if desc_act:
            group = np.random.default_rng(inputs).permutation(group)
        q, scales, zeros, values = _by_group(weight, group, bits, sym)
        if whole_words:
            each = [sum(1 << at for at in range(0, 32, bits))] if 32 % bits == 0 else GPTQMODEL_3
            taken = np.array(each, np.uint32)[np.arange(outputs * bits // 32) % len(each), None]
            stored = (bitstream(zeros, bits).view(np.uint32) - taken).view(np.int32)
        else:
            stored = bitstream(zeros if v2 else (zeros - 1) % (1 << bits), bits)
        parts = {
            "qweight": torch.from_numpy(bitstream(q.T, bits)),
            "qzeros": torch.from_numpy(stored.T.copy()),
            "scales": scales.t().contiguous(),
        }
        if index:
            parts["g_idx"] = torch.from_numpy(group.astype(np.int32))
        if bias:
            parts["bias"] = torch.zeros(outputs, dtype=torch.float16)
        return parts, values

    return quantise


def awq(group_size=32):
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def packed(values):  # [n, outputs] -> [n, outputs / 8]
        shuffled = np.stack([values[:, at::8] for at in order], 2)  # [n, outputs / 8, 8]
        return torch.from_numpy(words(shuffled.reshape(-1, 8).T, 4).reshape(len(values), -1))

    def quantise(weight):
        inputs = weight.shape[1]
        size = group_size if group_size > 0 else inputs
        q, scales, zeros, values = _by_group(weight, np.arange(inputs) // size, 4, False)
        parts = {"qweight": packed(q.T), "qzeros": packed(zeros.T), "scales": scales.t().contiguous()}
        return parts, values

    return quantise


def gemv(group_size=32, *, fast=False):
    """AutoAWQ's other two layouts. Groups are padded to whole words, and further the smaller they are."""

    def quantise(weight):
        outputs, inputs = weight.shape
        q, scales, zeros, values = _by_group(weight, np.arange(inputs) // group_size, 4, False)
        groups = inputs // group_size
        more = {32: 4, 64: 2}.get(group_size, 1)
        width = math.ceil(math.ceil(groups / 8) / more) * more * 8
        padding = (0, width - groups)
        scales = torch.nn.functional.pad(scales, padding)
        if not fast:
            padded = np.pad(zeros, ((0, 0), padding))
            parts = {"qweight": torch.from_numpy(words(q.T, 4).T.copy()), "scales": scales}
            return parts | {"qzeros": torch.from_numpy(words(padded.T, 4).T.copy())}, values
        shifts = (-scales[:, :groups].float() * torch.from_numpy(zeros).float()).half()
        values = (torch.from_numpy(q).view(outputs, groups, group_size) * scales[:, :groups, None].float()).float()
        values = (values + shifts[:, :, None].float()).view(outputs, inputs)
        shifts = torch.nn.functional.pad(shifts, padding)
        parts = {"qweight": _interleaved(q), "scales": scales.t().contiguous(), "qzeros": shifts.t().contiguous()}
        return parts, values

    return quantise


def _interleaved(q: np.ndarray) -> torch.Tensor:
    """Int16 [outputs / 4, inputs], value by value: which one stands where is counted out of the kernel's order."""
    outputs, inputs = q.shape
    pairs = [0, 8, 16, 24, 2, 10, 18, 26, 4, 12, 20, 28, 6, 14, 22, 30]  # first inputs of pairs, of 32
    line = []
    for eight in range(4):
        first = pairs[4 * eight : 4 * eight + 4]
        line += [*first, *(at + 1 for at in first)]
    found = np.zeros((outputs // 4, inputs), dtype=int)
    for row in range(outputs):
        for at in range(inputs):
            block, within = divmod(at, 64)
            place = 64 * (row % 4) + within  # of the block's 256 values of four rows
            value = q[row, 64 * block + within // 32 * 32 + line[within % 32]]
            found[row // 4, 64 * block + place // 4] |= int(value) << 4 * (place % 4)
    return torch.from_numpy(found.astype(np.uint16).view(np.int16))


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def fp4(kind="compressed-tensors"):
    """NVFP4 by compressed-tensors (the global scale divides) or by "modelopt" (it multiplies); "mxfp4"."""

    def quantise(weight):
        outputs, inputs = weight.shape
        size = 32 if kind == "mxfp4" else 16
        grouped = weight.view(outputs, -1, size)
        wanted = grouped.abs().amax(2) / 6 + 1e-6
        if kind == "mxfp4":
            exponents = wanted.log2().ceil()
            scales, parts = exponents.exp2(), {"weight_scale": (exponents + 127).to(torch.uint8)}
        else:
            whole = weight.abs().max().reshape(1) / (6 * 448)
            whole = 1 / whole if kind == "compressed-tensors" else whole
            stored = (wanted * whole if kind == "compressed-tensors" else wanted / whole).to(torch.float8_e4m3fn)
            scales = stored.float() / whole if kind == "compressed-tensors" else stored.float() * whole
            ending = "weight_global_scale" if kind == "compressed-tensors" else "weight_scale_2"
            parts = {"weight_scale": stored, ending: whole if kind == "compressed-tensors" else whole.reshape(())}
        index = (grouped / scales[:, :, None]).unsqueeze(3).sub(FP4).abs().argmin(3).view(outputs, inputs)
        packed = (index[:, ::2] + 16 * index[:, 1::2]).to(torch.uint8)
        values = (FP4[index].view(outputs, -1, size) * scales[:, :, None]).view(outputs, inputs)
        ending = "weight" if kind == "modelopt" else "weight_packed"
        return parts | {ending: packed, "input_scale": torch.ones(1)}, values

    return quantise


def mxfp8():
    def quantise(weight):
        grouped = weight.view(len(weight), -1, 32)
        exponents = (grouped.abs().amax(2) / 448 + 1e-9).log2().ceil()
        stored = (grouped / exponents.exp2()[:, :, None]).to(torch.float8_e4m3fn)
        values = (stored.float() * exponents.exp2()[:, :, None]).view(weight.shape)
        return {"weight": stored.view(weight.shape), "weight_scale": (exponents + 127).to(torch.uint8)}, values

    return quantise


def packed(bits=4, group_size=32, *, sym=True, actorder=False):
    """compressed-tensors' pack-quantized. Padding of the last word included."""

    def quantise(weight):
        outputs, inputs = weight.shape
        group = np.arange(inputs) // (group_size if group_size > 0 else inputs)
        if actorder:
            group = np.random.default_rng(inputs).permutation(group)
        q, scales, zeros, values = _by_group(weight, group, bits, sym, torch.bfloat16)
        parts = {
            "weight_packed": torch.from_numpy(bitstream(q.T, bits).T.copy()),
            "weight_scale": scales,
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        if not sym:
            parts["weight_zero_point"] = torch.from_numpy(bitstream(zeros, bits))
        if actorder:
            parts["weight_g_idx"] = torch.from_numpy(group.astype(np.int32))
        return parts, values

    return quantise


def int_quantised(*, sym=True, tensor=False):
    def quantise(weight):
        rows = weight.reshape(1, -1) if tensor else weight
        q, scales, zeros, values = _by_group(rows, np.zeros(rows.shape[1], int), 8, sym, torch.float32)
        parts = {"weight": torch.from_numpy((q - 128).astype(np.int8)).view_as(weight), "weight_scale": scales}
        if not sym:
            parts["weight_zero_point"] = torch.from_numpy((zeros - 128).astype(np.int8))
        if tensor:
            parts["weight_scale"] = scales.reshape(1)
        parts["input_scale"] = torch.ones(1)
        return parts, values.view_as(weight)

    return quantise


def float8(scale="weight_scale_inv", block: tuple[int, int] | None = (128, 128), *, dtype=torch.float32, flat=False):
    """Blocks of (rows, columns); a side of 0 is the matrix's own. None: one number for all."""

    def quantise(weight):
        outputs, inputs = weight.shape
        rows, columns = block or (0, 0)
        rows, columns = rows or outputs, columns or inputs
        stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-outputs // rows), -(-inputs // columns), dtype=dtype)
        values = torch.empty(weight.shape)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scales[i, j] = weight[part].abs().max() / 448
                stored[part] = (weight[part] / scales[i, j].float()).to(torch.float8_e4m3fn)
                values[part] = stored[part].float() * scales[i, j].float()
        parts = {"weight": stored, scale: scales}
        if block is None:
            parts |= {scale: scales.reshape(()), "input_scale": torch.tensor(0.5)}
        elif flat:
            parts[scale] = scales.reshape(-1)
        return parts, values

    return quantise


def four_bits(kind="nf4", *, nested=True, block=64, dtype="bfloat16"):
    """bitsandbytes' 4-bit weights; the values of its tables are its own, from the papers."""
    tables = {
        "nf4": [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ],
        "fp4": [
            0.0, 0.0052083333, 0.6666666667, 1.0, 0.3333333333, 0.5, 0.1666666667, 0.25,
            -0.0, -0.0052083333, -0.6666666667, -1.0, -0.3333333333, -0.5, -0.1666666667, -0.25,
        ],
    }  # fmt: skip

    def quantise(weight):
        table = torch.tensor(tables[kind], dtype=torch.float32)
        flat = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % block)).view(-1, block)
        state = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(weight.shape)}
        absmax = flat.abs().amax(1)
        parts = {}
        if nested:
            offset = absmax.mean().item()
            outer = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
            nested_absmax, codes = outer.abs().amax(1), torch.linspace(-1, 1, 256)
            index = (outer / nested_absmax[:, None]).unsqueeze(2).sub(codes).abs().argmin(2)
            absmax_values = (codes[index] * nested_absmax[:, None]).view(-1)[: len(absmax)] + torch.tensor(offset)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            parts |= {"weight.nested_absmax": nested_absmax, "weight.nested_quant_map": codes}
            parts["weight.absmax"] = index.view(-1)[: len(absmax)].to(torch.uint8)
        else:
            absmax_values = parts["weight.absmax"] = absmax
        index = (flat / absmax[:, None]).unsqueeze(2).sub(table).abs().argmin(2)
        values = (table[index] * absmax_values[:, None]).view(-1)[: weight.numel()]
        nibbles = index.view(-1)[: weight.numel()].tolist()
        bytes_ = [16 * first + second for first, second in zip(nibbles[::2], nibbles[1::2], strict=True)]
        parts["weight"] = torch.tensor(bytes_, dtype=torch.uint8)[:, None]
        parts["weight.quant_map"] = table
        name = f"weight.quant_state.bitsandbytes__{kind}"
        parts[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return parts, values.to(getattr(torch, dtype)).float().view(weight.shape)

    return quantise


def int8():
    """bitsandbytes' LLM.int8() weights."""

    def quantise(weight):
        scale = weight.abs().amax(1)
        q = (weight * 127 / scale[:, None]).round().to(torch.int8)
        parts = {"weight": q, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return parts, q.float() * scale[:, None] * (1 / 127)

    return quantise


def quantised(source: Path, out: Path, quantiser: Quantiser, settings: dict, *, left: str = "", also: str = "") -> Path:
    """OUT/quantised and OUT/plain, the same model; `left` and `also` are patterns of names left alone, or taken too."""
    tensors, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        wanted = PROJECTIONS.fullmatch(name) or (also and re.search(also, name))
        if not wanted or (left and re.search(left, name)):
            tensors[name] = plain[name] = tensor
            continue
        parts, values = quantiser(tensor)
        tensors |= {f"{name.removesuffix('.weight')}.{ending}": part for ending, part in parts.items()}
        plain[name] = values.contiguous()
    for kind, values in (("quantised", tensors), ("plain", plain)):
        shutil.copytree(source, out / kind)
        save_file({name: tensor.contiguous() for name, tensor in values.items()}, out / kind / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": settings}
    (out / "quantised" / "config.json").write_text(json.dumps(config))
    return out
