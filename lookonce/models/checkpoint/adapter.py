"""LoRA adapters (arXiv:2106.09685) as PEFT stores them: what they add to which weights of a model. No torch.

adapter_config.json says rank and factor; adapter_model.safetensors holds `base_model.model.NAME.lora_A.weight` [r, in]
and `lora_B.weight` [out, r] of each module, `lora_embedding_A` [r, rows] and `_B` [width, r] of an embedding, and whole
weights of what was trained beside them (modules_to_save, biases), some as `NAME.base_layer.bias`. They are merged when
a half is loaded.
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
from lookonce.models.checkpoint.quantised.matrix import StoredWeight
from lookonce.models.family import EMBEDDING
from lookonce.models.registry import Family, Half

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PAIR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
_UNSUPPORTED = {  # what a setting asks for where it says more than nothing
    "use_dora": "DoRA",
    "lora_bias": "biases of B (lora_bias)",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "trainable_token_indices": "single tokens' rows (trainable_token_indices)",
    "layer_replication": "layers used twice (layer_replication)",
    "target_parameters": "experts' parameters (target_parameters)",
    "alora_invocation_tokens": "activation by tokens (alora_invocation_tokens)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
}
_OTHER_BASES = ("pissa", "olora", "corda", "lora_ga")
"""Ways to begin training that change the base model's own weights."""
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class LowRank:
    """What is added to one weight: scale * B A, in the weight's shape; of an embedding, that transposed."""

    a: TensorEntry  # [r, in]
    b: TensorEntry  # [out, r]
    scale: float
    embedding: bool


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
            name: [_facts(pair.a), _facts(pair.b), pair.scale, pair.embedding]
            for name, pair in self.added[half].items()
        }
        replaced = {name: _facts(entry) for name, entry in self.replaced[half].items()}
        return blake3(canonical_json([added, replaced]), derive_key_context="lookonce 2026 adapter").hexdigest()

    def problems(self, half: Half, weights: Mapping[str, StoredWeight], *, tied: bool) -> Iterator[str]:
        """Why it can't be merged into a half with these weights. `tied`: its head is its embedding."""
        for name, pair in self.added[half].items():
            entry = weights.get(name)
            if entry is None or not _fits(pair, entry.shape):
                found = "no such weight" if entry is None else f"shape {list(entry.shape)}"
                yield (
                    f"{pair.a.file}: tensors {pair.a.stored_name!r} {list(pair.a.shape)} and B {list(pair.b.shape)} "
                    f"don't fit the model, which has {found}; give the adapter's own base model"
                )
                return
        if tied and EMBEDDING in {*self.added[half], *self.replaced[half]}:
            yield (
                f"{self.path}: the adapter changes the embedding of a model whose output head is tied to it; "
                "merge it by the code that trained it, and give the result"
            )


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
            f"{file}: {', '.join(found)} is not supported (LoRA); merge the adapter by the code that trained it "
            "(PEFT's merge_and_unload), and give the result"
        )


def _opened(path: Path, family: Family, config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> Adapter:
    pairs: dict[tuple[str, bool], dict[str, TensorEntry]] = {}
    replaced: dict[Half, dict[str, TensorEntry]] = {half: {} for half in Half}
    strays = []
    for name, entry in entries.items():
        own = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if entry.dtype not in _FLOATS or not name.startswith(_PREFIX):
            strays.append(name)
        elif match := _PAIR.fullmatch(own):
            pairs.setdefault((match[1], match[2] is not None), {})[match[3]] = entry
        elif "lora_" in name or (place := _place(family, own)) is None:
            strays.append(name)  # such as DoRA's magnitudes
        else:
            replaced[place[0]][place[1]] = entry
    added: dict[Half, dict[str, LowRank]] = {half: {} for half in Half}
    for (module, embedding), pair in pairs.items():
        place = _place(family, f"{module}.weight")
        if place is None or pair.keys() != {"A", "B"}:
            strays += [entry.stored_name for entry in pair.values()]
        else:
            added[place[0]][place[1]] = LowRank(pair["A"], pair["B"], _scale(config, module, pair["A"]), embedding)
    if strays or not entries:
        what = files.some(sorted(strays)) or "no tensor"
        raise CheckpointError(
            f"{path / WEIGHTS}: {what}: not what LoRA has of a {family.label} model; give an adapter of this model"
        )
    return Adapter(path, added, replaced)


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
    made = (inputs, outputs) if pair.embedding else (outputs, inputs)
    return made == (shape[0], math.prod(shape[1:])) and math.prod(pair.b.shape) == outputs * pair.a.shape[0]


def _facts(entry: TensorEntry) -> list[Any]:
    return [entry.dtype, list(entry.shape), blake3(read_bytes(entry)).hexdigest()]
