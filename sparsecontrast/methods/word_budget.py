"""How many words: k follows the trend of the held-out loss (SparseAttnNet, arXiv 2505.07661; our rule).

The loss on the validation images is smoothed, and looked at every ``every`` epochs:

    still falling by more than the tolerance     k stays: the network is learning
    neither falling nor above the best           k shrinks: fewer words may do as well
    above the best by more than the tolerance    k grows back, never above where it began

so k is as small as the loss allows, and every step of it is on record.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from sparsecontrast.errors import MethodError


@dataclass
class WordBudget:
    """The number of words in force, and how it came about.

    Args:
        ceiling: k at the start, and the most there ever are; at least 1.
        floor: the least, in 1..ceiling.
        tolerance: share of the loss that counts as no change, at least 0.
        every: epochs between two looks, at least 1.
        factor: by which k shrinks and grows, in (0, 1).
        smoothing: of the loss, in [0, 1); 0 takes each as it comes.

    Attributes:
        k: words now.
        trajectory: one entry an epoch: epoch, held_out_loss, smoothed, k (as it was), change.
    """

    ceiling: int
    floor: int
    tolerance: float
    every: int
    factor: float
    smoothing: float
    k: int = field(init=False)
    trajectory: list[dict[str, Any]] = field(default_factory=list)
    _smoothed: float | None = None
    _best: float = math.inf
    _before: float = math.inf

    def __post_init__(self) -> None:
        """Begin at the ceiling."""
        assert 1 <= self.floor <= self.ceiling, (self.floor, self.ceiling)
        self.k = self.ceiling

    def observe(self, loss: float) -> int:
        """Take the held-out loss of an epoch; returns the k of the next.

        Raises:
            MethodError: it is not finite, and says nothing of k; the record is as it was.
        """
        if not math.isfinite(loss):
            raise MethodError(f"the held-out loss is {loss}; lower train.lr")
        kept = self.smoothing if self._smoothed is not None else 0.0
        self._smoothed = kept * (self._smoothed or 0.0) + (1 - kept) * loss
        entry = {"epoch": len(self.trajectory) + 1, "held_out_loss": loss, "smoothed": self._smoothed,
                 "k": self.k, "change": ""}  # fmt: skip
        if entry["epoch"] % self.every == 0:
            entry["change"] = self._adapt(self._smoothed)
        self.trajectory.append(entry)
        return self.k

    def _adapt(self, now: float) -> str:
        before, self._before = self._before, now
        if now > self._best * (1 + self.tolerance):
            change, k = "grow", min(self.ceiling, math.ceil(self.k / self.factor))
        elif now < before * (1 - self.tolerance):
            change, k = "learning", self.k
        else:
            change, k = "shrink", max(self.floor, math.floor(self.k * self.factor))
        self._best, self.k = min(self._best, now), k
        return change
