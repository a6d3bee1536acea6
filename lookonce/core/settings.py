"""Settings: one small frozen class per service, and the command line made from it.

Every field becomes a flag (`--max-pixels`), an environment variable (prefix + `MAX_PIXELS`) and a line of `--help` that
shows both and the default. A flag wins over the environment; a bad value of either names itself and ends the start.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer
from pydantic import BeforeValidator, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings, SettingsConfigDict

from lookonce.core.errors import LookonceError
from lookonce.core.units import parse_duration, parse_size

S = TypeVar("S", bound="Settings")


def _reading(parse: Callable[[Any], Any]) -> BeforeValidator:
    def read(value: Any) -> Any:
        try:
            return parse(value)
        except LookonceError as error:
            raise ValueError(error.message) from None

    return BeforeValidator(read)


Bytes = Annotated[int, _reading(partial(parse_size, param="value"))]
"""A number of bytes: 1048576, "512MiB", "2GiB"."""
BytesOrNone = Annotated[int, _reading(partial(parse_size, param="value", least=0))]
"""The same, or 0."""
Seconds = Annotated[float, _reading(partial(parse_duration, param="value"))]
"""A number of seconds: 30, "10m", "7d"."""


class Settings(BaseSettings):
    """Base of every settings class; subclasses set `env_prefix`."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True)


def formerly(name: str) -> dict[str, Any]:
    """As `json_schema_extra` of a field: what it was called before. Flag and variable of that name still work."""
    return {"formerly": name}


def former_name(field: FieldInfo) -> str | None:
    """What a field was called before."""
    extra = field.json_schema_extra
    return str(extra["formerly"]) if isinstance(extra, dict) and "formerly" in extra else None


def variable(settings: type[Settings], name: str) -> str:
    """The environment variable of a field."""
    return f"{settings.model_config.get('env_prefix', '')}{name}".upper()


def _with_former_names(settings: type[Settings], flags: dict[str, Any]) -> dict[str, Any]:
    """The same with what stands in variables of former names, where neither flag nor variable says otherwise."""
    for name, field in settings.model_fields.items():
        former = former_name(field)
        if former and flags.get(name) is None and not os.environ.get(variable(settings, name)):
            flags = {**flags, name: os.environ.get(variable(settings, former)) or None}
    return flags


def load(settings: type[S], flags: dict[str, Any]) -> S:
    """Build from flags (None: not given) over the environment. Raises typer.BadParameter naming all three."""
    try:
        given = _with_former_names(settings, flags)
        return settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        lines = [_explain(settings, flags, problem) for problem in error.errors()]
        raise typer.BadParameter("; ".join(lines)) from None


def command(settings: type[S], run: Callable[[S], int]) -> typer.Typer:
    """A Typer application with one option per field; calls `run` and exits with its status."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(help=inspect.getdoc(settings))(with_options(settings, lambda flags: run(load(settings, flags))))
    return app


def with_options(
    settings: type[Settings], call: Callable[[dict[str, Any]], int], **arguments: Any
) -> Callable[..., None]:
    """A function whose signature holds an option for each field, for Typer to read. `arguments` are annotations of
    further parameters, which come before the options and reach `call` among the flags."""

    def entry(**flags: Any) -> None:
        raise typer.Exit(call(flags))

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
        for name, annotation in arguments.items()
    ]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(settings, name, field))
        for name, field in settings.model_fields.items()
    ]
    entry.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    entry.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return entry


def _option(settings: type[Settings], name: str, field: FieldInfo) -> Any:
    flag, former = "--" + name.replace("_", "-"), former_name(field)
    default = "" if field.default in (None, PydanticUndefined, "") else f"default: {field.default}; "
    need = "required; " if field.is_required() else default
    text = f"{field.description or ''} [{need}env: {variable(settings, name)}]"
    if _is_bool(field.annotation):
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False)]
    flags = [flag, "--" + former.replace("_", "-")] if former else [flag]
    return Annotated[str | None, typer.Option(*flags, help=text, show_default=False, metavar="VALUE")]


def _is_bool(annotation: Any) -> bool:
    return annotation is bool or (get_origin(annotation) is not None and bool in get_args(annotation))


def _explain(settings: type[Settings], flags: dict[str, Any], problem: Any) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if not name:
        return str(problem["msg"]).removeprefix("Value error, ")
    flag, env = "--" + name.replace("_", "-"), variable(settings, name)
    if problem["type"] == "missing":
        return f"{flag} (or {env}) is required"
    where = flag if flags.get(name) is not None else env
    return f"{where}={problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}"
