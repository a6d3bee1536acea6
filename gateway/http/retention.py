"""How long an image is kept and by what name, as requests say it: in JSON, or in the fields of a form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.http.field_errors import validate
from gateway.images.aliases import check_alias
from gateway.images.library import Retention
from gateway.schemas.question_bodies import ImageChange
from gateway.settings import GatewaySettings
from lookonce.core.errors import ErrorKind, LookonceError, invalid

FORM_FIELDS: Mapping[str, Any] = {
    "ttl": {"type": "string", "pattern": "^[1-9][0-9]{0,9}$", "description": "seconds to keep the image"},
    "pinned": {"type": "string", "enum": ["true", "false"], "description": "keep it until it is erased"},
    "alias": {"type": "string", "minLength": 1, "maxLength": 64, "description": "a name to use in place of the id"},
}
_TRUTH = {"true": True, "false": False}


def retention_of(body: ImageChange, settings: GatewaySettings) -> Retention:
    """Within the gateway's limits. Raises INVALID_ARGUMENT; PERMISSION_DENIED for pins where there are none."""
    if body.ttl is not None and body.ttl > settings.max_image_ttl:
        text = f"'ttl' is {body.ttl} seconds, the limit is {settings.max_image_ttl:.0f}"
        raise invalid(text, param="ttl")
    if body.ttl is not None and body.pinned:
        raise invalid("give one of 'ttl' and 'pinned'", param="ttl")
    if body.pinned and not settings.pinning:
        raise LookonceError(ErrorKind.PERMISSION_DENIED, "pinning images is switched off here", param="pinned")
    alias = None if body.alias is None else check_alias(body.alias, "alias")
    pinned = False if body.ttl is not None and body.pinned is None else body.pinned
    return Retention(None if body.ttl is None else float(body.ttl), pinned, alias)


def form_change(fields: Mapping[str, str]) -> ImageChange:
    """The form fields beside the file. Raises INVALID_ARGUMENT."""
    values: dict[str, Any] = dict(fields)
    if "ttl" in fields:
        text = fields["ttl"]
        if not (text.isascii() and text.isdigit() and len(text) <= 10):
            raise invalid("'ttl' must be a whole number of seconds", param="ttl")
        values["ttl"] = int(text)
    if "pinned" in fields:
        if fields["pinned"] not in _TRUTH:
            raise invalid("'pinned' must be true or false", param="pinned")
        values["pinned"] = _TRUTH[fields["pinned"]]
    return validate(values, ImageChange)
