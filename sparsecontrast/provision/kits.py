"""From a plan to folders: one for the server, one for each hospital, one that stays where it is.

ca/              ca.crt, ca.key: signs, and is kept offline
server/          what the server's machine gets
sites/NAME/      what a hospital gets
sites.yaml, RUNBOOK.md
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sparsecontrast.config import anchored
from sparsecontrast.durable import new_folder, write_bytes
from sparsecontrast.errors import ConfigError
from sparsecontrast.federated.cells import own_cells
from sparsecontrast.provision.authority import (
    Authority,
    fingerprint,
    new_authority,
    public_key,
    read_authority,
    server_pem,
    site_key,
)
from sparsecontrast.provision.plan import Plan, PlannedSite, site_config, site_yaml, split_address

SECRET = 0o600
PROGRAM = 0o755
PLAN = "sites.yaml"


@dataclass(frozen=True)
class Folders:
    """Where things lie in a federation's folder."""

    root: Path

    @property
    def server(self) -> Path:
        """The server's kit."""
        return self.root / "server"

    @property
    def keys(self) -> Path:
        """Public keys that are to be registered, ``NAME.FINGERPRINT.pub``."""
        return self.server / "keys"

    @property
    def revoked(self) -> Path:
        """Public keys that are not to be registered any more."""
        return self.server / "revoked"

    def site(self, name: str) -> Path:
        """A hospital's kit."""
        return self.root / "sites" / name

    def authority(self) -> Authority:
        """Read who signs.

        Raises:
            ConfigError: it is not here.
        """
        return read_authority(self.root / "ca" / "ca.crt", self.root / "ca" / "ca.key")


def provision(plan: Plan, source: bytes, out: Path) -> Folders:
    """Make a federation's folder, whole or not at all.

    Args:
        plan: what ``source`` says.
        source: ``sites.yaml``, kept beside what was made of it.
        out: must not exist, or be empty.

    Raises:
        ConfigError: something is there already; no key is ever overwritten.
        StorageError: the disk does not take it.
    """
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise ConfigError(
            f"{out}: is there already, and its keys are not made anew. Add a site to {out / PLAN} and run "
            "`sparsecontrast provision add SITE`; or choose another --out"
        )
    authority = new_authority(plan.federation, plan.days.authority)
    with new_folder(out) as scratch:
        folders = Folders(scratch)
        scratch.chmod(0o700)
        write_bytes(scratch / "ca" / "ca.crt", authority.certificate_pem)
        write_bytes(scratch / "ca" / "ca.key", authority.key_pem, SECRET)
        write_bytes(scratch / PLAN, source)
        _write_server(plan, authority, folders)
        for site in plan.sites:
            with new_folder(folders.site(site.name)) as kit:
                write_site(plan, site, authority, kit, folders.keys)
        write_runbook(plan, scratch)
    return Folders(out)


def write_site(plan: Plan, site: PlannedSite, authority: Authority, kit: Path, keys: Path) -> None:
    """Write a hospital's kit into an empty folder, and its public key among the server's.

    Raises:
        ConfigError: the site's own overrides cannot be.
        StorageError: the disk does not take it.
    """
    more = {"plan": plan, "site": site}
    kit.chmod(0o700)
    write_bytes(kit / "ca.crt", authority.certificate_pem)
    _write(kit, "settings.env", "settings.site", more)
    _write(kit, "environment.sh", "environment.sh", more | {"command": "flower-supernode"})
    _write(kit, "supernode.sh", "supernode.sh", more)
    for program in ("flower-superexec", "flwr-clientapp"):
        _write(kit, f"bin/{program}", program, more)
    _write(kit, "health.sh", "health.site", more)
    _write(kit, "site.yaml", "site.yaml", more | {"body": site_yaml(site).rstrip()})
    unit = {"what": f"site {site.name}", "script": "supernode.sh", "state_dir": site.state_dir}
    writes = f"{plan.install.kit} {site.state_dir}"
    _write(kit, "supernode.service", "service", more | unit | {"writes": writes})
    volumes = [(site.state_dir, ""), *((path, ":ro") for path in _data_paths(site))]
    _write(kit, "compose.yaml", "compose.yaml", more | unit | {"service": "supernode", "volumes": volumes})
    _write(kit, "compose.sh", "compose.sh", unit)
    write_site_key(site, kit, keys)


def write_site_key(site: PlannedSite, kit: Path, keys: Path) -> Path:
    """Make a key pair for a site, unless it has its own: first the server learns it, then the site holds it.

    Returns:
        The public key among the server's.
    """
    if site.public_key is not None:
        private, public = None, public_key(site.public_key, f"sites.{site.name}.public_key")
    else:
        private, public = site_key(site.name)
    known = keys / f"{site.name}.{fingerprint(public)}.pub"
    write_bytes(known, public)
    if private is not None:
        write_bytes(kit / "node.key", private, SECRET)
    write_bytes(kit / "node.pub", public)
    return known


def write_server_certificate(plan: Plan, authority: Authority, kit: Path) -> None:
    """Make a new key and certificate for the server; both change in one moment."""
    host, _ = split_address(plan.server.address, "server.address")
    bind, _ = split_address(plan.server.bind, "server.bind")
    # the SuperLink's own processes, and the proxy, reach it under the last three
    names = [host, *plan.server.names, bind, "localhost", "127.0.0.1"]
    write_bytes(kit / "server.pem", server_pem(authority, names, plan.days.server), SECRET)


def write_runbook(plan: Plan, folder: Path) -> None:
    """Write the page that people read."""
    _write(folder, "RUNBOOK.md", "RUNBOOK.md", {"plan": plan, "days_left": plan.days.server})


def _write_server(plan: Plan, authority: Authority, folders: Folders) -> None:
    kit = folders.server
    more: dict[str, Any] = {"plan": plan}
    write_bytes(kit / "ca.crt", authority.certificate_pem)
    kit.chmod(0o700)
    write_server_certificate(plan, authority, kit)
    _write(kit, "settings.env", "settings.server", more)
    _write(kit, "environment.sh", "environment.sh", more | {"command": "flower-superlink"})
    for name in ("superlink.sh", "register.sh", "flower.sh"):
        _write(kit, name, name, more)
    _write(kit, "health.sh", "health.server", more)
    _write(kit, "flower/config.toml", "config.toml", more)
    unit = {"what": f"federation {plan.federation}: SuperLink", "script": "superlink.sh", "state_dir": ""}
    _write(kit, "superlink.service", "service", more | unit | {"writes": plan.install.kit})
    _write(kit, "compose.yaml", "compose.yaml", more | unit | {"service": "superlink", "volumes": []})
    _write(kit, "compose.sh", "compose.sh", unit)
    for folder in (folders.keys, folders.revoked):
        folder.mkdir()
    if plan.server.proxied:
        public, port = split_address(plan.server.address, "server.address")
        _write(kit, "nginx.conf", "nginx.conf", more | {"host": public, "port": port})


def _data_paths(site: PlannedSite) -> list[str]:
    """Folders that a site's container must see."""
    data = site_config(site).data
    found = [str(anchored(data.root))] if data.root else []
    found += [str(anchored(data.index).parent)] if data.index else []
    pictures = own_cells(site.overrides).root
    return found + ([str(anchored(pictures))] if pictures else [])


def _write(folder: Path, name: str, template: str, more: dict[str, Any]) -> None:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    text = templates.get_template(f"{template}.j2").render(more)
    program = name.startswith("bin/") or (name.endswith(".sh") and name != "environment.sh")
    mode = PROGRAM if program else 0o644
    write_bytes(folder / name, text.encode(), mode)
