"""When do linear attentions pay? Time and memory of a high-resolution decoder, against softmax attention.

    python -m benchmarks.decoders [--quick] [--json FILE] [--device cpu|cuda] [--dim 128] [--heads 4]

Self-attention over N tokens, projections included, by itself (``attention``) and in a whole pre-norm decoder
block with an MLP of ratio 4 (``block``), forward and backward, with the gradients of weights and tokens. As
wide as MIRAM's decoder, and with its 64 landmarks (Nystromformer), mixtures of tokens (Linformer) or random
features (Performer); ``performer_256`` has 256. ``fused`` is softmax attention by torch's own kernel, which
keeps nothing of size N^2 either; ``eager`` writes the N x N matrix out, and is skipped where that would pass
a limit.

``x_fused`` is how many times FASTER than ``fused``: the median of paired ratios with its 5 % and 95 %
quantiles. On a CPU the cost is CPU time of one thread, each contender in a process of its own
(``alone.py``); on a GPU time between CUDA events. ``peak_mib`` is the most that the tensors of a step take at
one time, gradients of weights included, weights and tokens left out; ``saved_mib`` what autograd keeps for
the backward pass; ``resident_mib`` by how much the resident memory of a process of its own grows at most.
A break-even is where a cost crosses that of ``fused``, between two N that were measured, interpolated in
the logarithms of both.
"""

import argparse
import functools
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.alone import Alone, remote_clock
from benchmarks.memory import MIB, allocated_peak, cuda_peak, peak_of, saved_by
from benchmarks.record import print_table, write_result
from benchmarks.stopwatch import Part, cuda_clock, interleave, ratio
from sparsecontrast.models.heads import merge_heads, split_heads
from sparsecontrast.models.linear_attention import SoftmaxAttention, build_attention

TOKENS = (196, 784, 3136, 12544)
NAMES = ("fused", "eager", "linformer", "performer", "performer_256", "nystromformer")
LINEAR = NAMES[2:]
EAGER_LIMIT = 3 * 2**30  # bytes of the N x N matrices that are alive at once
EAGER_ALIVE = 3  # shares, their gradient, the logits' gradient
MOST = 4 * 3136  # tokens of a batch of several: beyond, softmax takes minutes
BAR = (3136, 5.0, 4.0)  # from so many tokens on so many times faster, so many times leaner
SHOWN = {
    "name": "attention", "cost_ms": "ms", "x_fused": "x fused", "x_fused_low": "low", "x_fused_high": "high",
    "peak_mib": "peak MiB", "leaner_fused": "x leaner", "saved_mib": "saved MiB", "skipped": "skipped",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is measured together: everything but the kind of attention."""

    part: str
    precision: str
    batch: int
    tokens: int
    dim: int
    heads: int


@dataclass(frozen=True)
class Protocol:
    """How much is measured: tokens, batches, repeats (at least, at most), seconds of a case."""

    parts: Sequence[str] = ("attention", "block")
    tokens: Sequence[int] = TOKENS
    batches: Sequence[int] = (1, 4)
    precisions: Sequence[str] = ("fp32", "bf16")
    repeats: tuple[int, int] = (3, 15)
    seconds: float = 10.0


QUICK = Protocol(("block",), (64, 256), (1,), ("fp32",), repeats=(2, 2), seconds=1.0)


class EagerAttention(SoftmaxAttention):
    """Softmax attention that writes its N x N matrix out."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend: [B, N, D] -> [B, N, D]."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        shares = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.out(merge_heads(shares @ v))


class Block(nn.Module):
    """A pre-norm transformer block with an MLP of ratio 4, as MAE's decoder has it (arXiv 2111.06377)."""

    def __init__(self, attention: nn.Module, dim: int):
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(dim), nn.LayerNorm(dim), attention
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Decode: [B, N, D] -> [B, N, D]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure case by case, print, and write JSON if asked."""
    args = _arguments(argv)
    torch.set_num_threads(1)
    protocol = QUICK if args.quick else Protocol()
    every = list(cases(protocol, args.dim, args.heads))
    rows: list[dict[str, Any]] = []
    with Timers(every, args.device) as timers:
        for case in every:
            found = measure(case, protocol, args.device, timers)
            title = f"{case.part}, {case.tokens} tokens, batch {case.batch}, {case.precision}"
            print_table(title, [{short: row.get(key) for key, short in SHOWN.items()} for row in found])
            rows += found
    crossings = list(break_evens(rows))
    print_table("Break-even with fused softmax attention", crossings)
    print_table(
        f"From {BAR[0]} tokens on: {BAR[1]:g} times faster, {BAR[2]:g} times leaner?", list(bar(rows))
    )
    if args.json:
        write_result("decoders", _command(args), rows + crossings, args.json)


def cases(protocol: Protocol, dim: int, heads: int) -> Iterator[Case]:
    """Give what to measure, few tokens first; several images for blocks alone, where softmax is quick."""
    for part in protocol.parts:
        for precision in protocol.precisions:
            for batch in protocol.batches:
                for tokens in protocol.tokens:
                    if batch == 1 or (part == "block" and batch * tokens <= MOST):
                        yield Case(part, precision, batch, tokens, dim, heads)


def measure(case: Case, protocol: Protocol, device: str, timers: "Timers") -> list[dict[str, Any]]:
    """Measure one case: memory of each attention by itself, then the times of all, interleaved."""
    reason = too_large(case)
    names = [name for name in NAMES if not (name == "eager" and reason)]
    memory = {name: memory_of(case, name, device) for name in names}
    parts = {name: timers.parts(name, case) for name in names}
    times = interleave(parts, ["fused"], timers.clock, protocol.repeats, protocol.seconds)
    rows = []
    for name in names:
        found = ratio(times["fused"], times[name])
        rows.append(
            {
                **asdict(case), "device": device, "name": name, "landmarks": _landmarks(name),
                "cost_ms": 1e3 * float(np.median(times[name].cost)),
                "wall_ms": 1e3 * float(np.median(times[name].wall)), "repeats": len(times[name].cost),
                "x_fused": found.median, "x_fused_low": found.low, "x_fused_high": found.high, **memory[name],
                "leaner_fused": memory["fused"]["peak_mib"] / memory[name]["peak_mib"],
                "saved_leaner_fused": memory["fused"]["saved_mib"] / memory[name]["saved_mib"],
            }
        )  # fmt: skip
    return rows + ([{**asdict(case), "device": device, "name": "eager", "skipped": reason}] if reason else [])


def too_large(case: Case) -> str | None:
    """Say why eager attention is left out, if it is."""
    size = 2 if case.precision == "bf16" else 4
    need = EAGER_ALIVE * case.batch * case.heads * case.tokens**2 * size
    if need <= EAGER_LIMIT:
        return None
    return f"its matrices would take {need / 2**30:.1f} GiB, more than {EAGER_LIMIT / 2**30:.0f}"


def build_step(case: Case, name: str, device: str) -> Callable[[], object]:
    """Build one attention or block; return what runs it forward and backward."""
    module, x = _build(case, name, device)
    gradient = torch.randn_like(x)

    def step() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        _forward(module, x, case).backward(gradient.to(x.dtype))

    return step


def memory_of(case: Case, name: str, device: str) -> dict[str, float]:
    """Measure ``peak_mib`` and ``saved_mib`` of a step, and ``resident_mib`` where it is large enough."""
    build = partial(build_step, case, name, device)
    module, x = _build(case, name, device)
    saved, _ = saved_by(lambda: _forward(module, x, case), module)
    if device == "cuda":
        return {"peak_mib": cuda_peak(build), "saved_mib": saved / MIB}
    found = {"peak_mib": allocated_peak(build()), "saved_mib": saved / MIB}
    if (
        case.tokens >= BAR[0] and case.batch == 1
    ):  # a step on few tokens has loaded what every step needs of the libraries
        warm = partial(build_step, replace(case, batch=1, tokens=64), name, device)
        found["resident_mib"] = peak_of(build, warm)
    return found


class Timers:
    """Where contenders are timed: on a CPU each kind of attention in a process of its own, on a GPU here.

    Args:
        cases: all that will be asked for.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, cases: Sequence[Case], device: str):
        self.device, self.clock = device, remote_clock if device == "cpu" else cuda_clock
        self._alone: dict[str, Alone] = {}
        if device == "cpu":
            self._alone = {name: Alone(build_parts, list(cases), name, device) for name in NAMES}

    def __enter__(self) -> "Timers":
        return self

    def __exit__(self, *_: object) -> None:
        for alone in self._alone.values():
            alone.close()

    def parts(self, name: str, case: Case) -> list[Part]:
        """Return what ``stopwatch.interleave`` times with ``clock``."""
        if name in self._alone:
            return self._alone[name].parts(str(case))
        gc.collect()
        return build_parts([case], name, self.device)[str(case)]


def build_parts(cases: Sequence[Case], name: str, device: str) -> dict[str, list[Part]]:
    """Give what a process may be asked to time; each is built when it is run first."""

    def later(case: Case) -> Callable[[], object]:
        built = functools.cache(partial(build_step, case, name, device))
        return lambda: built()()

    return {str(case): [(1.0, later(case))] for case in cases}


def break_evens(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Where each linear attention begins to be faster than fused softmax, and to need less memory."""
    for keys in dict.fromkeys((r["part"], r["precision"], r["batch"]) for r in rows):
        for name in LINEAR:
            mine = [r for r in rows if (r["part"], r["precision"], r["batch"]) == keys and r["name"] == name]
            told = dict(zip(("part", "precision", "batch"), keys, strict=True))
            for what, key in (("time", "x_fused"), ("peak", "leaner_fused")):
                found = crossing([(r["tokens"], r[key]) for r in mine])
                yield {**told, "name": name, "break_even_of": what, **found}


def crossing(points: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Find where a ratio passes 1 for good.

    Args:
        points: (tokens, ratio), by rising tokens; above 1 the linear one is better.

    Returns:
        ``after`` and ``before``, tokens that were measured on either side, and ``tokens`` between them.
        Without ``after`` it is better from the fewest tokens on, without ``before`` nowhere.
    """
    better = [value > 1 for _, value in points]
    first = len(points)
    while first and better[first - 1]:
        first -= 1
    if first == len(points):
        return {"after": points[-1][0], "before": None, "tokens": None}
    if first == 0:
        return {"after": None, "before": points[0][0], "tokens": None}
    (n, low), (m, high) = points[first - 1 : first + 1]
    share = -math.log(low) / (math.log(high) - math.log(low))
    return {"after": n, "before": m, "tokens": round(n * (m / n) ** share)}


def bar(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Hold every linear attention at many tokens to what was aimed at."""
    least, faster, leaner = BAR
    for r in rows:
        if r["tokens"] >= least and r["name"] in LINEAR:
            told = {key: r[key] for key in ("part", "precision", "batch", "tokens", "name")}
            yield told | {
                "x fused": r["x_fused"], "faster": "yes" if r["x_fused"] >= faster else "no",
                "x leaner": r["leaner_fused"], "leaner": "yes" if r["leaner_fused"] >= leaner else "no",
            }  # fmt: skip


def _build(case: Case, name: str, device: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "eager":
        module: nn.Module = EagerAttention(case.dim, case.heads)
    else:
        kind = "softmax" if name == "fused" else name.partition("_")[0]
        module = build_attention(kind, case.dim, case.heads, case.tokens, _landmarks(name))
    if case.part == "block":
        module = Block(module, case.dim)
    x = torch.randn(case.batch, case.tokens, case.dim, device=device, requires_grad=True)
    return module.to(device), x


def _forward(module: nn.Module, x: Tensor, case: Case) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=case.precision == "bf16"):
        return module(x).to(x.dtype)


def _landmarks(name: str) -> int:
    return int(name.partition("_")[2] or 64)


def _command(args: argparse.Namespace) -> str:
    words = ["python -m benchmarks.decoders", *(["--quick"] if args.quick else [])]
    return " ".join([*words, f"--device {args.device} --dim {args.dim} --heads {args.heads}"])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a block at two small N in fp32")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dim", type=int, default=128, help="width of the decoder")
    parser.add_argument("--heads", type=int, default=4)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
