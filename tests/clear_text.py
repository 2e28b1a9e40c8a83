"""A deployment in clear text: the generated scripts, less TLS and the keys that go with TLS alone."""

from pathlib import Path

from simulation.deploy import Deployment
from sparsecontrast.provision.health import ask_grpc, ask_http

# what of each script goes, and what comes in its place
_SUPERLINK = {
    "--ssl-ca-certfile ca.crt --ssl-certfile server.pem --ssl-keyfile server.pem \\\n    "
    "--enable-supernode-auth": "--insecure"
}
_SUPERNODE = {"--root-certificates ca.crt \\\n    --auth-supernode-private-key node.key": "--insecure"}
_FLOWER = {'root-certificates = "%s"': "insecure = true", '"$BIND" "$folder/ca.crt"': '"$BIND"'}


class ClearText(Deployment):
    """Its nodes are not registered: without TLS a SuperLink takes any.

    Attributes:
        printed: by each script that was run at the server; ``flower.sh run --stream`` prints the run's log.
    """

    def provision(self) -> None:
        """Make the kits, and take TLS out of them."""
        super().provision()
        self.printed: list[str] = []
        _edit(self.kits.server / "superlink.sh", _SUPERLINK)
        _edit(self.kits.server / "flower.sh", _FLOWER)
        for name in self.sites:
            _edit(self.kits.site(name) / "supernode.sh", _SUPERNODE)

    def tell(self, script: str, *arguments: str, show: bool = False) -> str:
        """Run a script of the server's kit, and keep what it prints."""
        self.printed.append(super().tell(script, *arguments, show=show))
        return self.printed[-1]

    def start_superlink(self) -> None:
        """Start the SuperLink, and return when it answers."""
        self.launch("superlink", self.kits.server / "superlink.sh")
        self.await_health("superlink", lambda: ask_http(self.plan.server.bind, None))
        self.await_health("superlink", lambda: ask_grpc(self.plan.server.health))


def _edit(script: Path, changes: dict[str, str]) -> None:
    text = script.read_text()
    for old, new in changes.items():
        assert old in text, f"{script.name} has changed"
        text = text.replace(old, new)
    script.write_text(text)
