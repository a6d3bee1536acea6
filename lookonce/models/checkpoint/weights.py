"""Reads one half's tensors into a module built on the meta device, strictly: nothing missing, unexpected or misshapen.

Tensors are read with plain reads straight into their final memory (through a small staging buffer when the dtype or
device differs), never by mapping the file: resident memory then is the weights themselves, one copy, and a checkpoint
that is replaced on disk can't change or crash a running service.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lookonce.core.errors import CheckpointError
from lookonce.models.checkpoint.adapter import LowRank
from lookonce.models.checkpoint.checkpoint import Checkpoint
from lookonce.models.checkpoint.files import some
from lookonce.models.checkpoint.headers import TensorEntry
from lookonce.models.checkpoint.inventory import STORED_DTYPES, spare_biases, tensor_problems
from lookonce.models.checkpoint.quantised.matrix import QuantisedEntry, StoredWeight
from lookonce.models.family import EMBEDDING, HEAD, Half
from lookonce.models.omp_thread import lone_workers

STAGING_BYTES = 16 << 20
_TORCH_DTYPES = dict(zip(STORED_DTYPES, (torch.float64, torch.float32, torch.float16, torch.bfloat16), strict=True))
_PART_DTYPES = _TORCH_DTYPES | {  # of what quantised matrices are stored as
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_ROWS = 64
"""Of a quantised matrix, made at a time or a multiple of it: whole words of every format."""
_BLOCK_BYTES = 1 << 20
"""Of such rows in float32, about: what is made of them step by step stays in a core's cache."""
Where = Callable[[str], torch.device]
"""Says on which device a tensor belongs, by its name in the module."""


def load_weights(
    module: torch.nn.Module,
    checkpoint: Checkpoint,
    half: Half,
    *,
    dtype: torch.dtype,
    device: torch.device | str | Where = "cpu",
) -> None:
    """Fill a module built on the meta device with a half's weights, cast to `dtype` and placed on `device` (or each on
    its own).

    The module's parameter names are those of `Checkpoint.half_entries`. A head that the config ties and the checkpoint
    doesn't store shares the embedding's parameter. Raises CheckpointError naming the tensor (and both shapes, and the
    file) for anything missing, unexpected or of another shape.
    """
    where = _always(torch.device(device)) if isinstance(device, str | torch.device) else device
    entries = checkpoint.half_entries(half)
    expected = module.state_dict(keep_vars=True)
    tied = half is Half.LANGUAGE and checkpoint.tied_head and HEAD in expected and HEAD not in entries
    if tied:
        del expected[HEAD]
    problems = tensor_problems({name: tuple(x.shape) for name, x in expected.items()}, entries, checkpoint.path)
    if problems:
        raise CheckpointError(*problems)
    spare = spare_biases(expected, entries)
    wanted = {name: entry for name, entry in entries.items() if name not in spare}
    added = checkpoint.adapter.added[half] if checkpoint.adapter is not None else {}
    reader = _Reader(dtype, where, added)
    read = (pair for file in _by_file(wanted) for pair in reader.read(*file))
    state = {name: tensor if tensor.shape == expected[name].shape else tensor.mT for name, tensor in read}
    if checkpoint.witness is not None:
        checkpoint.witness(half, state)
    if tied:
        state[HEAD] = state[EMBEDDING]
    module.load_state_dict(state, strict=True, assign=True)
    if tied:
        module.get_submodule("lm_head").weight = module.get_submodule("model.embed_tokens").weight
    _check_nothing_on_meta(module)


def read_weight(
    checkpoint: Checkpoint, half: Half, name: str, dtype: torch.dtype, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    """One weight as `load_weights` reads it, or its rows from one number up to another, on the CPU. Raises
    CheckpointError."""
    entry = checkpoint.half_entries(half)[name]
    added = checkpoint.adapter.added[half] if checkpoint.adapter is not None else {}
    if isinstance(entry, TensorEntry) and rows is not None and name not in added:
        start, stop = rows
        row_bytes = entry.nbytes // entry.shape[0]
        shape, offset = (stop - start, *entry.shape[1:]), entry.offset + start * row_bytes
        entry, rows = replace(entry, shape=shape, offset=offset, nbytes=(stop - start) * row_bytes), None
    [(_, tensor)] = _Reader(dtype, _always(torch.device("cpu")), added).read(entry.file, [(name, entry)])
    return tensor if rows is None else tensor[slice(*rows)]


def _by_file(entries: dict[str, StoredWeight]) -> list[tuple[Path, list[tuple[str, StoredWeight]]]]:
    groups: dict[Path, list[tuple[str, StoredWeight]]] = defaultdict(list)
    for name, entry in entries.items():
        groups[entry.file].append((name, entry))
    return [(file, sorted(group, key=lambda pair: pair[1].offset)) for file, group in sorted(groups.items())]


@dataclass(frozen=True)
class _Reader:
    """Reads a half's weights as they are wanted."""

    dtype: torch.dtype
    where: Where
    added: Mapping[str, LowRank]  # by an adapter

    def read(self, file: Path, group: list[tuple[str, StoredWeight]]) -> list[tuple[str, torch.Tensor]]:
        """Those of one file, in the order they lie in."""
        try:
            with open(file, "rb", buffering=0) as stream:
                return [(name, self._weight(stream.fileno(), name, entry)) for name, entry in group]
        except OSError as error:
            raise CheckpointError(
                f"{file} cannot be read ({error.strerror}); check the disk and its permissions"
            ) from None

    def _weight(self, descriptor: int, name: str, entry: StoredWeight) -> torch.Tensor:
        added, device = self.added.get(name), self.where(name)
        if added is None:
            return self._stored(descriptor, entry, self.dtype, device)
        wide = self._stored(descriptor, entry, torch.float32, torch.device("cpu"))
        return _merged(wide, added).to(self.dtype).to(device)

    def _stored(self, descriptor: int, entry: StoredWeight, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if isinstance(entry, TensorEntry):
            return _read_tensor(descriptor, entry, dtype, device)
        return _dequantised(entry, dtype, device)


def _merged(weight: torch.Tensor, added: LowRank) -> torch.Tensor:
    """A float32 weight and what an adapter adds to it, in its place."""
    a, b = (_read_part(entry).float() for entry in (added.a, added.b))
    delta = (b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)).mul_(added.scale)
    weight.add_((delta.t() if added.embedding else delta).reshape(weight.shape))
    if added.magnitude is None:
        return weight
    outputs = weight.t() if added.embedding else weight.reshape(weight.shape[0], -1)
    outputs.mul_((_read_part(added.magnitude).float().reshape(-1) / outputs.norm(dim=1))[:, None])
    return weight


def _read_tensor(descriptor: int, entry: TensorEntry, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    stored = _TORCH_DTYPES[entry.dtype]
    tensor = torch.empty(entry.shape, dtype=dtype, device=device)
    if stored is dtype and device.type == "cpu":
        _read_into(descriptor, entry, tensor.view(-1), entry.offset)
        return tensor
    flat = tensor.view(-1)
    step = max(1, STAGING_BYTES // stored.itemsize)
    staging = torch.empty(min(step, flat.numel()), dtype=stored)
    for start in range(0, flat.numel(), step):
        part = staging[: min(step, flat.numel() - start)]
        _read_into(descriptor, entry, part, entry.offset + start * stored.itemsize)
        flat[start : start + part.numel()].copy_(part)
    return tensor


def _dequantised(entry: QuantisedEntry, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A quantised matrix in plain weights, some rows at a time: beside it, its parts as stored and those rows."""
    outputs, inputs = entry.shape
    with torch.inference_mode(mode=False):  # workers' threads may not write to a tensor of this mode
        parts = {ending: _read_part(part) for ending, part in entry.parts.items()}
        tensor = torch.empty(entry.shape, dtype=dtype, device=device)
    step = max(1, _BLOCK_BYTES // (torch.float32.itemsize * inputs * _ROWS)) * _ROWS

    def fill(start: int) -> None:
        stop = min(outputs, start + step)
        tensor[start:stop].copy_(entry.matrix.rows(parts, start, stop))

    try:
        with lone_workers(-(-outputs // step)) as workers:
            for _ in workers.map(fill, range(0, outputs, step)):
                pass
    except (ValueError, IndexError) as error:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.stored_name!r} can't be dequantised ({error}); download it again"
        ) from None
    return tensor


def _read_part(entry: TensorEntry) -> torch.Tensor:
    tensor = torch.empty(entry.shape, dtype=_PART_DTYPES[entry.dtype])
    with open(entry.file, "rb", buffering=0) as stream:
        _read_into(stream.fileno(), entry, tensor.view(-1), entry.offset)
    return tensor


def _read_into(descriptor: int, entry: TensorEntry, target: torch.Tensor, offset: int) -> None:
    view = target.view(torch.uint8).numpy().data.cast("B") if target.numel() else memoryview(b"")
    while len(view):
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise CheckpointError(f"{entry.file}: ends inside tensor {entry.stored_name!r}; download it again")
        view, offset = view[count:], offset + count


def _always(device: torch.device) -> Where:
    return lambda name: device


def _check_nothing_on_meta(module: torch.nn.Module) -> None:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    hollow = sorted(name for name, tensor in tensors if tensor.is_meta)
    if hollow:
        raise CheckpointError(f"not filled from the checkpoint: {some(hollow)}")
