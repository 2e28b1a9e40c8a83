"""``sites.yaml``: what a federation is to look like, checked before a single key is made."""

import dataclasses
import ipaddress
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecontrast.config import check
from sparsecontrast.errors import ConfigError
from sparsecontrast.federated.cells import own_cells
from sparsecontrast.federated.images import own_images
from sparsecontrast.provision.authority import public_key
from sparsecontrast.ranges import check_range
from sparsecontrast.settings import Config
from sparsecontrast.site_file import EgressPolicy, Limits, parse_site_file
from sparsecontrast.structure import build

RESERVED = ("server", "ca")  # names of things that are no site
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(?:\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")
_PLAIN_PATH = re.compile(r"/[\w./-]*")  # goes into shell scripts, unit files and nginx as it stands


@dataclass(frozen=True)
class Server:
    """The coordinating side.

    Attributes:
        address: ``host:port`` that the sites dial; the proxy's, unless it is ``bind``.
        bind: ``127.x.y.z:port`` of the SuperLink itself. Never another machine's business: who reaches it
            may submit runs.
        health: ``host:port`` of its gRPC health service, in clear text.
        names: further names and addresses for the certificate.
    """

    address: str
    bind: str = "127.0.0.1:9092"
    health: str = "127.0.0.1:9093"
    names: tuple[str, ...] = ()

    @property
    def proxied(self) -> bool:
        """Whether the sites talk to a proxy before the SuperLink."""
        return self.address != self.bind


@dataclass(frozen=True)
class PlannedSite:
    """One hospital.

    Attributes:
        name: lower-case letters, digits and hyphens; names folders, keys and services.
        state_dir: absolute, on the hospital's machine.
        overrides: of data, cells, privacy and backbone, as in ``site.yaml``.
        egress: how answers leave.
        limits: of one answer: time, memory, threads, sizes of images and batches.
        app: ``installed``, or the SHA-256 of each bundle that may run.
        bind: ``127.x.y.z:port`` on which the SuperNode talks to its own client processes.
        health: ``127.x.y.z:port`` of its gRPC health service.
        public_key: in OpenSSH's format, of a pair that the hospital made itself; null makes one for it.
    """

    name: str
    state_dir: str
    overrides: tuple[str, ...] = ()
    egress: EgressPolicy = EgressPolicy()
    limits: Limits = Limits()
    app: str | tuple[str, ...] = "installed"
    bind: str = "127.0.0.1:9095"
    health: str = "127.0.0.1:9096"
    public_key: str | None = None


@dataclass(frozen=True)
class Days:
    """How long certificates are valid."""

    authority: int = 3650
    server: int = 397


@dataclass(frozen=True)
class Install:
    """Where kits will lie on their machines, and who runs them; for unit files, compose and nginx."""

    kit: str = "/opt/sparsecontrast/kit"
    venv: str = "/opt/sparsecontrast/venv"
    user: str = "sparsecontrast"


@dataclass(frozen=True)
class Plan:
    """``sites.yaml``."""

    federation: str
    server: Server
    sites: tuple[PlannedSite, ...]
    days: Days = Days()
    install: Install = Install()

    def site(self, name: str) -> PlannedSite:
        """Return a site by its name.

        Raises:
            ConfigError: there is none.
        """
        found = [site for site in self.sites if site.name == name]
        if not found:
            known = ", ".join(site.name for site in self.sites)
            raise ConfigError(f"{name!r}: no such site in sites.yaml; it has {known}")
        return found[0]


def read_plan(path: Path) -> Plan:
    """Read ``sites.yaml``.

    Raises:
        ConfigError: it cannot be read, or says what cannot be; names the key.
    """
    import yaml

    try:
        told: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        plan: Plan = build(Plan, told, "")
        _check(plan)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return plan


def site_yaml(site: PlannedSite) -> str:
    """Write what the hospital's own file says, without comments."""
    import yaml

    told = {
        "name": site.name,
        "state_dir": site.state_dir,
        "overrides": list(site.overrides),
        "egress": dataclasses.asdict(site.egress),
        "limits": dataclasses.asdict(site.limits),
        "app": site.app if isinstance(site.app, str) else list(site.app),
    }
    return yaml.safe_dump(told, sort_keys=False, width=1000)


def site_config(site: PlannedSite) -> Config:
    """Compose what a site's own overrides say of its data and privacy.

    Raises:
        ConfigError: they cannot be.
    """
    told = parse_site_file(Path(f"sites.{site.name}"), site_yaml(site))
    config = own_images(told.overrides)
    check(config)
    own_cells(told.overrides)
    return config


def split_address(text: str, where: str) -> tuple[str, int]:
    """Read ``host:port``; an IPv6 host stands in brackets, which are taken off.

    Raises:
        ConfigError: it is none.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not (colon and port.isdecimal() and 0 < int(port) < 65536 and (_HOST.fullmatch(host) or _ip(host))):
        raise ConfigError(f"{where}={text!r}: must be host:port")
    return host, int(port)


def _check(plan: Plan) -> None:
    _check_name("federation", plan.federation)
    for key in ("authority", "server"):
        check_range(f"days.{key}", getattr(plan.days, key), (1, 36500, "[]"))
    for key in ("kit", "venv"):
        _check_path(f"install.{key}", getattr(plan.install, key))
    if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", plan.install.user):
        raise ConfigError(f"install.user={plan.install.user!r}: not the name of a user")
    split_address(plan.server.address, "server.address")
    _check_loopback("server.bind", plan.server.bind)
    split_address(plan.server.health, "server.health")
    for name in plan.server.names:
        if not (_HOST.fullmatch(name) or _ip(name)):
            raise ConfigError(f"server.names: {name!r} is not the name of a machine")
    if not plan.sites:
        raise ConfigError("sites: none")
    for name, count in Counter(site.name for site in plan.sites).items():
        if count > 1:
            raise ConfigError(f"sites: {name!r} stands there {count} times")
    for site in plan.sites:
        _check_site(site)


def _check_site(site: PlannedSite) -> None:
    _check_name("sites: name", site.name)
    where = f"sites.{site.name}"
    if site.name in RESERVED:
        raise ConfigError(f"{where}: this name is taken; choose another")
    _check_path(f"{where}.state_dir", site.state_dir)
    _check_loopback(f"{where}.bind", site.bind)
    _check_loopback(f"{where}.health", site.health)
    if site.public_key is not None:
        public_key(site.public_key, f"{where}.public_key")
    site_config(site)


def _check_name(where: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}={name!r}: 1 to 32 lower-case letters, digits and inner hyphens")


def _check_path(where: str, path: str) -> None:
    if not _PLAIN_PATH.fullmatch(path) or ".." in path.split("/"):
        raise ConfigError(f"{where}={path!r}: must be absolute, of letters, digits and _ . - /")


def _check_loopback(where: str, address: str) -> None:
    host, _ = split_address(address, where)
    ip = _ip(host)
    if ip is None or ip.version != 4 or not ip.is_loopback:
        raise ConfigError(
            f"{where}={address!r}: must be a loopback address such as 127.0.0.1:9092. Whoever reaches the "
            "SuperLink's port may submit runs, so a proxy faces the sites; nodes need no open port at all"
        )


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
