"""Which nodes of a SuperLink have these public keys; ``flwr supernode list`` prints neither keys nor names.

``register.sh`` asks before it changes anything, so that what it does follows from what the SuperLink holds,
and not from what it once wrote down. What is imported here holds for Flower 1.41.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

GONE = "unregistered"  # Flower's word; it takes such a key never again
UNREADABLE = "unreadable"
NONE = "-"


def rows(nodes: Iterable[Any], keys: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """Yield file, id and status of every node that has one of these keys, and of each other that is let in.

    Args:
        nodes: Flower's ``NodeInfo``: ``node_id``, ``status``, ``public_key`` in PEM.
        keys: files, each an OpenSSH public key; one that is not has no id, and the status ``unreadable``.
            ``-`` stands for the file where a node has none of these keys.
    """
    files: dict[bytes, list[Path]] = {}
    for path in keys:
        try:
            files.setdefault(_pem(path), []).append(path)
        except (OSError, ValueError, UnsupportedAlgorithm):
            yield str(path), NONE, UNREADABLE
    for node in nodes:
        for path in files.get(node.public_key, ()):
            yield str(path), str(node.node_id), node.status
        if node.public_key not in files and node.status != GONE:
            yield NONE, str(node.node_id), node.status


def ask(connection: str) -> list[Any]:
    """Return Flower's ``NodeInfo`` of all nodes.

    Args:
        connection: its name in the ``config.toml`` of ``FLWR_HOME``.

    Raises:
        click.ClickException: there is no such connection, or no answer.
    """
    tools = importlib.import_module("flwr.cli.utils")
    told = importlib.import_module("flwr.cli.flower_config").read_superlink_connection(connection)
    client = tools.init_http_client_from_connection(told)
    try:
        with tools.flwr_cli_exc_handler():
            return list(client.ListNodes(_request()).nodes_info)
    finally:
        client.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print ``FILE ID STATUS`` for each node; returns 1 where the SuperLink did not say."""
    parser = argparse.ArgumentParser(prog="python -m server.nodes", description=__doc__)
    parser.add_argument("connection", help="of Flower's configuration")
    parser.add_argument("keys", nargs="*", type=Path, metavar="KEY.pub")
    options = parser.parse_args(arguments)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Flower talks; what is read by a script stays clean
            nodes = ask(options.connection)
        for row in rows(nodes, [path for path in options.keys if path.exists()]):
            print(*row)
    except Exception as error:  # noqa: BLE001  Flower raises what it likes; the script must hear of each
        print(f"the SuperLink's nodes: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _request() -> Any:
    return importlib.import_module("flwr.proto.control_pb2").ListNodesRequest()


def _pem(path: Path) -> bytes:
    """The key as Flower keeps it."""
    key = serialization.load_ssh_public_key(path.read_bytes())
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


if __name__ == "__main__":
    sys.exit(main())
