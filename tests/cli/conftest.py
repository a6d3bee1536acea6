"""The command line as a user runs it: real subprocesses, a tiny random-weight checkpoint, real images on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lookonce.models.qwen2_vl.synthetic import make_random_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return make_random_checkpoint(tmp_path_factory.mktemp("model") / "tiny", size="tiny")


@pytest.fixture(scope="session")
def image_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "red.png"
    image = Image.new("RGB", (120, 90), "white")
    image.paste((220, 20, 20), (20, 20, 70, 70))
    image.save(path)
    return path
