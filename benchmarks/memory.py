"""Memory of training: the peak of a step, and what autograd saves for the backward pass.

The peak counts weights, gradients, AdamW's moments, activations and work space. On a GPU torch's own
counter gives it. On a CPU each contender gets a process of its own, forked from a clean one that has
imported everything and built nothing; its peak resident set minus the resident set before the model
was built. Saved bytes are those of the distinct storages that autograd holds, parameters left out.
"""

import gc
import itertools
import multiprocessing
import resource
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # noqa: F401  an optimizer imports it at its first step, where it would be counted
from torch import Tensor, nn

from benchmarks.contenders import Contender, Model, Workload, build_workload, random_batch
from sparsecontrast.methods.method import Batch

MIB = 2**20


def training_memory(contender: Contender, model: Model, batch: int, device: torch.device) -> dict[str, float]:
    """Measure ``peak_mib`` and ``saved_mib`` of a contender's training step on ``batch`` images."""
    if device.type == "cuda":
        return _measure_cuda(contender, model, batch, device)
    return _in_clean_process(_measure_resident, contender, model, batch)


def peak_of(build: Callable[[], Callable[[], object]], warm: Callable[[], Any] | None = None) -> float:
    """Measure the peak of two steps in MiB on a CPU, in a process of its own.

    Args:
        build: makes the step; a function of a module, or a partial of one: its module is imported before
            the count begins.
        warm: makes a small step of the same kind, run before the count begins: what libraries load and keep
            for themselves is then left out.
    """
    return _in_clean_process(_measure_peak, build, warm)


def allocated_peak(step: Callable[[], object]) -> float:
    """Measure the most MiB that the tensors of a step take at one time on a CPU, temporary ones too.

    From torch's own record of allocations: exact and the same each time, where a small step's resident memory
    drowns in what libraries keep for themselves. Work space of matrix libraries is not in it.
    """
    step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a profiler's events are cleared
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as told:
            step()
    assert told.profiler is not None and told.profiler.kineto_results is not None
    events = [e for e in told.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]  # type: ignore[attr-defined]
    return max(itertools.accumulate(changes), default=0) / MIB


def cuda_peak(build: Callable[[], Callable[[], object]]) -> float:
    """Measure the peak of a step in MiB on the current GPU, beyond what was there before it was built."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = build()
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _in_clean_process(measure: Callable[..., Any], *words: Any) -> Any:
    """Run in a process forked from one that has imported everything and built nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *words).result()


def step_saved(work: Workload, batch: Batch) -> int:
    """Train one step; return the bytes of the distinct storages that autograd saved for its backward pass."""
    saved, loss = saved_by(lambda: work.loss(batch), work.module)
    work.update(loss)
    return saved


def saved_by(forward: Callable[[], Tensor], module: nn.Module) -> tuple[int, Tensor]:
    """Run forward; return the bytes of the distinct storages that autograd saved, and the result.

    The module's own parameters are left out.
    """
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # alive until the backward pass: no address comes twice
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    return sum(storages.values()), result


def _measure_resident(contender: Contender, model: Model, batch: int) -> dict[str, float]:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    before = _resident()
    work = build_workload(contender, model, device)
    batches = _steps(work, model, batch)
    _give_moments(work)
    saved = max(step_saved(work, one) for one in batches)
    return {"peak_mib": (_peak() - before) / MIB, "saved_mib": saved / MIB}


def _measure_peak(build: Callable[[], Callable[[], object]], warm: Callable[[], Any] | None) -> float:
    torch.set_num_threads(1)
    if warm is not None:
        warm()()
        gc.collect()
    before = _resident()
    step = build()
    for _ in range(2):
        step()
    return (_peak() - before) / MIB


def _measure_cuda(contender: Contender, model: Model, batch: int, device: torch.device) -> dict[str, float]:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    work = build_workload(contender, model, device)
    batches = _steps(work, model, batch)
    for one in batches * 2:  # the first round compiles and makes the moments
        work.step(one)
    torch.cuda.reset_peak_memory_stats()
    for one in batches:
        work.step(one)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    if contender.compiled:  # a compiled graph saves what it likes, out of the hooks' sight
        return {"peak_mib": peak / MIB}
    return {"peak_mib": peak / MIB, "saved_mib": max(step_saved(work, one) for one in batches) / MIB}


def _steps(work: Workload, model: Model, batch: int) -> list[Batch]:
    """One batch of each kind of step: with the teacher's pass (step 0), without."""
    return [random_batch(model.size, batch, work.device, step) for step in range(min(2, work.cycle))]


def _give_moments(work: Workload) -> None:
    """Make AdamW's moments before the first step, so that one step shows what every later one needs."""
    for group in work.optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    work.optimizer.step()
    work.optimizer.zero_grad(set_to_none=True)


def _peak() -> int:
    """Most bytes that were ever resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _resident() -> int:
    """Bytes resident now; where that cannot be read, the peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize()
