"""A family that lookonce doesn't know: what somebody else's package would hold. Nothing of lookonce names it.

Its tower is a small ViT whose patches of 8 pixels are averaged two by two. In a prompt every row of an image ends with
a marker. Its text model has plain rotary positions, on one axis.
"""

from __future__ import annotations

from pathlib import Path


def install(directory: Path, model_type: str = "toy_vl", leads_to: str = "tests.toy_family.family:FAMILY") -> Path:
    """What `pip install` would leave in a directory of PYTHONPATH: an entry point."""
    metadata = directory / "toy_family-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-family\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[lookonce.families]\n{model_type} = {leads_to}\n")
    return directory
