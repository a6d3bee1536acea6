"""Which checkpoint a command means, fetched and identified once, so that the services find it ready."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from lookonce.cli.console import note
from lookonce.core.errors import CheckpointError
from lookonce.core.units import format_size
from lookonce.models.checkpoint import Checkpoint
from lookonce.models.checkpoint.check import check_checkpoint
from lookonce.models.family import unpacked_reason
from lookonce.models.registry import Half

BUNDLED = Path(__file__).resolve().parent.parent / "data" / "shapes"
"""The small trained checkpoint that the wheel carries."""
BUNDLED_POLICY = BUNDLED.with_name("shapes.yaml")
"""Rules of moderation that it can answer."""


@dataclass(frozen=True)
class Model:
    """A checkpoint as the services are told of it."""

    source: str  # --model of the services
    revision: str | None  # the commit of a hub id
    name: str
    identity: str
    weight_bytes: int
    adapter: str | None = None  # --adapter of the services: a directory
    unpacked: str | None = None  # why the packed engine can't run it


def default_model() -> str:
    """The bundled checkpoint; CheckpointError when this installation has none."""
    if not (BUNDLED / "config.json").is_file():
        raise CheckpointError(
            "--model (or LOOKONCE_MODEL) is required: a local directory or a hub id such as Qwen/Qwen2-VL-2B-Instruct"
        )
    return str(BUNDLED)


def resolve_model(source: str | None, revision: str | None = None, adapter: str | None = None) -> Model:
    """Check both halves (fetching them from the hub if need be) and identify them. Raises CheckpointError."""
    source = source or default_model()
    return identify(source, check_checkpoint(source, revision=revision, adapter=adapter).usable())


def identify(source: str, halves: Mapping[Half, Checkpoint]) -> Model:
    """What the services are told of a model. Raises CheckpointError when its halves can't work together.

    Halves of two checkpoints can where the language half's own vision half is the one that is given: the same weights
    in the same settings, as a quantised checkpoint and its original have them.
    """
    total = sum(checkpoint.weight_bytes(half) for half, checkpoint in halves.items())
    if total > 256 << 20:
        note(f"lookonce: checking {source} ({format_size(total)}; read whole the first time)")
    identities = {half: checkpoint.identity for half, checkpoint in halves.items()}
    halves[Half.VISION].known_vision_weights()  # remembered: the services find it there
    if len(set(identities.values())) > 1:
        specs = [checkpoint.encoder_spec("float32") for checkpoint in halves.values()]
        apart = [field.name for field in fields(specs[0]) if len({repr(getattr(one, field.name)) for one in specs}) > 1]
        if len({spec.fingerprint() for spec in specs}) > 1:
            raise CheckpointError(
                f"{source}: its halves come from different checkpoints ({' and '.join(sorted(identities.values()))}) "
                f"that don't share a vision half: {apart[0]} differs; run `lookonce split` again"
            )
    checkpoint = halves[Half.LANGUAGE]
    adapter = str(checkpoint.adapter.path.absolute()) if checkpoint.adapter is not None else None
    unpacked = unpacked_reason(checkpoint.family, checkpoint.config)
    identity, local = checkpoint.identity, Path(source).expanduser()
    if local.is_dir():
        return Model(str(local.absolute()), None, checkpoint.name, identity, total, adapter, unpacked)
    commit = identity.rpartition("@")[2] if identity.startswith("hub:") else None
    return Model(source, commit, checkpoint.name, identity, total, adapter, unpacked)
