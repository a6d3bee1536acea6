"""AutoRound (arXiv:2309.05516): GPTQ's or AWQ's layout, as `packing_format` says, with 2 to 8 bits in GPTQ's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lookonce.models.checkpoint.quantised import awq, gptq
from lookonce.models.checkpoint.quantised.matrix import Format

ENDINGS = gptq.ENDINGS | awq.ENDINGS
_PREFIX = "auto_round:"
_ZEROS = {"auto": "less one", "auto_gptq": "less one", "gptq": "less one"}
_ZEROS |= {"auto_round": "as they are", "gptqmodel": "as they are"}
_ROTATIONS = ("rotation_config", "transform_config", "spinquant_config", "quarot_config")
_AWQ = ("auto_awq", "awq")


def format_of(settings: Mapping[str, Any]) -> Format:
    """See `formats`. Bits and group sizes of single modules (extra_config) follow from their tensors' shapes."""
    kind, activations = str(settings.get("data_type") or "int"), settings.get("act_bits") or 16
    if kind != "int" or activations < 16:
        raise ValueError(f"data_type {kind!r} with act_bits {activations} is not supported (int, 16)")
    rotations = sorted(name for name, value in settings.items() if value and name.endswith(_ROTATIONS))
    if rotations:
        raise ValueError(f"{rotations[0]}: rotations are not supported")
    packing = str(settings.get("packing_format") or "auto")
    layout = packing.removeprefix(_PREFIX)
    if layout in _AWQ:
        return awq.format_of({"bits": settings.get("bits")})
    if layout not in _ZEROS:
        known = ", ".join(_PREFIX + name for name in ("auto_gptq", "auto_awq", "gptqmodel"))
        raise ValueError(f"packing_format {packing!r} is not supported ({known})")
    return gptq.Gptq(int(settings.get("group_size") or -1), _ZEROS[layout], bits=tuple(range(2, 9)), name="AutoRound")
