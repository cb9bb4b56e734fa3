"""Settings: frozen dataclasses, read from TOML or JSON, written as JSON, and shown as flags.

Every field is made by `option`, which keeps its help text; the command line is generated from it.
"""

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError, unknown

T = TypeVar("T")


@dataclass(frozen=True)
class OptionInfo:
    """What a person must know of one field: help, and the possible values if they are few."""

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[str, ...]
    is_optional: bool


def option(default: Any, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    """Make a dataclass field with a help text and, if they are few, its possible values."""
    return field(default=default, metadata={"help": help, "choices": choices})


def options(cls: type) -> list[OptionInfo]:
    """List the options of a settings class in their order."""
    hints = typing.get_type_hints(cls)
    result = []
    for item in fields(cls):
        kind, is_optional = _plain(hints[item.name])
        choices = item.metadata.get("choices", ())
        text = item.metadata.get("help", "")
        result.append(OptionInfo(item.name, kind, item.default, text, choices, is_optional))
    return result


def make(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make settings from plain values.

    Raises: ConfigError for an unknown key (with the nearest one), a wrong type or value.
    """
    known = {info.name: info for info in options(cls)}
    for key in values:
        if key not in known:
            raise ConfigError(unknown("setting", key, known))
    return cls(**{key: _fit(known[key], value) for key, value in values.items()})


def read(cls: type[T], path: Path) -> T:
    """Read settings from a .toml or .json file.

    Raises: ConfigError if the file is missing, is neither, or does not fit.
    """
    return make(cls, read_mapping(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a .toml or .json file of settings.

    Raises: ConfigError if the file is missing or damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else _toml(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings by name, not {type(values).__name__}")
    return values


def to_dict(settings: Any) -> dict[str, Any]:
    """Give settings as JSON values."""
    return asdict(settings)


def _toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib
    values: dict[str, Any] = tomllib.loads(text)
    return values


def _plain(hint: Any) -> tuple[type, bool]:
    """Give the type behind `X | None`, and whether None is possible."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return inner[0], len(inner) < len(typing.get_args(hint))
    return hint, False


def _fit(info: OptionInfo, value: Any) -> Any:
    if value is None and info.is_optional:
        return None
    if info.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, info.type) or (info.type is int and isinstance(value, bool)):
        raise ConfigError(f"{info.name} must be {info.type.__name__}, not {value!r}")
    if info.choices and value not in info.choices:
        raise ConfigError(unknown(info.name, str(value), info.choices))
    return value
