"""Environment variables of a container against the settings class that will read them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from unittest import mock

import typer

from gateway.auth import Keyring, Quota, read_keys
from gateway.settings import GatewaySettings
from lm_service.settings import LanguageSettings
from lookonce.core.errors import LookonceError
from lookonce.core.settings import Settings, load, variable
from vision_service.settings import VisionSettings

CLASSES: dict[str, type[Settings]] = {
    "gateway": GatewaySettings,
    "vision": VisionSettings,
    "language": LanguageSettings,
}
_OTHERS = {"LOOKONCE_CACHE_DIR"}


def check_environment(where: str, part: str, environment: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with the variables of one service: unknown ones, bad values, an unset model."""
    settings = CLASSES[part]
    known = {variable(settings, name) for name in settings.model_fields} | _OTHERS
    ours = {name: value for name, value in environment.items() if name.startswith("LOOKONCE_")}
    for name in sorted(ours.keys() - known):
        yield f"{where}: {name} is no setting of the {part} service"
    with mock.patch.dict(os.environ, ours, clear=True):
        try:
            load(settings, {})
        except typer.BadParameter as error:
            yield f"{where}: {error.message}"


def check_keys(where: str, keys: str) -> Iterator[str]:
    """What is wrong with API keys."""
    try:
        Keyring(read_keys(keys, None), secret="", share_embeddings=False, quota=Quota(0, 0))
    except LookonceError as error:
        yield f"{where}: {error.message}"
