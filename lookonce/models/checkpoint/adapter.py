"""LoRA and DoRA adapters (arXiv:2106.09685, 2402.09353) as PEFT stores them: what they add to a model's weights. No
torch.

adapter_config.json says rank and factor; adapter_model.safetensors holds `base_model.model.NAME.lora_A.weight` [r, in]
and `lora_B.weight` [out, r] of each module, `lora_embedding_A` [r, rows] and `_B` [width, r] of an embedding, DoRA's
`lora_magnitude_vector` [out] or [width], and whole weights of what was trained beside them (modules_to_save, biases),
some as `NAME.base_layer.bias`. They are merged when a half is loaded. Where a head is tied to its embedding, an adapter
that changes one of them unties them, as in PEFT's own forward.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from blake3 import blake3

from lookonce.core.errors import CheckpointError
from lookonce.core.identity import canonical_json
from lookonce.models.checkpoint import files, hub
from lookonce.models.checkpoint.headers import TensorEntry, read_bytes, read_header
from lookonce.models.family import EMBEDDING, HEAD
from lookonce.models.registry import Family, Half

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.lora_(?:(embedding_)?([AB])|(magnitude_vector))(?:\.weight)?")
_MAGNITUDE = "magnitude_vector"
_UNSUPPORTED = {  # what a setting asks for where it says more than nothing
    "lora_bias": "biases of B (lora_bias)",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "trainable_token_indices": "single tokens' rows (trainable_token_indices)",
    "layer_replication": "layers used twice (layer_replication)",
    "target_parameters": "experts' parameters (target_parameters)",
    "alora_invocation_tokens": "activation by tokens (alora_invocation_tokens)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "ensure_weight_tying": "an embedding and a head that stay tied (ensure_weight_tying)",
}
_OTHER_BASES = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Ways to begin training that change the base model's own weights."""
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class LowRank:
    """What is added to one weight: scale * B A, in the weight's shape; of an embedding, that transposed.

    With a magnitude (DoRA), each output of the sum is then brought to this length."""

    a: TensorEntry  # [r, in]
    b: TensorEntry  # [out, r]
    scale: float
    embedding: bool
    magnitude: TensorEntry | None = None  # [out]


@dataclass(frozen=True)
class Adapter:
    """An opened adapter, its weights by half and name in the module."""

    path: Path
    added: Mapping[Half, Mapping[str, LowRank]]
    replaced: Mapping[Half, Mapping[str, TensorEntry]]

    @cached_property
    def _digests(self) -> dict[Half, str | None]:
        return {half: self._digest(half) for half in Half}

    def digest(self, half: Half) -> str | None:
        """Of all that it changes of a half, in hexadecimal; None where it changes nothing. Reads the adapter's tensors.

        Two adapters that change a half alike have the same, whatever they do to the other one."""
        return self._digests[half]

    def _digest(self, half: Half) -> str | None:
        if not self.added[half] and not self.replaced[half]:
            return None
        added = {
            name: [
                *(_facts(pair.a), _facts(pair.b), pair.scale, pair.embedding),
                *([_facts(pair.magnitude)] if pair.magnitude is not None else []),
            ]
            for name, pair in self.added[half].items()
        }
        replaced = {name: _facts(entry) for name, entry in self.replaced[half].items()}
        return blake3(canonical_json([added, replaced]), derive_key_context="lookonce 2026 adapter").hexdigest()

    @property
    def unties(self) -> bool:
        """Whether it changes an embedding or a head, so that one that is tied to the other is so no longer."""
        changed = self.added[Half.LANGUAGE].keys() | self.replaced[Half.LANGUAGE].keys()
        return not changed.isdisjoint((EMBEDDING, HEAD))

    def problems(self, half: Half, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        """Why it can't be merged into a half with weights of these shapes, by their names in the module."""
        for name, pair in self.added[half].items():
            shape = shapes.get(name)
            if shape is None or not _fits(pair, shape):
                found = "no such weight" if shape is None else f"shape {list(shape)}"
                yield (
                    f"{pair.a.file}: tensors {pair.a.stored_name!r} {list(pair.a.shape)} and B {list(pair.b.shape)} "
                    f"don't fit the model, which has {found}; give the adapter's own base model"
                )
                return

    def misfits(self, family: Family, config: Mapping[str, Any]) -> Iterator[str]:
        """`problems` with the weights that config.json asks for."""
        settings = dict(config)
        head = self.unties or not family.tied_head(settings)
        for half in Half:
            yield from self.problems(half, family.tensor_shapes(settings, half, head=head))


def open_adapter(source: str, family: Family) -> Adapter:
    """An adapter of a local directory or a hub id. Raises CheckpointError with every problem."""
    path = Path(source).expanduser()
    if not path.is_dir():
        if not hub.is_repository(source):
            raise CheckpointError(f"{source}: no such directory, and not a hub id (owner/name); check the spelling")
        path = hub.fetch_files(source, [files.ADAPTER, WEIGHTS])
    if not (path / files.ADAPTER).is_file():
        raise CheckpointError(f"{path} has no {files.ADAPTER}: not a LoRA adapter; give a directory that PEFT wrote")
    config = files.read_json(path / files.ADAPTER)
    _refuse(path / files.ADAPTER, config)
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(
            f"{path} has no {WEIGHTS} (.bin is never loaded); save the adapter again with PEFT's save_pretrained"
        )
    return _opened(path, family, config, read_header(path / WEIGHTS)[0])


def _refuse(file: Path, config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type") or "LORA").upper()
    initial = str(config.get("init_lora_weights") or "").lower()
    found = [] if kind == "LORA" else [kind]
    found += [what for name, what in _UNSUPPORTED.items() if config.get(name)]
    found += [f"init_lora_weights {initial}" for start in _OTHER_BASES if initial.startswith(start)]
    if found:
        raise CheckpointError(
            f"{file}: {', '.join(found)} is not supported (LoRA, DoRA); merge the adapter by the code that trained it "
            "(PEFT's merge_and_unload), and give the result"
        )


def _opened(path: Path, family: Family, config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> Adapter:
    parts: dict[str, dict[str, TensorEntry]] = {}
    replaced: dict[Half, dict[str, TensorEntry]] = {half: {} for half in Half}
    strays = []
    for name, entry in entries.items():
        own = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if entry.dtype not in _FLOATS or not name.startswith(_PREFIX):
            strays.append(name)
        elif match := _PART.fullmatch(own):
            parts.setdefault(match[1], {})[(match[2] or "") + (match[3] or match[4])] = entry
        elif "lora_" in name or (place := _place(family, own)) is None:
            strays.append(name)
        else:
            replaced[place[0]][place[1]] = entry
    added: dict[Half, dict[str, LowRank]] = {half: {} for half in Half}
    for module, found in parts.items():
        place, pair = _place(family, f"{module}.weight"), _low_rank(config, module, found)
        if place is None or pair is None:
            strays += [entry.stored_name for entry in found.values()]
        else:
            added[place[0]][place[1]] = pair
    if strays or not entries:
        what = files.some(sorted(strays)) or "no tensor"
        raise CheckpointError(
            f"{path / WEIGHTS}: {what}: not what LoRA has of a {family.label} model; give an adapter of this model"
        )
    return Adapter(path, added, replaced)


def _low_rank(config: Mapping[str, Any], module: str, parts: Mapping[str, TensorEntry]) -> LowRank | None:
    """None for tensors that don't make one."""
    magnitude = parts.get(_MAGNITUDE)
    kinds = parts.keys() - {_MAGNITUDE}
    embedding = kinds == {"embedding_A", "embedding_B"}
    if (not embedding and kinds != {"A", "B"}) or (magnitude is not None) != bool(config.get("use_dora")):
        return None
    a, b = (parts[name] for name in sorted(kinds))
    return LowRank(a, b, _scale(config, module, a), embedding, magnitude)


def _place(family: Family, name: str) -> tuple[Half, str] | None:
    try:
        return family.locate(name)
    except CheckpointError:
        return None


def _scale(config: Mapping[str, Any], module: str, a: TensorEntry) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732); patterns may give a module an alpha of its own."""
    alphas = config.get("alpha_pattern") or {}
    own = (alphas[key] for key in alphas if re.fullmatch(rf"(.*\.)?({key})", module))
    alpha, rank = float(next(own, config.get("lora_alpha", 8))), a.shape[0]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _fits(pair: LowRank, shape: tuple[int, ...]) -> bool:
    if not pair.a.shape or len(pair.b.shape) < 2 or pair.a.shape[0] != pair.b.shape[1]:
        return False
    outputs, inputs = pair.b.shape[0], math.prod(pair.a.shape[1:])
    if pair.magnitude is not None and math.prod(pair.magnitude.shape) != outputs:
        return False
    made = (inputs, outputs) if pair.embedding else (outputs, inputs)
    return made == (shape[0], math.prod(shape[1:])) and math.prod(pair.b.shape) == outputs * pair.a.shape[0]


def _facts(entry: TensorEntry) -> list[Any]:
    return [entry.dtype, list(entry.shape), blake3(read_bytes(entry)).hexdigest()]
