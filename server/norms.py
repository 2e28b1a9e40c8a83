"""How far one site may move the global weights in a round: updates beyond a bound are shortened to it.

The bound is a small multiple of the usual length of this round's updates: where two of ten turn a long update
round, a bound of one usual length leaves the others 0.6 of their way, 1.5 leaves 0.5, three 0.2. A round's
verified replies wait on disk (``server.spool``), so their lengths are known before any of them is joined, the
first round has a bound like every other, and nothing depends on who answered first. Shortening an update to a
bound is norm clipping: Sun et al., Can You Really Backdoor Federated Learning, arXiv 1911.07963. It bounds
what a liar can do, it does not find one who stays below.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from server.spool import Spool
from server.strategy import OF_THE_MEAN, Contribution
from sparsecontrast import payload
from sparsecontrast.errors import PayloadError
from sparsecontrast.settings import FederationConfig

# of the usual length; a site with many times the steps of the others (of whole epochs, where train.steps is
# null) may be honest and longer than that: it is shortened too, which the log and metrics.jsonl tell
MULTIPLE = 1.5
BEYOND = 20.0  # times the bound is no update of this round: it is refused, not shortened
# of the model's norm: a shorter update is never refused. While the learning rate rises from 0, a site of one
# step hardly moves, and an honest one of three is many times its length
PART = 0.1
MAJORITY = 3  # of fewer replies nobody can tell which is the usual one: they have no bound
REFUSED = PayloadError("update_norm", "").code


def bound_of(lengths: Sequence[float], config: FederationConfig) -> float | None:
    """Choose a round's bound, None for none.

    The lower median is at most an honest site's length as long as fewer than half of the replies are lies.
    It is taken of this round alone: while the learning rate rises, the round before is no measure.

    Args:
        lengths: ||w_site - w_global|| of every verified reply, in any order.
        config: ``update_norm``: a number is the bound itself; auto holds the strategies that take a mean to
            ``MULTIPLE`` times the usual length, and leaves alone those that compare replies.
    """
    if not isinstance(config.update_norm, str):
        return float(config.update_norm)
    if config.update_norm != "auto" or config.strategy not in OF_THE_MEAN or len(lengths) < MAJORITY:
        return None
    usual = sorted(lengths)[(len(lengths) - 1) // 2]
    return MULTIPLE * usual or None  # where nobody moves there is no length


def hold(
    replies: Sequence[Contribution], reference: np.ndarray, bound: float | None, spool: Spool
) -> tuple[list[Contribution], dict[str, str]]:
    """Shorten what is too long and refuse what is far too long; one reply is in memory at a time.

    Args:
        replies: verified, their weights in ``spool``.
        reference: [n] fp32, the weights as they were sent out.
        bound: of the round, None for none.
        spool: takes the shortened ones in place of what it held.

    Returns:
        The replies that may be joined, and the code of each site whose reply may not.

    Raises:
        StorageError: the disk is full.
    """
    kept, refused = [], {}
    far = PART * payload.norm(reference)
    for reply in replies:
        if bound is None or reply.update_norm <= bound:
            kept.append(reply)
        elif reply.update_norm > max(BEYOND * bound, far):
            refused[reply.site] = REFUSED
        else:
            short = shortened(reply.flat, reference, bound)
            kept.append(spool.replace(dataclasses.replace(reply, clipped=True), short))
    return kept, refused


def shortened(flat: np.ndarray, reference: np.ndarray, longest: float) -> np.ndarray:
    """Return the weights [n], fp32, whose update has the direction of that of ``flat``, and this length."""
    update = flat - reference
    return reference + update * np.float32(longest / payload.norm(update))
