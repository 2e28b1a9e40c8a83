"""One command each: a site joins, gets a new key, leaves; the server gets a new certificate.

The server's kit always says how things should be, in ``keys/`` and ``revoked/``; ``register.sh`` makes it so,
on the machine where the SuperLink runs, as soon as both folders are there.
Each command can be cut off anywhere, and run again.
"""

import os
import subprocess
from pathlib import Path

from sparsecontrast.durable import new_folder, sync_folder
from sparsecontrast.errors import ConfigError, FederationError
from sparsecontrast.provision.authority import fingerprint, public_key
from sparsecontrast.provision.kits import (
    PLAN,
    Folders,
    write_runbook,
    write_server_certificate,
    write_site,
    write_site_key,
)
from sparsecontrast.provision.plan import Plan, PlannedSite, read_plan


def add(out: Path, name: str) -> Path:
    """Make the kit of a site that was added to ``sites.yaml``; returns its folder.

    Raises:
        ConfigError: ``sites.yaml`` does not know it, it has a kit already, or its own key was revoked.
        StorageError: the disk does not take it.
    """
    folders, plan = _opened(out)
    site, kit = plan.site(name), folders.site(name)
    if kit.exists():
        raise ConfigError(
            f"{kit}: is there already; its key is not made anew but by `provision rotate {name}`"
        )
    own = _own_key(folders, site)
    for key in _keys(folders, name):  # of an attempt that was cut off: nobody holds its other half
        if key.name != own:
            _move(key, folders.revoked)
    with new_folder(kit) as scratch:
        write_site(plan, site, folders.authority(), scratch, folders.keys)
    write_runbook(plan, out)
    return kit


def rotate_site(out: Path, name: str) -> Path:
    """Give a site a new key, and take the old one out of use; returns its kit.

    Raises:
        ConfigError: no such site, it was revoked, or its own public key in ``sites.yaml`` is an old one.
        StorageError: the disk does not take it.
    """
    folders, plan = _opened(out)
    kit = folders.site(name)
    if not (kit / "node.pub").exists():
        raise ConfigError(f"{kit}: no kit with a key; was {name!r} revoked? `provision add {name}` makes one")
    site = plan.site(name)
    if site.public_key is not None and site.public_key.split()[1] in (kit / "node.pub").read_text():
        raise ConfigError(f"{name!r} makes its keys itself: put its new public_key into {out / PLAN} first")
    _own_key(folders, site)
    known = write_site_key(site, kit, folders.keys)
    for key in _keys(folders, name):
        if key != known:
            _move(key, folders.revoked)
    return kit


def rotate_server(out: Path) -> Path:
    """Give the server a new key and certificate of the same authority; returns its kit.

    Raises:
        ConfigError: the authority is not here.
        StorageError: the disk does not take it.
    """
    folders, plan = _opened(out)
    write_server_certificate(plan, folders.authority(), folders.server)
    return folders.server


def revoke(out: Path, name: str) -> list[Path]:
    """Take a site's keys out of use, and its kit away; returns the keys.

    Raises:
        ConfigError: it has no key.
        StorageError: the disk does not take it.
    """
    folders, _ = _opened(out)
    keys = _keys(folders, name)
    kit = folders.site(name)
    if not keys and not kit.exists():
        known = sorted({path.name.split(".")[0] for path in folders.keys.glob("*.pub")})
        raise ConfigError(f"{name!r}: has no key here; there are {', '.join(known) or 'none'}")
    moved = [_move(key, folders.revoked) for key in keys]
    if kit.exists():
        aside = kit.with_name(f".revoked-{name}")
        number = 1
        while aside.exists():
            number += 1
            aside = kit.with_name(f".revoked-{name}-{number}")
        kit.rename(aside)
    return moved


def apply(out: Path) -> str:
    """Run ``register.sh`` of the server's kit; returns what it said.

    Raises:
        FederationError: it failed.
    """
    script = Folders(out).server / "register.sh"
    done = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FederationError(f"{script}: {done.stdout.strip()} {done.stderr.strip()}; run it again")
    return done.stdout


def _opened(out: Path) -> tuple[Folders, Plan]:
    folders = Folders(out)
    if not (folders.server / "server.pem").exists():
        raise ConfigError(
            f"{out}: no federation; `sparsecontrast provision sites.yaml --out {out}` makes one"
        )
    return folders, read_plan(out / PLAN)


def _own_key(folders: Folders, site: PlannedSite) -> str | None:
    """File name of the public key that a site made itself; None where it is given one.

    Raises:
        ConfigError: it was revoked. Its holder may not come back with it; Flower takes no key twice.
    """
    if site.public_key is None:
        return None
    mark = fingerprint(public_key(site.public_key, f"sites.{site.name}.public_key"))
    if gone := sorted(folders.revoked.glob(f"*.{mark}.pub")):
        raise ConfigError(f"{gone[0]}: the key of {site.name!r} was revoked; it has to make a new one")
    return f"{site.name}.{mark}.pub"


def _keys(folders: Folders, name: str) -> list[Path]:
    return [path for path in sorted(folders.keys.glob("*.pub")) if path.name.split(".")[0] == name]


def _move(key: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    there = folder / key.name
    os.replace(key, there)
    sync_folder(folder)
    return there
