"""Engines that lookonce doesn't know: what somebody else's package would hold. Nothing of lookonce names them."""

from __future__ import annotations

from pathlib import Path


def install(directory: Path) -> Path:
    """What `pip install` would leave in a directory of PYTHONPATH: entry points."""
    metadata = directory / "other_engines-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-engines\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[lookonce.engines]\n"
        "turns = tests.other_engines.plain:PlainBuilder\n"
        "echo = tests.other_engines.echo:EchoBuilder\n"
        "broken = tests.other_engines.missing:Builder\n"
    )
    return directory
