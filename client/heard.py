"""Which of a server's words a site hears: plain values of keys that are not the site's own, within limits.

A message brings overrides in Hydra's grammar, and that grammar can do more than set a number: it can read
the environment (``${oc.env:NAME}``), look for configurations in folders of this machine
(``hydra.searchpath``, ``method=../../x``) and put one group in the place of another (``group@package``).
A site composes none of these. Words about what the site owns are dropped unread before that; ``client.log``
names each of them.
"""

import re
from collections.abc import Sequence

from sparsecontrast.config import CONFIG_DIR
from sparsecontrast.errors import LimitError, OverrideRefusedError
from sparsecontrast.federated import RunConfig
from sparsecontrast.overrides import key_of, without
from sparsecontrast.site_file import Limits

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


def unheard(words: Sequence[str], asked: RunConfig, pinned: bool) -> tuple[str, ...]:
    """Name what the server said in vain: keys alone, sorted.

    Args:
        words: of the message.
        asked: what those that are heard compose to; an experiment may say things too.
        pinned: whether the site's own file sets the backbone.
    """
    found = heard(words)
    keys = {key_of(word) for word in words if word not in found}
    if asked.privacy.name != "none":
        keys.add("privacy")
    if (backbone := getattr(asked, "backbone", None)) is not None:
        if backbone.pretrained:
            keys.add("backbone.pretrained")
        if pinned:
            keys |= {key for word in found if (key := key_of(word)).split(".")[0] == "backbone"}
    return tuple(sorted(keys))


def hold_to(limits: Limits, config: RunConfig) -> None:
    """Refuse a run that asks for more than the site gives.

    Raises:
        LimitError: says for how much, and what the site's file allows.
    """
    size = limits.max_image_size
    bounds = {
        "train.threads": limits.threads, "train.batch_size": limits.max_batch_size,
        "train.image_size": size, "backbone.img_size": size, "data.image_size": size,
    }  # fmt: skip
    for key, most in bounds.items():
        group, _, name = key.partition(".")
        number = getattr(getattr(config, group, None), name, None)
        if most is not None and number is not None and number > most:
            raise LimitError(f"{key}={number}: the limits of this site's file allow {most}")


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
