"""``sparsecontrast doctor --site site.yaml``: everything that can be known before the first run."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from sparsecontrast.config import anchored, check
from sparsecontrast.doctor import images, machine, pictures, server, state
from sparsecontrast.doctor.finding import Check, Finding, guarded
from sparsecontrast.errors import ConfigError
from sparsecontrast.federated.images import own_images
from sparsecontrast.overrides import key_of
from sparsecontrast.settings import Config, SiteConfig
from sparsecontrast.site_file import SiteFile, read_site_file


def examine(site_yaml: Path) -> Iterator[Finding]:
    """Check a site, as the user who runs its node; findings come as they are made.

    Args:
        site_yaml: the site's own file, in the folder of its kit.
    """
    yield from guarded("python", machine.python)
    yield from guarded("packages", machine.packages)
    yield from guarded("memory", machine.memory)
    yield from guarded("gpu", machine.gpu)
    kit = site_yaml.resolve().parent
    yield from guarded("server", lambda: server.server(kit))
    try:
        told, config, state_dir = _read(site_yaml)
    except ConfigError as error:
        yield Finding("FAIL", "site", " ".join(str(error).split()), "mend site.yaml, then come back")
        return
    yield Finding("ok", "site", f"{told.name}: privacy {config.privacy.name}, egress {told.egress.approve}")
    groups = {key_of(word).split(".")[0] for word in told.overrides}
    checks: dict[str, Check] = {
        "limits": lambda: machine.limits(told.limits),
        "disk": lambda: machine.disk(state_dir),
    }
    if "cells" in groups:
        checks["cells"] = lambda: pictures.pictures(told.overrides)
    if "data" in groups or "cells" not in groups:  # a lab of cells alone has no films
        checks["data"] = lambda: images.images(config, state_dir)
    checks |= {
        "ledger": lambda: state.ledger(config, state_dir),
        "egress": lambda: state.egress(state_dir, told.egress.approve == "manual"),
    }
    for name, one in checks.items():
        yield from guarded(name, one)


def _read(path: Path) -> tuple[SiteFile, Config, Path]:
    told = read_site_file(path)
    state_dir = anchored(told.state_dir)
    config = dataclasses.replace(
        own_images(told.overrides),
        site=SiteConfig(told.name, str(state_dir)),
        output_dir=str(state_dir),
    )
    check(config)
    return told, config, state_dir
