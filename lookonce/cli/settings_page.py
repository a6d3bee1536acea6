"""`python -m lookonce.cli.settings_page`: docs/settings.md, made from the settings classes so that it can't drift."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from lookonce.cli.up import UpSettings
from lookonce.core.settings import Settings, variable

HEADER = """# Settings

Every setting is a flag and an environment variable. A flag wins over its variable, a variable over the default. Sizes
may be written `512MiB`, `2GB`; durations `250ms`, `30s`, `10m`, `7d`. A bad value ends the start, naming variable and
value.

`lookonce up` hands its own flags to the services; what it has no flag for is set through the service's variable, for
example `LOOKONCE_GATEWAY_MAX_IMAGE_BYTES=50MiB lookonce up`. This page is made by `make settings-docs`.
"""


def settings_classes() -> dict[str, type[Settings]]:
    """The command that reads each settings class."""
    from gateway.settings import GatewaySettings
    from lm_service.settings import LanguageSettings
    from lookonce.moderation.batch.settings import ModerateSettings
    from vision_service.settings import VisionSettings

    return {
        "lookonce up": UpSettings,
        "lookonce moderate": ModerateSettings,
        "python -m vision_service": VisionSettings,
        "python -m lm_service": LanguageSettings,
        "python -m gateway": GatewaySettings,
    }


def reference() -> str:
    """The whole page in Markdown."""
    parts = [HEADER]
    for name, settings in settings_classes().items():
        parts.append(f"## `{name}`\n\n{inspect.getdoc(settings)}\n")
        parts.append("| flag | variable | default | meaning |\n|---|---|---|---|\n" + "\n".join(_rows(settings)) + "\n")
    return "\n".join(parts)


def _rows(settings: type[Settings]) -> Iterator[str]:
    for name, field in settings.model_fields.items():
        meaning = (field.description or "").replace("|", "\\|")
        flag = "--" + name.replace("_", "-")
        yield f"| `{flag}` | `{variable(settings, name)}` | {_default(field.default)} | {meaning} |"


def _default(value: object) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    return "" if value is None or value == "" else f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(reference())
