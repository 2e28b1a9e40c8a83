"""Where two configurations differ, key by key."""

from collections.abc import Collection, Mapping
from typing import Any


def differences(before: Mapping[str, Any], after: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """Name each dotted key that differs, with both values; ``free`` keys, and those below them, may."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return [
        f"{key} was {_told(old, key)}, is {_told(new, key)}"
        for key in sorted({*old, *new})
        if _told(old, key) != _told(new, key) and not any(key == f or key.startswith(f"{f}.") for f in free)
    ]


def _told(leaves: Mapping[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else "not there"


def _leaves(tree: Any, where: str = "") -> list[tuple[str, Any]]:
    """Flatten nested mappings to dotted keys."""
    if isinstance(tree, Mapping) and tree:
        return [
            leaf for key, value in tree.items() for leaf in _leaves(value, f"{where}.{key}" if where else key)
        ]
    return [(where, tree)]
