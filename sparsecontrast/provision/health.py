"""Is it there? Flower's HTTP ``/health`` and the gRPC health service, asked as the start scripts do.

``python -m sparsecontrast.provision.health --https HOST:PORT --ca ca.crt --grpc HOST:PORT [--wait SECONDS]``
ends with 0 when all that was named answers, and with 1, and the reason, where one does not.
"""

import argparse
import http.client
import socket
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

from sparsecontrast.errors import ConfigError, FederationError
from sparsecontrast.provision.plan import split_address

Reason = Literal["name", "authority", "expired", "not_tls", "certificate", "unreachable", "answer"]


class UnreachableError(FederationError):
    """A server that does not answer as it should.

    Args:
        reason: which way.
        message: for people.
    """

    def __init__(self, reason: Reason, message: str):
        super().__init__(message)
        self.reason: Reason = reason


@dataclass(frozen=True)
class Seen:
    """A server that answered.

    Attributes:
        date: its clock, to the second; None where it did not say.
        not_after: when its certificate ends; None without TLS.
    """

    date: datetime | None
    not_after: datetime | None


def ask_http(address: str, ca: Path | None, timeout: float = 10.0) -> Seen:
    """Ask ``/health``.

    Args:
        address: ``host:port``.
        ca: certificate of the only authority that is believed; None asks in clear text.
        timeout: seconds.

    Raises:
        UnreachableError: no answer, no trust, or another answer than 200.
        ConfigError: the address or the certificate of the authority is none.
    """
    host, port = split_address(address, "address")
    if ca is None:
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
    else:
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=_context(ca))
    try:
        connection.connect()
        not_after = _not_after(connection.sock)
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise _told(error, address) from error
    finally:
        connection.close()
    if answer.status != 200:
        raise UnreachableError("answer", f"{address}: /health answered {answer.status}, not 200")
    return Seen(_date(answer.getheader("Date")), not_after)


def ask_date(address: str, timeout: float = 10.0) -> datetime | None:
    """Ask a server that need not prove who it is for its clock; None where it does not say.

    To tell a certificate out of its time from a machine out of its own. Nothing is sent but ``GET /health``.
    """
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, port = split_address(address, "address")
    connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
    try:
        connection.request("GET", "/health")
        return _date(connection.getresponse().getheader("Date"))
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _date(header: str | None) -> datetime | None:
    try:
        found = parsedate_to_datetime(header or "")
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def ask_grpc(address: str, timeout: float = 10.0) -> None:
    """Ask the gRPC health service, which speaks in clear text.

    Raises:
        UnreachableError: no answer, or another one than SERVING.
    """
    import grpc

    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")  # no message in, one number out
        try:
            answer = check(b"", timeout=timeout, wait_for_ready=False)
        except grpc.RpcError as error:
            raise UnreachableError("unreachable", f"{address}: no gRPC health service ({error})") from error
    if answer != b"\x08\x01":
        raise UnreachableError("answer", f"{address}: the gRPC health service is not serving")


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask all that is named; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sparsecontrast.provision.health", description=__doc__)
    parser.add_argument("--https", metavar="HOST:PORT")
    parser.add_argument("--ca", type=Path, metavar="FILE")
    parser.add_argument("--http", metavar="HOST:PORT")
    parser.add_argument("--grpc", metavar="HOST:PORT")
    parser.add_argument("--wait", type=float, default=0, metavar="SECONDS")
    options = parser.parse_args(arguments)
    if options.https and not options.ca:
        parser.error("--https needs --ca")
    asked: list[Callable[[], object]] = []
    if options.https:
        asked.append(lambda: ask_http(options.https, options.ca))
    if options.http:
        asked.append(lambda: ask_http(options.http, None))
    if options.grpc:
        asked.append(lambda: ask_grpc(options.grpc))
    try:
        for ask in asked:
            wait_for(ask, options.wait)
    except (UnreachableError, ConfigError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


def wait_for(ask: Callable[[], object], seconds: float) -> None:
    """Ask until there is an answer.

    Raises:
        UnreachableError: there was none within so many seconds; what cannot mend itself is raised at once.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            ask()
            return
        except UnreachableError as error:
            if error.reason not in ("unreachable", "answer") or time.monotonic() >= deadline:
                raise
        time.sleep(0.3)


def _context(ca: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{ca}: no certificate of an authority ({error})") from error


def _not_after(connection: socket.socket | None) -> datetime | None:
    if not isinstance(connection, ssl.SSLSocket):
        return None
    from cryptography import x509

    raw = connection.getpeercert(binary_form=True)
    return x509.load_der_x509_certificate(raw).not_valid_after_utc if raw else None


def _told(error: Exception, address: str) -> UnreachableError:
    """Tell apart what looks the same to who only reads "certificate verify failed"."""
    if isinstance(error, ssl.SSLCertVerificationError):
        # numbers of OpenSSL's x509_vfy.h
        if error.verify_code in (10, 9):
            return UnreachableError("expired", f"{address}: the certificate is {error.verify_message}")
        if error.verify_code in (62, 64):
            return UnreachableError("name", f"{address}: the certificate is for other names")
        if error.verify_code in (18, 19, 20, 21):
            return UnreachableError("authority", f"{address}: signed by another authority")
        return UnreachableError("certificate", f"{address}: certificate refused: {error.verify_message}")
    if isinstance(error, ssl.SSLError):
        return UnreachableError("not_tls", f"{address}: does not speak TLS ({error.reason})")
    return UnreachableError("unreachable", f"{address}: no answer ({error})")


if __name__ == "__main__":
    sys.exit(main())
