"""Holds the tensors that a checkpoint stores against those that its config.json asks for. No torch, no weights read."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

from lookonce.models.checkpoint.files import adapter_problem, some
from lookonce.models.checkpoint.headers import TensorEntry, read_bytes
from lookonce.models.checkpoint.quantised.matrix import BIAS, WEIGHT, Format, QuantisedEntry, StoredWeight
from lookonce.models.family import HEAD

STORED_DTYPES = ("F64", "F32", "F16", "BF16")
"""Codes of the dtypes that weights may be stored in."""
_QUANTISED = (  # method, and what its tensors' names end with; the first that is found
    ("GPTQ", (".g_idx",)),
    ("AWQ", (".qweight", ".qzeros")),
    ("compressed-tensors", (".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_global_scale")),
    ("ModelOpt", (".weight_scale_2",)),
    ("bitsandbytes", (".absmax", ".quant_map", ".SCB", ".weight_format")),
    ("bitsandbytes", (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")),
    ("FP8", (".weight_scale_inv", ".weight_scale", ".input_scale")),
)


def tensor_problems(
    expected: Mapping[str, tuple[int, ...]], entries: Mapping[str, StoredWeight], path: Path
) -> list[str]:
    """All that is quantised, missing, unexpected, of another shape or of an unusable dtype in `path`'s files."""
    plain = [entry for entry in entries.values() if isinstance(entry, TensorEntry)]
    quantised = quantisation_problem((entry.stored_name for entry in plain), path)
    if quantised is not None:
        return [quantised]
    unexpected = entries.keys() - expected.keys() - spare_biases(expected, entries)
    found = [*_missing(expected, entries, path), *_unexpected([entries[name] for name in unexpected], path)]
    common = [(expected[name], entry) for name, entry in entries.items() if name in expected]
    return [*found, *_misshapen(common), *_mistyped([entry for _, entry in common])]


def spare_biases(expected: Container[str], entries: Mapping[str, StoredWeight]) -> set[str]:
    """Biases of nothing but zeros that a quantised matrix has and the model hasn't: AutoGPTQ writes some."""
    unexpected = [name for name in entries if name.endswith(f".{BIAS}") and name not in expected]
    return {name for name in unexpected if _is_spare(entries[name], entries.get(name.removesuffix(BIAS) + WEIGHT))}


def _is_spare(bias: StoredWeight, matrix: StoredWeight | None) -> bool:
    return isinstance(matrix, QuantisedEntry) and isinstance(bias, TensorEntry) and not any(read_bytes(bias))


def quantisation_problem(names: Iterable[str], path: Path) -> str | None:
    """What to say when tensors' names show that they are quantised as no settings state; None: they don't."""
    names = sorted(names)
    for method, endings in _QUANTISED:
        found = [name for name in names if name.endswith(endings)]
        if found:
            return (
                f"{path}: the weights are quantised by {method} ({some(found)}), which config.json's "
                "quantization_config doesn't say; take config.json from the repository that the weights are from"
            )
    return None


def unquantised_problem(format: Format, weights: Mapping[str, StoredWeight], path: Path) -> list[str]:
    """What to say when the settings state a format and no weight of the half is stored so."""
    if any(isinstance(entry, QuantisedEntry) for entry in weights.values()):
        return []
    if quantisation_problem((entry.stored_name for entry in weights.values()), path) is not None:
        return []  # they are stored in another one, which is said
    return [
        f"{path}: the settings say that weights are quantised by {format.name}, but none of the language half is "
        "stored so; take all files from the same repository, or remove quantization_config if the weights are plain"
    ]


def turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How a stack of experts' matrices [experts, a, b] may be stored, too: transformers 5 writes them the other way
    round. Anything else: as it is."""
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape


def _missing(expected: Mapping[str, tuple[int, ...]], entries: Mapping[str, StoredWeight], path: Path) -> Iterator[str]:
    missing = sorted(expected.keys() - entries.keys())
    if missing == [HEAD]:
        yield (
            f"{path}: tensors missing from the weights: {HEAD}, the output head, which config.json has no embedding "
            "stand in for (tie_word_embeddings false); use a checkpoint with its head, or take config.json from the "
            "same repository"
        )
    elif missing:
        yield f"{path}: tensors missing from the weights: {some(missing)}; download the checkpoint again"


def _unexpected(entries: Iterable[StoredWeight], path: Path) -> Iterator[str]:
    unexpected = sorted(entry.stored_name for entry in entries)
    if any("lora_" in name for name in unexpected):
        yield f"{path}: {adapter_problem(unexpected)}"
    elif unexpected:
        yield f"{path}: tensors that config.json has no place for: {some(unexpected)}; is it the right config?"


def _misshapen(tensors: list[tuple[tuple[int, ...], StoredWeight]]) -> Iterator[str]:
    wrong = [(shape, entry) for shape, entry in tensors if entry.shape not in (shape, turned(shape))]
    if wrong:
        shape, entry = wrong[0]
        others = f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        yield (
            f"{entry.file}: tensor {entry.stored_name!r} has shape {list(entry.shape)}, but config.json asks for "
            f"{list(shape)}{others}; take both from the same repository and revision"
        )


def _mistyped(entries: list[StoredWeight]) -> Iterator[str]:
    wrong = [entry for entry in entries if isinstance(entry, TensorEntry) and entry.dtype not in STORED_DTYPES]
    if wrong:
        entry = wrong[0]
        others = f" ({len(wrong) - 1} more are stored so)" if len(wrong) > 1 else ""
        yield (
            f"{entry.file}: tensor {entry.stored_name!r} is stored as {entry.dtype}{others}; "
            f"supported: {', '.join(STORED_DTYPES)}. Use the original, unquantised checkpoint"
        )
