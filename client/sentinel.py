"""``flwr-clientapp`` as a hospital starts it: the site's own limits around whatever app is run.

A SuperNode starts a process of this name for every message. In the kit of a site it is this file, of the
version that the hospital itself installed (``python -P -m client.sentinel``). Before anything of the server's
bundle is touched, it holds to what ``site.yaml`` says:

- ``app: installed`` runs the installed ClientApp; the bundle is not even unpacked. ``app: [SHA256, ...]``
  runs bundles with these digests alone; ``python -m client.sentinel digest FOLDER`` tells the digest of an
  app's folder that was read and approved.
- ``limits.seconds`` ends an answer that takes longer, hung or not, and be it in code that never gives way to
  Python's other threads; ``limits.memory_gib`` bounds the process.
- No model hub is asked for anything: weights come from the server.
- No text of an exception leaves, not even of one that Flower itself catches, and a row of the egress log
  tells that its number did.

What is here holds for Flower 1.41; ``tests/test_sentinel.py`` fails if Flower's process is built otherwise.
"""

import contextlib
import faulthandler
import functools
import hashlib
import importlib
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from client.log import LOG, note
from sparsecontrast.config import anchored
from sparsecontrast.egress import EgressLog
from sparsecontrast.errors import AppRefusedError, SparseContrastError
from sparsecontrast.site_file import SiteFile, read_site_file

VARIABLE = "SPARSECONTRAST_SITE"  # names the site's file
GRACE_SECONDS = 30.0  # between the exception in the app and the end of a process that does not hear it
OURS = ("client", "server", "sparsecontrast", "simulation")


def main() -> None:
    """Answer one message under the site's limits; the arguments are those of Flower's program."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's client reads it when it is imported, which is later
    site = read_site_file(Path(os.environ[VARIABLE]))
    folder = anchored(site.state_dir)
    limit_memory(site.limits.memory_gib)
    watch(site.limits.seconds, folder)
    runtime = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    put_around(runtime, site, folder)
    importlib.import_module("flwr.supernode.cli.flwr_clientapp").flwr_clientapp()


def limit_memory(gib: float | None) -> None:
    """Let this process allocate no more than ``gib`` GiB; beyond, an allocation fails and can be answered."""
    if gib is not None:
        most = int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def watch(seconds: float, folder: Path, grace: float = GRACE_SECONDS) -> None:
    """Raise ``OvertimeError`` in the main thread after ``seconds``; end the process where that is not heard.

    The exception and the thread that ends the process are Python, so both wait for a thread that holds the
    interpreter, such as one that hangs in C. What ends the process then is a thread of C (``faulthandler``),
    which waits for nobody: it writes ``Timeout (H:MM:SS)!`` and where each thread stood into the site's log,
    names of files and functions and no values. A normal end of the process ends all three. To be called after
    a fork: no thread survives one.

    Args:
        seconds: from now.
        folder: of the site's log.
        grace: seconds from the exception to the end, and once more to that in C.
    """

    def overtime(*_: Any) -> NoReturn:
        from sparsecontrast.errors import OvertimeError  # of the app that runs now: a bundle brings its own

        raise OvertimeError(f"no answer within limits.seconds={seconds:g} of the site's file")

    def end() -> None:
        note(folder, f"ended: hung, {grace:g} s after limits.seconds={seconds:g}")
        os._exit(1)

    signal.signal(signal.SIGALRM, overtime)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    last = threading.Timer(seconds + grace, end)
    last.daemon = True
    last.start()
    faulthandler.dump_traceback_later(seconds + 2 * grace, exit=True, file=_dump_file(folder))


def _dump_file(folder: Path) -> Any:
    """Open the site's log for what is written without Python; else stderr, which is the site's too."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / LOG, "a", encoding="utf-8")  # noqa: SIM115  faulthandler keeps it
    return 2


def put_around(runtime: Any, site: SiteFile, folder: Path) -> None:
    """Replace what Flower's process installs, loads and tells.

    Args:
        runtime: the module ``flwr.supernode.runtime.run_clientapp``.
        site: what the site's file says.
        folder: of the site's log.
    """
    install, error = runtime.install_from_fab, runtime.Error
    if site.app == "installed":
        runtime.install_from_fab = lambda *_, **__: None
        runtime.get_load_client_app_fn = lambda **_: _installed_app
    else:
        runtime.install_from_fab = _checked(install, site.app, folder)

    def silent(code: int, reason: str | None = None) -> Any:
        note(folder, f"flower error {code}: {reason}")
        try:  # it leaves around the guard
            row = {"status": "error", "code": f"flower_{code}", "site": site.name}
            EgressLog(folder).append("flower", row)
        except SparseContrastError as broken:
            note(folder, f"flower error {code} leaves without a row in the log: {broken}")
        return error(code, "see client.log at the site")

    runtime.Error = silent
    # a process that starts fast asks for its message before the node has all of it, and would wait a second
    runtime.pull_and_inflate_object_from_tree = functools.partial(
        runtime.pull_and_inflate_object_from_tree, initial_backoff=0.1
    )


def digest(folder: Path) -> str:
    """Return the SHA-256 of the bundle that Flower makes of an app's folder."""
    build = importlib.import_module("flwr.cli.build")
    return hashlib.sha256(build.build_fab_from_disk(folder)).hexdigest()


def _checked(install: Callable[..., Any], known: tuple[str, ...], folder: Path) -> Callable[..., Any]:
    def checked(bundle: bytes, *rest: Any, **more: Any) -> Any:
        found = hashlib.sha256(bundle).hexdigest()
        if found not in known:
            note(
                folder,
                f"refused: the server's app has the digest {found}, which the site's file does not name",
            )
            raise AppRefusedError("the app is none that this site runs")
        for name in [n for n in sys.modules if n.split(".")[0] in OURS]:
            del sys.modules[name]  # the bundle's own are loaded, not the installed ones
        return install(bundle, *rest, **more)

    return checked


def _installed_app(*_: Any) -> Any:
    from client.app import app

    return app


if __name__ == "__main__":
    if sys.argv[1:2] == ["digest"] and len(sys.argv) == 3:
        print(digest(Path(sys.argv[2])))
    else:
        main()
