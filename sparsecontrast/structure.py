"""Plain mappings into checked, frozen dataclasses."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sparsecontrast.errors import ConfigError


def build(cls: Any, values: Any, where: str) -> Any:
    """Build the dataclass ``cls`` from a mapping of its fields.

    Args:
        cls: a dataclass; nested dataclasses, ``Literal``, unions and ``tuple[X, ...]`` are followed. Of a
            union of dataclasses it is the one whose field ``name``, a ``Literal``, holds the value's.
        values: plain values, as YAML gives them.
        where: the dotted path so far, for messages.

    Raises:
        ConfigError: an unknown or missing name, a value of the wrong type, or a number that is not
            finite; says which.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'config'}: expected keys of {cls.__name__}, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{where or 'config'}: unknown {unknown}; known: {sorted(known)}")
    missing = [
        name
        for name, f in known.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where or 'config'}: missing {missing}")
    return cls(**{name: _convert(hints[name], value, f"{where}{name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{where}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}={value!r}: must be one of {', '.join(map(str, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if all(map(dataclasses.is_dataclass, args)):
            return build(_named(args, value, where), value, f"{where}.")
        for option in args:
            if _fits(option, value):
                return _convert(option, value, where) if option is not type(None) else None
    elif value is None and origin is Mapping:
        return {}  # an empty mapping in YAML would be closed to Hydra; null is open
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    elif _fits(hint, value):
        _refuse_infinite(value, where)
        return _as_float(value, where) if hint is float else value
    raise ConfigError(f"{where}={value!r}: expected {getattr(hint, '__name__', hint)}")


def _named(classes: Sequence[Any], value: Any, where: str) -> Any:
    """Return the one of several dataclasses whose field ``name`` may be what the values say."""
    name = value.get("name") if isinstance(value, Mapping) else None
    names = {n: cls for cls in classes for n in typing.get_args(typing.get_type_hints(cls)["name"])}
    if name not in names:
        raise ConfigError(f"{where}.name={name!r}: must be one of {', '.join(names)}")
    return names[name]


def _as_float(value: Any, where: str) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number beyond the largest float
        raise ConfigError(f"{where}={str(value)[:12]}...: must be a finite number") from None


def _refuse_infinite(value: Any, where: str) -> None:
    """No setting means anything at infinity or not-a-number, wherever it stands."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _refuse_infinite(inner, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _refuse_infinite(inner, f"{where}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={value}: must be a finite number")


def _fits(hint: Any, value: Any) -> bool:
    kind = typing.get_origin(hint) or hint
    if kind is Literal:  # which of its values is told apart later, by name
        return any(isinstance(value, type(option)) for option in typing.get_args(hint))
    if kind in (Any, type(None)):
        return kind is Any or value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, (list, tuple) if kind is tuple else kind)
