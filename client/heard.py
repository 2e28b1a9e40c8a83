"""Which of a server's words a site hears: plain values of keys that are not the site's own.

A message brings overrides in Hydra's grammar, and that grammar can do more than set a number: it can read
the environment (``${oc.env:NAME}``), look for configurations in folders of this machine
(``hydra.searchpath``, ``method=../../x``) and put one group in the place of another (``group@package``).
A site composes none of these. Words about what the site owns are dropped unread before that.
"""

import re
from collections.abc import Sequence

from sparsecontrast.config import CONFIG_DIR
from sparsecontrast.errors import OverrideRefusedError
from sparsecontrast.overrides import key_of, without

# the server's word on these is not heard,
OWN = ("data", "cells", "privacy", "site", "audit", "output_dir", "resume", "init")
RUNS = ("cells.classes",)  # but on these it is: they are the size of the network
_KEY = re.compile(r"(?:\+{0,2}|~)([A-Za-z_]\w*(?:\.\w+)*)", re.ASCII)
_CHOICE = re.compile(r"(['\"]?)[A-Za-z0-9_-]+\1", re.ASCII)


def heard(words: Sequence[str]) -> list[str]:
    """Return the words that a site composes.

    Args:
        words: overrides from a message.

    Raises:
        OverrideRefusedError: one of them would do more than set a value.
    """
    found = [word for word in words if key_of(word) in RUNS or without([word], OWN)]
    for word in found:
        _check(word)
    return found


def _check(word: str) -> None:
    key, _, value = word.partition("=")
    told = _KEY.fullmatch(key)
    if told is None or told[1].split(".")[0] == "hydra":
        raise OverrideRefusedError(f"{word!r}: a server may set plain keys alone, and nothing of Hydra's own")
    # a lone $ too: Hydra takes the backslash out of $\{ and resolves what is left
    if "$" in word:
        raise OverrideRefusedError(f"{word!r}: a server may not have anything looked up here")
    chosen = (CONFIG_DIR / told[1]).is_dir()  # a mapping sets values; anything else names a file
    if chosen and value and not value.startswith("{") and not _CHOICE.fullmatch(value):
        raise OverrideRefusedError(f"{word!r}: must be the name of a configuration that comes with the app")
