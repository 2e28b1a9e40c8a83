"""``sparsecontrast provision``: from ``sites.yaml`` to kits, and what changes later."""

import argparse
from pathlib import Path

from sparsecontrast.errors import ConfigError
from sparsecontrast.terminal import print_table

CHANGES = ("add", "rotate", "revoke")


def provision_options(provision: argparse.ArgumentParser) -> None:
    """Add the options of ``provision``."""
    provision.add_argument(
        "what", metavar="SITES.YAML|add|rotate|revoke", help="a plan, or a change to what was made of one"
    )
    provision.add_argument("name", nargs="?", metavar="SITE", help="of a change; rotate also takes: server")
    provision.add_argument(
        "--out", type=Path, default=Path("federation"), metavar="DIR", help="default: federation"
    )
    provision.add_argument(
        "--apply", action="store_true", help="tell the SuperLink, which runs from DIR/server, at once"
    )
    provision.epilog = "A file named like a change is given with its folder: ./add"


def provision(options: argparse.Namespace) -> None:
    """Run ``provision``."""
    from sparsecontrast.provision import change

    out = options.out
    if options.what not in CHANGES:
        _provision(options)
    elif options.name is None:
        raise ConfigError(f"provision {options.what}: name the site")
    elif options.what == "add":
        print(f"{change.add(out, options.name)}: hand it to the site")
    elif options.what == "revoke":
        print(f"{options.name}: revoked, {len(change.revoke(out, options.name))} key(s)")
    elif options.name == "server":
        print(f"{change.rotate_server(out) / 'server.pem'}: restart the SuperLink, reload the proxy")
    else:
        print(f"{change.rotate_site(out, options.name)}: hand node.key to the site, restart its node")
    if options.apply:
        print(change.apply(out), end="")
    elif options.what in CHANGES and options.name != "server":
        print(
            f"not in force before {out / 'server' / 'register.sh'} has run where the SuperLink runs; "
            f"elsewhere, copy both folders there first: rsync -a --delete {out / 'server' / 'keys'} "
            f"{out / 'server' / 'revoked'} HOST:KIT/"
        )


def _provision(options: argparse.Namespace) -> None:
    from sparsecontrast.provision.kits import provision as make
    from sparsecontrast.provision.plan import read_plan

    if options.name is not None or options.apply:
        raise ConfigError("provision SITES.YAML: takes --out only")
    path = Path(options.what)
    plan = read_plan(path)
    folders = make(plan, path.read_bytes(), options.out)
    rows = [["ca", str(folders.root / "ca"), "keep it offline"], ["server", str(folders.server), ""]]
    rows += [
        [site.name, str(folders.site(site.name)), "" if site.public_key else "has its private key"]
        for site in plan.sites
    ]
    print_table(["for", "folder", ""], rows)
    print(f"what to do with them: {folders.root / 'RUNBOOK.md'}")
