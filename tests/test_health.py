"""What the start scripts ask: HTTP /health and the gRPC health service, real ones."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from sparsecontrast.provision.authority import new_authority
from sparsecontrast.provision.health import UnreachableError, ask_grpc, main, wait_for
from tests.fronts import answering, write_pem

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def grpc_service():
    """A health service that says what it is told to; yields its address and how to tell it."""
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield address, lambda status: servicer.set("", status)
    server.stop(None)


def test_the_grpc_service_is_believed_when_it_serves(grpc_service):
    address, tell = grpc_service
    tell(SERVING)
    ask_grpc(address)
    tell(health_pb2.HealthCheckResponse.NOT_SERVING)
    with pytest.raises(UnreachableError, match="not serving") as told:
        ask_grpc(address)
    assert told.value.reason == "answer"
    with pytest.raises(UnreachableError) as told:
        ask_grpc("127.0.0.1:1", timeout=5)
    assert told.value.reason == "unreachable"


def test_the_script_ends_with_zero_only_when_all_that_was_named_answers(grpc_service, tmp_path, capsys):
    address, tell = grpc_service
    tell(SERVING)
    authority = new_authority("ward", 30)
    (tmp_path / "ca.crt").write_bytes(authority.certificate_pem)
    ca = ["--ca", str(tmp_path / "ca.crt")]
    pem = write_pem(tmp_path / "server.pem", authority)
    with answering(pem) as https, answering(None) as http, answering(None, 503) as ill:
        assert main(["--https", https, *ca, "--http", http, "--grpc", address]) == 0
        assert main(["--https", https, *ca, "--http", ill, "--grpc", address]) == 1
        assert main(["--https", http, *ca]) == 1
        assert main(["--https", https, "--ca", str(tmp_path / "missing.crt")]) == 1
        assert main(["--https", "nowhere", *ca]) == 1
    assert main(["--https", https, *ca]) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 5 and "503" in told[0] and "TLS" in told[1] and "host:port" in told[3]


def test_waiting_ends_with_the_first_answer_and_not_for_what_cannot_mend_itself():
    calls = []

    def late():
        calls.append(1)
        if len(calls) < 3:
            raise UnreachableError("unreachable", "not yet")

    wait_for(late, 30)
    assert len(calls) == 3
    calls.clear()

    def expired():
        calls.append(1)
        raise UnreachableError("expired", "expired")

    with pytest.raises(UnreachableError, match="expired"):
        wait_for(expired, 300)
    assert len(calls) == 1
