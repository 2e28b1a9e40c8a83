"""Can this node reach its server, believe it, and be believed: kit, certificate, clock."""

import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from sparsecontrast.doctor.finding import Finding
from sparsecontrast.errors import ConfigError
from sparsecontrast.provision.health import Reason, UnreachableError, ask_date, ask_http

SETTINGS = "settings.env"
DAYS = 30  # of validity left below which there is a warning
AHEAD, BEHIND = 5, 300  # seconds: Flower refuses what was signed later, or longer ago
DRIFT = 2  # seconds; the server tells whole ones

REMEDIES: dict[Reason, str] = {
    "unreachable": "is the server up, and the way to it open? ./health.sh on the server's side tells",
    "authority": "ask for the ca.crt of this federation, over the phone compare its SHA-256",
    "name": "ask for a certificate with the name in SUPERLINK (settings.env): server.names in sites.yaml",
    "expired": "ask for a new one: sparsecontrast provision rotate server",
    "not_tls": "SUPERLINK in settings.env names something else, or somebody listens in: do not go on",
    "certificate": "ask whoever runs the server",
    "answer": "the port is open, but not Flower's: check SUPERLINK in settings.env, and the proxy",
}


def server(kit: Path) -> Iterator[Finding]:
    """Ask the server as the node will.

    Args:
        kit: folder of ``site.yaml``, where provisioning put settings, key and authority.
    """
    try:
        address = read_settings(kit / SETTINGS)["SUPERLINK"]
    except (OSError, KeyError):
        remedy = f"put {SETTINGS}, ca.crt and node.key of the kit beside site.yaml"
        yield Finding("FAIL", "server", f"no SUPERLINK in {SETTINGS}", remedy)
        return
    yield from _key(kit / "node.key")
    yield from _authority(kit / "ca.crt")
    try:
        seen = ask_http(address, kit / "ca.crt")
    except ConfigError:
        yield Finding("FAIL", "server", "address or ca.crt cannot be read", "take them from the kit again")
        return
    except UnreachableError as error:
        if error.reason == "expired":
            yield from _out_of_time(str(error), address)
            return
        name = "server" if error.reason in ("unreachable", "answer") else "tls"
        yield Finding("FAIL", name, str(error), REMEDIES[error.reason])
        return
    yield Finding("ok", "server", f"{address} answers /health")
    if seen.not_after is not None:
        yield _validity("the server's certificate", seen.not_after, REMEDIES["expired"])
    yield _clock(seen.date)


def read_settings(path: Path) -> dict[str, str]:
    """Read ``KEY=VALUE`` lines, as the start scripts do."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [line.split("=", 1) for line in lines if "=" in line and not line.startswith("#")]
    return {key: value.strip("'\"") for key, value in pairs}


def _key(path: Path) -> Iterator[Finding]:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    remedy = "take it from the kit, or ask for a new one: sparsecontrast provision rotate SITE"
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        yield Finding("FAIL", "key", "node.key is missing", remedy)
        return
    except (OSError, ValueError):
        yield Finding("FAIL", "key", "node.key cannot be read", remedy)
        return
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        yield Finding("FAIL", "key", "node.key is no ECDSA key", remedy)
    elif mode & 0o077:
        yield Finding("FAIL", "key", f"node.key has mode {mode:o}: others can read it", "chmod 600 node.key")
    else:
        yield Finding("ok", "key", f"ECDSA, {key.curve.name}")


def _authority(path: Path) -> Iterator[Finding]:
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        yield Finding("FAIL", "tls", "ca.crt is missing or no certificate", "take it from the kit again")
        return
    yield _validity("the authority", certificate.not_valid_after_utc, "a new federation folder is due")


def _validity(what: str, end: datetime, remedy: str) -> Finding:
    days = (end - datetime.now(UTC)).days
    told = f"{what} is valid until {end:%Y-%m-%d}"
    if days < 0:
        return Finding("FAIL", "tls", told, remedy)
    return Finding("warn", "tls", told, remedy) if days < DAYS else Finding("ok", "tls", told)


def _out_of_time(what: str, address: str) -> Iterator[Finding]:
    """Tell a certificate out of its time from a machine out of its own, by the server's clock."""
    date, here = ask_date(address), datetime.now(UTC)
    if date is not None and -BEHIND < (here - date).total_seconds() < AHEAD:
        remedy = REMEDIES["expired"]
    else:
        clock = "is wrong" if date is not None else "may be wrong"
        remedy = f"this clock {clock}, it says {here:%Y-%m-%d %H:%M} UTC: set it by NTP; else "
        remedy += REMEDIES["expired"]
    yield Finding("FAIL", "tls", what, remedy)
    yield _clock(date)


def _clock(date: datetime | None) -> Finding:
    if date is None:
        return Finding("warn", "clock", "the server tells no time", "see that both sides keep theirs by NTP")
    drift = (datetime.now(UTC) - date).total_seconds()
    told = f"{abs(drift):.0f} s {'ahead of' if drift > 0 else 'behind'} the server"
    if not -BEHIND < drift < AHEAD:
        return Finding("FAIL", "clock", told, "set it by NTP: the server would refuse this node's signatures")
    if abs(drift) > DRIFT:
        return Finding("warn", "clock", told, "set it by NTP")
    return Finding("ok", "clock", told if abs(drift) >= 1 else "as the server's")
