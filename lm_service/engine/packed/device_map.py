"""Where the language half's weights lie: on one device, or its layers spread over several (`device_map`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lookonce.core.errors import LookonceError, invalid
from lookonce.core.layer_split import AUTO, Share, layers_of, parse, spread
from lookonce.core.units import format_size
from lookonce.models.checkpoint.quantised.matrix import StoredWeight
from lookonce.models.devices import choose_device, free_memory
from lookonce.models.sizing import SCALE_BYTES

_LAYER = re.compile(r"model\.layers\.([0-9]+)\.")
_BEFORE = re.compile(r"model\.(embed|project_in)")
"""What comes before the layers: embeddings of tokens and of positions."""


@dataclass(frozen=True)
class Home:
    """Devices and the layers on each. Embeddings are on the first, norm and head on the last; a tied head is the
    embedding."""

    devices: tuple[torch.device, ...]
    layers: tuple[range, ...]

    def of(self, tensor: str) -> torch.device:
        """Where a tensor of the half lies, by its name in the module."""
        match = _LAYER.match(tensor)
        if match is None:
            return self.devices[0 if _BEFORE.match(tensor) else -1]
        number = int(match[1])
        return next(device for device, part in zip(self.devices, self.layers, strict=True) if number in part)

    def of_unquantized(self, tensor: str) -> torch.device:
        """Where a tensor is read to when the layers are quantised on their way to their devices: layers to the CPU."""
        return torch.device("cpu") if _LAYER.match(tensor) else self.of(tensor)

    @property
    def of_layers(self) -> list[torch.device]:
        """The device of each layer."""
        return [device for device, part in zip(self.devices, self.layers, strict=True) for _ in part]

    def __str__(self) -> str:
        if len(self.devices) == 1:
            return str(self.devices[0])
        pairs = zip(self.devices, self.layers, strict=True)
        return ",".join(str(Share(str(device), part)) for device, part in pairs)


@dataclass(frozen=True)
class Wanted:
    """What the settings ask for, once every device named has been found to be there."""

    text: str
    shares: tuple[Share, ...]
    devices: tuple[torch.device, ...]


def wanted(device: str, device_map: str | None) -> Wanted:
    """The devices that the two settings name; `auto` as device_map means every GPU. Raises INVALID_ARGUMENT."""
    if device_map is None:
        return Wanted("", (), (choose_device(device),))
    if device != AUTO:
        raise invalid("device and device_map are both set; give one of them", param="device_map")
    if device_map == AUTO:
        gpus = tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))
        devices = gpus or (choose_device(AUTO),)
        return Wanted(AUTO, tuple(Share(str(each)) for each in devices), devices)
    shares = parse(device_map)
    return Wanted(device_map, tuple(shares), tuple(_device(device_map, share.device) for share in shares))


def place(
    asked: Wanted,
    entries: Mapping[str, StoredWeight],
    dtype: torch.dtype,
    quantization: str = "none",
    *,
    free: Callable[[torch.device], int] = free_memory,
) -> Home:
    """A home for the half with these tensors, held in `dtype` or with its layers' matrices quantised: the layers
    as given, or as many on each device as leave most room for KV. Raises INVALID_ARGUMENT when they don't fit what is
    free."""
    layers = 1 + max((int(match[1]) for name in entries if (match := _LAYER.match(name))), default=0)
    if not asked.shares:
        return Home(asked.devices, (range(layers),))
    devices, shares = asked.devices, asked.shares
    if asked.text == AUTO:  # a small model needs no more devices than it has layers
        devices, shares = devices[:layers], shares[:layers]
    weights = _Weights.of(entries, dtype, layers, int8=quantization == "int8")
    free_bytes = [free(device) for device in devices]
    free_bytes[0] -= weights.first
    free_bytes[-1] -= weights.last
    parts = layers_of(asked.text, shares, layers) or spread(free_bytes, layers)
    home = Home(devices, tuple(parts))
    _check_fit(asked.text, home, free_bytes, weights)
    return home


@dataclass(frozen=True)
class _Weights:
    """Bytes in memory."""

    first: int  # embeddings
    last: int  # norm and head
    layer: int  # the largest layer

    @classmethod
    def of(cls, entries: Mapping[str, StoredWeight], dtype: torch.dtype, layers: int, *, int8: bool) -> _Weights:
        first, last, each = 0, 0, [0] * layers
        for name, entry in entries.items():
            size = torch.Size(entry.shape).numel() * dtype.itemsize
            if match := _LAYER.match(name):
                small = int8 and len(entry.shape) == 2
                each[int(match[1])] += size // dtype.itemsize + SCALE_BYTES * entry.shape[0] if small else size
            elif _BEFORE.match(name):
                first += size
            else:
                last += size
        return cls(first, last, max(each))


def _check_fit(text: str, home: Home, free_bytes: Sequence[int], weights: _Weights) -> None:
    for device, part, room in zip(home.devices, home.layers, free_bytes, strict=True):
        missing = len(part) * weights.layer - room
        if missing > 0:
            raise invalid(
                f"device_map {text!r}: {len(part)} of {home.layers[-1].stop} layers on {device} are "
                f"{format_size(missing)} more than its memory has free; name more or larger devices",
                param="device_map",
            )


def _device(text: str, name: str) -> torch.device:
    try:
        return choose_device(name)
    except LookonceError as error:
        raise invalid(f"device_map {text!r}: {error.message}", param="device_map") from None
