"""A hospital's own file, ``site.yaml``: who the site is, where it keeps what must last, what may leave.

Keys: ``name``, ``state_dir`` (ledger, optimizer, projector, client.log), ``overrides`` (of data, cells,
privacy and backbone), ``egress`` (``{approve: manual}``: a person looks at each release), and what
``client/sentinel.py`` holds to: ``app`` (``installed``, or digests of the bundles that may run) and
``limits`` (of an answer).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsecontrast.errors import ConfigError
from sparsecontrast.overrides import key_of
from sparsecontrast.ranges import INF, check_range
from sparsecontrast.structure import build

PINNED = ("data", "cells", "privacy", "backbone")  # what a site's file may set
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"(?!\.)[^\x00-\x1f/\\]{1,64}")


@dataclass(frozen=True)
class EgressPolicy:
    """What a site's file may say under ``egress``.

    Attributes:
        approve: ``auto``, or ``manual``: a person approves each round's weights.
        wait_seconds: for that person.
        max_norm_ratio: see ``payload.verify``.
    """

    approve: Literal["auto", "manual"] = "auto"
    wait_seconds: float = 600.0
    max_norm_ratio: float = 10.0


@dataclass(frozen=True)
class Limits:
    """What one answer may take, under ``limits``; a run that asks for more is refused.

    Attributes:
        seconds: wall clock, the wait for a person's approval included. Of itself six hours: the first answer
            decodes every image of the site. A run waits ``federation.round_timeout``, an hour of itself.
        memory_gib: of the process; None for no limit.
        threads: that a run may ask for; None for no limit, here and below.
        max_image_size: pixels of a side, of images as they are kept and as the backbone sees them.
        max_batch_size: images of one step.
    """

    seconds: float = 21600.0
    memory_gib: float | None = None
    threads: int | None = 32
    max_image_size: int | None = 1024
    max_batch_size: int | None = 1024


@dataclass(frozen=True)
class SiteFile:
    """What a site's file says, checked; overrides are not composed yet.

    Attributes:
        name: of the site, as the server will know it.
        state_dir: as written; ``config.anchored`` makes it absolute.
        overrides: of ``PINNED`` alone.
        egress: how answers leave.
        limits: of time, memory, threads and sizes.
        app: ``installed``, or the SHA-256 of each bundle that may run.
    """

    name: str
    state_dir: str
    overrides: list[str]
    egress: EgressPolicy
    limits: Limits = Limits()
    app: Literal["installed"] | tuple[str, ...] = "installed"


def parse_site_file(path: Path, text: str) -> SiteFile:
    """Read the text of a site's file.

    Args:
        path: for messages.
        text: YAML.

    Raises:
        ConfigError: not YAML, an unknown key, or a value out of range.
    """
    import yaml

    try:
        told: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"site-config={path}: cannot be read as YAML ({error})") from error
    needed, more = {"name", "state_dir"}, {"overrides", "egress", "limits", "app"}
    if not isinstance(told, dict) or not needed <= set(told) <= needed | more:
        raise ConfigError(
            f"{path}: must hold the keys name and state_dir, and may hold {', '.join(sorted(more))}"
        )
    words = told.get("overrides") or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{path}: overrides must be a list of key=value")
    foreign = [word for word in words if key_of(word).split(".")[0] not in PINNED]
    if foreign:
        raise ConfigError(f"{path}: overrides {foreign}: a site sets {', '.join(PINNED)} only")
    policy = build(EgressPolicy, told.get("egress") or {}, f"{path}: egress.")
    check_range(f"{path}: egress.wait_seconds", policy.wait_seconds, (0, INF, "[)"))
    check_range(f"{path}: egress.max_norm_ratio", policy.max_norm_ratio, (1, INF, "()"))
    limits = build(Limits, told.get("limits") or {}, f"{path}: limits.")
    check_range(f"{path}: limits.seconds", limits.seconds, (0, INF, "()"))
    if limits.memory_gib is not None:
        check_range(f"{path}: limits.memory_gib", limits.memory_gib, (0, INF, "()"))
    for key in ("threads", "max_image_size", "max_batch_size"):
        if (most := getattr(limits, key)) is not None:
            check_range(f"{path}: limits.{key}", most, (1, INF, "[)"))
    name, state_dir = checked_name(str(told["name"])), str(told["state_dir"])
    return SiteFile(name, state_dir, words, policy, limits, _app(path, told.get("app", "installed")))


def _app(path: Path, told: Any) -> Any:
    if told == "installed":
        return told
    if not isinstance(told, list) or not told or not all(_SHA256.fullmatch(str(one)) for one in told):
        raise ConfigError(
            f"{path}: app must be installed, or a list of SHA-256 digests of 64 hexadecimal digits"
        )
    return tuple(told)


def read_site_file(path: Path) -> SiteFile:
    """Read a site's file.

    Raises:
        ConfigError: it cannot be read, or is not in order.
    """
    try:
        return parse_site_file(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"site-config={path}: cannot be read ({error})") from error


def checked_name(name: str) -> str:
    """Return the name of a site.

    Raises:
        ConfigError: it could not be the name of a folder, or of a row in a table.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"site name {name!r}: at most 64 characters, no slashes, no leading dot")
    return name
