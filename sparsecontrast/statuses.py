"""What the status of a site's answer says, written anew from what the site itself knows.

A status is made of words, and words could hold anything. So none of the app's is passed on: names come from
the site's file, round and run from the orders, the version from the installed package, a code from the closed
set of ``errors.CODES``. A status that says anything else does not leave.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sparsecontrast.errors import CODES, EgressError

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Known:
    """What may be said.

    Attributes:
        names: of the sites that answer.
        round: of the orders; None where they name none.
        run_key: likewise.
    """

    names: tuple[str, ...]
    round: Any = None
    run_key: Any = None


def own_version() -> str:
    """Return the version of the installed package, or ``unknown``."""
    try:
        return version("sparsecontrast")
    except PackageNotFoundError:  # an unpacked FAB without an installed copy
        return "unknown"


def rebuilt(kind: str, told: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """Write the status anew.

    Args:
        kind: hello or train.
        told: the app's status.
        known: what the site knows.

    Raises:
        EgressError: the app's says anything else, or answers another kind of message than an error.
    """
    if told.get("status") == "error":
        honest = _error(told, known)
    elif kind == "hello":
        honest = _greeting(told, known)
    elif kind == "train" and len(known.names) == 1:
        (name,) = known.names
        honest = {"status": "ok", "site": name, "round": known.round, "run_key": known.run_key}
    else:
        raise EgressError("status: an answer to no message that this site knows")
    odd = sum(told.get(key) != honest.get(key) for key in {*told, *honest})
    if odd:  # which ones, and what they say, is nobody's business but the site's: see the app
        raise EgressError(f"status: {odd} field(s) are not what the site, its orders and its package say")
    return honest


def _greeting(told: Mapping[str, Any], known: Known) -> dict[str, Any]:
    status = {"status": "ok", "version": own_version()}
    if not known.names:
        return {**status, "idle": True}
    mark = told.get("fingerprint")
    if not (isinstance(mark, str) and _SHA256.fullmatch(mark)):
        raise EgressError("status.fingerprint: not 64 hexadecimal digits")
    return {**status, "sites": list(known.names), "fingerprint": mark}


def _error(told: Mapping[str, Any], known: Known) -> dict[str, Any]:
    code = told.get("code")
    if not isinstance(code, str) or code not in CODES:
        raise EgressError("status.code: none that this project has")
    # what goes wrong before the app knows where it is has no name there
    return {"status": "error", "code": code, "site": "".join(known.names[:1]) if told.get("site") else ""}
