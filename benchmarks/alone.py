"""Each contender in a process of its own, all alive at once and stepping in turn: how a CPU is timed.

Thirty networks in one process share one heap. Blocks that one of them frees are cut up by the next, large
ones go back to the system and come again page by page, and the kernel's share of a step grows from nothing to
half of it, more for some than for others. A site trains one network in a process; so does this.
"""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.stopwatch import Part, cpu_clock

Build = Callable[..., Mapping[str, Sequence[Part]]]
"""Makes what a process times: parts by name of a phase."""


@dataclass(frozen=True)
class Handle:
    """One part of one phase of the work of a process; ``remote_clock`` times it."""

    alone: "Alone"
    phase: str
    number: int

    def __call__(self) -> object:
        """Run it once, untimed."""
        return self.alone.ask(self.phase, self.number, 1)


class Alone:
    """A process that has built one work and waits to be told to run it.

    Args:
        build: a module-level function; runs in the process.
        arguments: of ``build``; picklable.

    Attributes:
        shares: by phase, the share of each part.

    Raises:
        Exception: what ``build`` raised.
    """

    def __init__(self, build: Build, *arguments: Any):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.memory"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.shares: dict[str, list[float]] = self._answer()

    def parts(self, phase: str) -> list[Part]:
        """Return the parts of a phase, as ``stopwatch.interleave`` takes them."""
        return [(share, Handle(self, phase, i)) for i, share in enumerate(self.shares[phase])]

    def ask(self, phase: str, number: int, count: int) -> tuple[float, float]:
        """Run a part ``count`` times; returns (CPU seconds, wall seconds) of one."""
        self._pipe.send((phase, number, count))
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _answer(self) -> Any:
        try:
            failed, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a benchmark's process ended with {self._process.exitcode}") from None
        if failed:
            raise answer
        return answer


def remote_clock(work: Callable[[], object], count: int) -> tuple[float, float]:
    """Time a ``Handle`` in its own process, by that process's clock."""
    assert isinstance(work, Handle), "only works of Alone are timed elsewhere"
    return work.alone.ask(work.phase, work.number, count)


def _serve(pipe: Any, build: Build, arguments: Sequence[Any]) -> None:
    """Build, tell the shares, then time what is asked for until the pipe ends."""
    import torch

    torch.set_num_threads(1)
    try:
        parts = build(*arguments)
        pipe.send((False, {phase: [share for share, _ in of] for phase, of in parts.items()}))
        while True:
            phase, number, count = pipe.recv()
            pipe.send((False, cpu_clock(parts[phase][number][1], count)))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001  whatever it is belongs to who asked
        pipe.send((True, error))
