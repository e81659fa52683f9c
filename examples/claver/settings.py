"""Configurations from YAML and from plain values, typed and checked by jsonargparse, with errors that name the setting."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .config import Config

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = [
    "CONFIGS",
    "explain",
    "find_config",
    "from_dict",
    "load_config",
    "merge",
    "nearest",
    "read_yaml",
    "settings_of",
    "to_dict",
]

CONFIGS = Path(__file__).parent / "configs"


def find_config(name: str | Path) -> Path:
    """The file that a name stands for: one of `CONFIGS` without its `.yaml`, or a path.

    Raises:
        ValueError: there is none; the message has the nearest known name.
    """
    shipped = CONFIGS / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    if not Path(name).is_file():
        known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
        raise ValueError(
            f"{name}: no such configuration{nearest(str(name), known)}; give a YAML file or one of {', '.join(known)}"
        )
    return Path(name)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ValueError: a file that is no YAML, or no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable YAML file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of {', '.join(_fields(Config))}, not {values!r}")
    return values


def load_config(name: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """A configuration from a file (see `find_config`), with some settings changed.

    Raises:
        ValueError: no such file, no YAML, an unknown setting (the message has the nearest known one) or a wrong value.
    """
    path = find_config(name)
    return from_dict(merge(read_yaml(path), changes or {}), str(path))


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested dictionaries with those of `changes` laid over them."""
    merged = dict(copy.deepcopy(values))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def from_dict(values: Mapping[str, Any], source: str = "config") -> Config:
    """A configuration from nested dictionaries, as `to_dict` writes and YAML reads them; what is left out has its default.

    Raises:
        ValueError: an unknown setting (the message has the nearest known one) or a wrong value; it names `source`.
    """
    from jsonargparse import ArgumentError

    for name, value in _walk(values, Config, source):
        if name not in settings_of():
            raise ValueError(f"{source}: unknown setting {name}{nearest(name, [*_fields(Config), *settings_of()])}")
        if isinstance(value, bool) and "bool" not in settings_of()[name]:  # which Python takes for a number
            raise ValueError(f"{source}: {name} must be {settings_of()[name]}, not {value!r}")
    try:
        made = _reader().instantiate(_reader().parse_object(copy.deepcopy(dict(values))))
    except ArgumentError as error:
        raise ValueError(f"{source}: {explain(str(error))}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return Config(**{name: getattr(made, name) for name in _fields(Config)})


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries of plain values."""
    return dataclasses.asdict(config)


@lru_cache
def settings_of() -> dict[str, str]:
    """All settings with their types, as `{"train.lr": "float"}`."""
    return dict(_types(Config))


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean train.lr?)`, or nothing if no known name is near."""
    known = list(known)
    found = difflib.get_close_matches(name, known, 1) or [
        full for full in known if full.rpartition(".")[2] == name.rpartition(".")[2]
    ]
    return f" (did you mean {found[0]}?)" if found else ""


def explain(message: str) -> str:
    """jsonargparse's message about a wrong value in one line, with the type as it is written."""
    found = re.search(r'Parser key "([^"]+)":', message)
    given = re.search(r"(?:Got value|Given value): (.*)", message)
    name = found.group(1).rpartition(" ")[2] if found else ""
    kind = settings_of().get(name)
    if kind is None:  # an option that is no setting
        expected = re.search(r"Expected an? (?:<class ')?(.+?)(?:'>)?\. Got", message)
        kind = expected.group(1) if expected else None
    if kind is None or given is None:
        return " ".join(message.split())
    value = given.group(1)
    if kind.startswith("tuple") and not value.startswith("["):
        return f"{name} must be a list such as [{value}], not {value!r}"
    return f"{name} must be {kind.replace('None', 'null')}, not {value!r}"


@lru_cache
def _reader() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config)
    return parser


def _walk(values: Any, kind: Any, source: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings in nested dictionaries, as `("train.lr", 1e-5)`."""
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{source}: {prefix.rstrip('.') or 'it'} must be a mapping of {', '.join(_fields(kind))}, not {values!r}"
        )
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if dataclasses.is_dataclass(hints.get(key)):
            yield from _walk(value, hints[key], source, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _types(kind: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _types(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, str(item.type)


def _fields(kind: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(kind)]
