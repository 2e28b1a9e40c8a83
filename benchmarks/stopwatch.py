"""Paired timing: references between every two repeats, ratios within a repeat, medians over repeats.

On a CPU the figure is CPU seconds of one thread (another process at work costs wall time, hardly CPU
time), with wall seconds beside; on a GPU it is CUDA events. A repeat runs every candidate once, in
random order; the references run before and after it, and their mean is what a candidate is compared
with, so that a slow drift of the machine cancels. A part that is less than a fifth of a work (the
teacher's pass of one step in ten) is timed anew in every fifth repeat only.
"""

import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

MOMENT = 0.03  # seconds that a timing lasts at least; shorter work is run several times
LONG = 1.0  # CPU seconds from which one call is warm-up enough
SMALL, RARE = 0.2, 5  # a part of a smaller share is timed every so many repeats

Key = TypeVar("Key", bound=Hashable)
Clock = Callable[[Callable[[], object], int], tuple[float, float]]
Part = tuple[float, Callable[[], object]]  # (share of the work that it is, the work)


@dataclass
class Times:
    """Cost (CPU or GPU seconds) and wall seconds of one call, one pair of values a repeat."""

    cost: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ratio:
    """How many times faster: the median over repeats and its 5 % and 95 % quantiles."""

    median: float
    low: float
    high: float


class _Timer:
    """Times the parts of one work, after warming each up."""

    def __init__(self, parts: Sequence[Part], clock: Clock):
        total = sum(share for share, _ in parts)
        self.shares = np.array([share / total for share, _ in parts])
        self.works, self.clock = [work for _, work in parts], clock
        self.counts = [_calibrate(work, clock) for work in self.works]
        self.table = np.zeros((len(parts), 2))

    def measure(self, repeat: int) -> tuple[float, float]:
        """Return (cost, wall) in seconds, the mean of the parts by share."""
        for number, (work, count) in enumerate(zip(self.works, self.counts, strict=True)):
            if self.shares[number] >= SMALL or repeat % RARE == 0:
                self.table[number] = self.clock(work, count)
        cost, wall = (self.shares @ self.table).tolist()
        return cost, wall


def cpu_clock(work: Callable[[], object], count: int) -> tuple[float, float]:
    """Return (CPU seconds of this process, wall seconds) of one of ``count`` calls."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        work()
    return (time.process_time() - cpu) / count, (time.perf_counter() - wall) / count


def cuda_clock(work: Callable[[], object], count: int) -> tuple[float, float]:
    """Return (seconds between two CUDA events, wall seconds) of one of ``count`` calls."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    wall = time.perf_counter()
    before.record()
    for _ in range(count):
        work()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3 / count, (time.perf_counter() - wall) / count


def interleave(
    works: Mapping[Key, Sequence[Part]],
    references: Sequence[Key],
    clock: Clock,
    repeats: tuple[int, int],
    budget: float,
) -> dict[Key, Times]:
    """Time works against references.

    Args:
        works: the parts of each work and their shares; its cost is the mean of the parts by share.
        references: keys of works that run between repeats.
        clock: ``cpu_clock`` or ``cuda_clock``.
        repeats: at least and at most so many.
        budget: wall seconds after which no repeat starts that ``repeats`` does not demand.

    Returns:
        For each key one value a repeat; a reference's is the mean of before and after.
    """
    timers = {key: _Timer(parts, clock) for key, parts in works.items()}
    others = [key for key in works if key not in references]
    found = {key: Times() for key in works}
    around = [{key: timers[key].measure(0) for key in references}]
    order, started = random.Random(0), time.perf_counter()
    done = 0
    while done < repeats[0] or (done < repeats[1] and time.perf_counter() - started < budget):
        order.shuffle(others)
        for key in others:
            _append(found[key], [timers[key].measure(done)])
        around.append({key: timers[key].measure(done) for key in references})
        for key in references:
            _append(found[key], [around[-2][key], around[-1][key]])
        done += 1
    return found


def ratio(reference: Times, candidate: Times) -> Ratio:
    """Compare costs repeat by repeat: above 1 the candidate is faster."""
    pairs = np.array(reference.cost) / np.array(candidate.cost)
    low, median, high = np.quantile(pairs, [0.05, 0.5, 0.95]).tolist()
    return Ratio(median, low, high)


def _append(times: Times, values: Sequence[tuple[float, float]]) -> None:
    times.cost.append(float(np.mean([cost for cost, _ in values])))
    times.wall.append(float(np.mean([wall for _, wall in values])))


def _calibrate(work: Callable[[], object], clock: Clock) -> int:
    """Warm up, then say how many calls fill a moment."""
    if clock(work, 1)[0] > LONG and clock is not cuda_clock:  # on a GPU the first call may have compiled
        return 1
    return max(1, min(100, round(MOMENT / max(clock(work, 2)[1], 1e-6))))
