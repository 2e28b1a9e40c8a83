"""Hydra overrides as text: joined for a message, merged on resume, filtered at a site."""

from collections.abc import Iterable, Sequence

from sparsecontrast.config import split_overrides
from sparsecontrast.errors import ConfigError


def key_of(word: str) -> str:
    """Name what an override sets: ``+data@data:csv`` -> ``data``, ``~data.root`` -> ``data.root``."""
    key = word.lstrip("+~").split("=", 1)[0]
    return key.split("@", 1)[0].split(":", 1)[0].strip()


def assign(key: str, value: object) -> str:
    """Write ``key=value`` with the value quoted, so that a path survives Hydra's grammar.

    Raises:
        ConfigError: the value holds both kinds of quotes, or ends in a backslash.
    """
    text = str(value)
    quote = "'" if "'" not in text else '"'
    if quote in text or text.endswith("\\"):
        raise ConfigError(f"{key}: {text!r} cannot be written as an override; choose a plainer path")
    escaped = text.replace("${", "\\${")
    return f"{key}={quote}{escaped}{quote}"


def join(words: Iterable[str]) -> str:
    """Join overrides to one string from which ``config.split_overrides`` gives the same ones back."""
    return " ".join(word if split_overrides(word) == [word] else _quoted(word) for word in words)


def merge(first: Sequence[str], then: Sequence[str]) -> list[str]:
    """Return both lists without the overrides of the first that the second sets again."""
    again = {key_of(word) for word in then}
    return [word for word in first if key_of(word) not in again] + list(then)


def without(words: Iterable[str], keys: Sequence[str]) -> list[str]:
    """Drop the overrides of these keys and of everything below them."""
    return [w for w in words if not any(key_of(w) == k or key_of(w).startswith(f"{k}.") for k in keys)]


def _quoted(word: str) -> str:
    key, _, value = word.partition("=")
    return assign(key, value)
