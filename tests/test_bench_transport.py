"""Why a stranger was turned away is read off both logs; each of these is what Flower 1.41 really wrote."""

import pytest

from benchmarks.fault_cases.case import BrokenPromiseError
from benchmarks.fault_cases.transport import (
    IN_ORDER,
    KINDS,
    REASONS,
    UNKNOWN_KEY,
    UNREGISTERED,
    public_pem,
    reason,
)
from sparsecontrast.provision.authority import site_key

END = """
The SuperNode could not establish a connection to the SuperLink.

For more information, visit: <https://flower.ai/docs/framework/1.41/en/ref-exit-codes/305.html>
INFO:     Shutting down
"""
TLS = "ERROR :     Exit Code: 305\nFailed to initialize the connection to the SuperLink.\n"
CERTIFICATE = TLS + "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "
SAID = {
    "wrong name": CERTIFICATE
    + "IP address mismatch, certificate is not valid for '127.0.0.1'. (_ssl.c:1006)"
    + END,
    "expired": CERTIFICATE + "certificate has expired (_ssl.c:1006)" + END,
    "wrong authority": CERTIFICATE + "unable to get local issuer certificate (_ssl.c:1006)" + END,
    UNREGISTERED: TLS + "[code: 2004] Failed to activate SuperNode." + END,
    "plain HTTP": TLS + "Server disconnected without sending a response." + END,
    "plain HTTP, with the key": "ERROR :     Exit Code: 303\nInsecure connection is enabled, but the "
    "SuperNode's private key is provided for authentication. SuperNode authentication requires a secure TLS "
    "connection with the SuperLink. Please enable TLS by providing the certificate.",
}
OTHERWISE = {
    "no SuperLink there": TLS + "All connection attempts failed" + END,
    "the port is taken": "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 9095)",
    "no library": "sparsecontrast is not installed where python is: set VENV in /kit/settings.env",
    "nothing": "",
}


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "node.key"
    path.write_bytes(site_key("east")[0])
    return path


def refusal(key, why=UNKNOWN_KEY):
    place = "[/v1/fleet/activate-node][ApiError:2004] Attempted to register SuperNode with public key"
    return f"ERROR :     {place}: {public_pem(key)!r}, exception: {why}.\n"


def test_each_reason_is_that_of_one_kind(key):
    assert set(SAID) == set(REASONS) == set(KINDS) - {IN_ORDER}
    for kind in SAID:
        heard = refusal(key) if kind == UNREGISTERED else ""
        words = UNKNOWN_KEY if kind == UNREGISTERED else REASONS[kind][1]
        assert reason(kind, SAID[kind], heard, key).startswith(words)
        for other, said in ({**SAID, **OTHERWISE}).items():
            if other != kind:
                with pytest.raises(BrokenPromiseError, match="ended for another reason"):
                    reason(kind, said, heard, key)


def test_the_superlink_must_have_refused_this_very_key(key, tmp_path):
    another = tmp_path / "another.key"
    another.write_bytes(site_key("west")[0])
    # Flower answers 2004 too where it knows the key, and believes the node to be there still
    active = refusal(key, "SuperNode with node ID 14433369595225601960 could not be activated")
    for heard in ("", refusal(another), active):
        with pytest.raises(BrokenPromiseError, match="did not refuse this key"):
            reason(UNREGISTERED, SAID[UNREGISTERED], heard, key)


def test_whoever_the_superlink_let_in_was_not_turned_away(key):
    for line in (
        "INFO :      [Fleet.ActivateNode] Activated node_id=14433369595225601960",
        '127.0.0.1:42952 - "POST /v1/fleet/register-node HTTP/1.1" 200',
    ):
        with pytest.raises(BrokenPromiseError, match="let somebody in"):
            reason("plain HTTP", SAID["plain HTTP"], line, key)
