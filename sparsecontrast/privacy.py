"""Patient-level DP-SGD: what one patient can change in a step is bounded, and then drowned in noise.

One step (Abadi et al., arXiv 1607.00133, algorithm 1; the patient as its unit: McMahan et al., arXiv
1710.06963, algorithm 1), over patients drawn by Poisson sampling (``sampling.py``):

    g_p = gradient of the mean loss of patient p's images          one row a patient, not an image
    g_p = 0 where it is not finite; g_p min(1, C / |g_p|)           clipped
    S = sum_p g_p                                                    removing a patient changes S by <= C
    charge the ledger; only then
    weights <- optimizer((S + N(0, sigma^2 C^2)) / (q N))            q N is public, not the batch's size

Clipping images instead would let a patient of four films count four times (2.6 C measured). An empty
batch is a step like any other: noise alone, and charged. A large batch may come in pieces (virtual
steps): S is the same, and what an interruption leaves behind is thrown away, never released.

Everything that follows sees released weights alone: the optimizer's moments are functions of noised
gradients; the scorer and the backbone are among the clipped parameters; ``Method.after_step`` (an EMA)
runs on the weights after the update. That is post-processing and costs nothing (Dwork and Roth 2014,
proposition 2.1). Not covered: ``Method.metrics`` holds plain means of the last step's batch, and the
views' draws must be secret (``SecureStream.generator``).

Ghost clipping (Li et al., arXiv 2110.05679) is left out: with Opacus on timm's ViT-tiny at 224 px it costs
2.85 to 3.0 of a step without privacy in fp32, 3.4 to 3.9 in bf16 (``benchmarks.privacy``), more than rows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from sparsecontrast.coupling import noise_batch
from sparsecontrast.errors import ConfigError, MethodError
from sparsecontrast.methods.method import Batch, Method, refuse_coupled
from sparsecontrast.noise import SecureStream
from sparsecontrast.row_gradients import RowGradients

MARGIN = 1 - 1e-6  # norms are rounded; what is clipped to C stays below it
BLOCK = 256


@dataclass(frozen=True)
class Mechanism:
    """One private step, as the accountant knows it; all of it public.

    Attributes:
        sample_rate: q in (0, 1], the probability of each patient to be in a step.
        noise_multiplier: sigma > 0, deviation of the noise in units of ``max_grad_norm``.
        max_grad_norm: C > 0, to which a patient's gradient is clipped.
        patients: N >= 1, which with q scales the sum: a constant of the cohort, never counted anew.
    """

    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    patients: int

    def __post_init__(self):
        if not 0 < self.sample_rate <= 1:
            raise ConfigError(f"sample_rate={self.sample_rate}: must be in (0, 1]")
        for name in ("noise_multiplier", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)}: must be a finite number above 0")
        if self.patients < 1:
            raise ConfigError(f"patients={self.patients}: must be at least 1")


Charge = Callable[[Mechanism], None]
"""Book one step before it is released; raising refuses it. It must be durable when it returns."""


class PatientOptimizer(DPOptimizer):
    """Clip patients, sum, charge, add noise, and let the wrapped optimizer step.

    Args:
        optimizer: any; it never sees a gradient without noise.
        mechanism: what is done.
        charge: called once a step, before noise is drawn.
        stream: source of the noise.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, mechanism: Mechanism, charge: Charge, stream: SecureStream
    ):
        super().__init__(
            optimizer, noise_multiplier=mechanism.noise_multiplier, max_grad_norm=mechanism.max_grad_norm,
            expected_batch_size=None, loss_reduction="sum",
        )  # fmt: skip
        self.mechanism, self.charge, self.stream = mechanism, charge, stream
        self.reached: set[Tensor] = set()

    @torch.no_grad()
    def clip_and_accumulate(self, patients: Tensor | None = None) -> None:
        """Clip each patient's gradient and add it to the sum; forget the rows.

        Args:
            patients: whom each row shows, codes [B]; a row's gradient holds its share of the patient's mean.

        Raises:
            MethodError: a parameter has a gradient that was not there when the model was checked.
        """
        assert patients is not None, "clipping needs to know whose rows these are"
        found = {p: p.grad_sample for p in self.params if p.grad_sample is not None}  # type: ignore[attr-defined]
        if not found.keys() <= self.reached:
            raise MethodError("the loss reaches other parameters than at the last start_round()")
        owner = patients.unique(return_inverse=True)[1]
        for parameter, rows in found.items():
            found[parameter] = parameter.grad_sample = by_patient(rows.flatten(1), owner)  # type: ignore[attr-defined]
        norms = patient_norms(list(found.values()))
        broken = ~norms.isfinite()
        factors = (self.max_grad_norm * MARGIN / norms).clamp(max=1).masked_fill(broken, 0.0)
        any_broken = bool(broken.any())
        for parameter, rows in found.items():
            if any_broken:
                rows[broken] = 0.0  # zero times NaN is NaN
            total = (factors.to(rows.dtype) @ rows).view_as(parameter)
            held = parameter.summed_grad  # type: ignore[attr-defined]
            parameter.summed_grad = total if held is None else held.add_(total)  # type: ignore[attr-defined]
            parameter.grad_sample = None  # type: ignore[attr-defined]

    def pre_step(self, closure: Any = None) -> bool:
        """Charge, then add noise: the one place where anything of the data is let out."""
        self.charge(self.mechanism)
        self.add_noise()
        if self.step_hook is not None:
            self.step_hook(self)
        return True

    @torch.no_grad()
    def add_noise(self) -> None:
        """Set ``grad`` of all that the loss reaches to the noised sum over q N; of the rest to None."""
        scale = 1 / (self.mechanism.sample_rate * self.mechanism.patients)
        std = self.mechanism.noise_multiplier * self.max_grad_norm
        reached = [p for p in self.params if p in self.reached]
        for p in self.params:
            p.grad = None
        for p, noise in zip(reached, self.stream.gaussians(reached, std), strict=True):
            total, p.summed_grad = p.summed_grad, None  # type: ignore[attr-defined]
            p.grad = (noise if total is None else noise.add_(total)).mul_(scale)

    def signal_skip_step(self, do_skip: bool = True) -> NoReturn:
        """Refuse: pieces of a step are given to ``PatientSGD.step``."""
        raise MethodError("virtual steps are the pieces given to PatientSGD.step")

    def clear(self) -> None:
        """Throw away all that has not been released."""
        for p in self.params:
            p.grad_sample = p.summed_grad = p.grad = None  # type: ignore[attr-defined]
        self._step_skip_queue.clear()
        self._is_last_step_skipped = False


def by_patient(rows: Tensor, owner: Tensor) -> Tensor:
    """Add up the rows of each patient: [P, n] of rows [B, n] and whom each shows, codes 0..P-1 [B].

    What is clipped must be what was measured: films that cancel in a patient's norm would come back in a sum
    over films. With one film a patient the rows are taken as they stand; their order does not matter.
    """
    count = int(owner.max()) + 1 if len(owner) else 0
    if count == len(owner):
        return rows
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, owner, rows)


@torch.no_grad()
def patient_norms(rows: list[Tensor]) -> Tensor:
    """L2 norm of each patient's gradient, float64 [P], of rows [P, n] of all parameters.

    Right to 2e-7: float32 sums over a million weights lose up to 8e-4, more than ``MARGIN`` allows for, so
    only ``BLOCK`` weights are summed in the rows' own precision.
    """
    squares = torch.zeros(len(rows[0]), dtype=torch.float64, device=rows[0].device)
    for own in rows:
        whole = own.shape[1] // BLOCK
        blocks = own[:, : whole * BLOCK].unflatten(1, (whole, BLOCK))
        for part in (blocks, own[:, None, whole * BLOCK :]):
            squares += torch.linalg.vector_norm(part, dim=2).double().square().sum(1)
    return squares.sqrt()


class PatientSGD:
    """Train a method privately, a step at a time.

    Args:
        method: its ``per_sample`` must be true.
        optimizer: over the method's parameters.
        mechanism: q, sigma, C and N.
        charge: books a step before it is released; raising stops it.
        stream: source of the noise.
        bf16: compute the network in bfloat16; gradients are clipped and summed in float32.

    Raises:
        MethodError: the method couples patients, or a layer has no rule for per-sample gradients.
    """

    def __init__(
        self, method: Method, optimizer: torch.optim.Optimizer, mechanism: Mechanism, charge: Charge,
        stream: SecureStream, bf16: bool = False,
    ):  # fmt: skip
        refuse_coupled(method)
        self.method, self._bf16 = method, bf16
        self.optimizer = PatientOptimizer(optimizer, mechanism, charge, stream)
        assert isinstance(method, nn.Module), "a method is a module"
        self.module: nn.Module = method
        self.rows = RowGradients(self.module)

    def start_round(self) -> None:
        """Check the model's per-sample gradients on noise; call where the graph may have changed.

        What the loss reaches gets noise, empty batch or not; what it does not reach stays untouched.

        Raises:
            MethodError: they are wrong, or the loss couples rows.
        """
        self.optimizer.clear()
        names = self.rows.verify(partial(noise_batch, self.method))
        self.optimizer.reached = {self.module.get_parameter(name) for name in names}

    def step(self, batches: Iterable[Batch]) -> None:
        """Take one step on the batches of one draw: none, one, or several that are too large at once.

        Raises:
            MethodError: a patient's rows lie in two batches, or ``start_round`` was never called.
            Exception: what ``charge`` raises; then nothing was released and nothing changed.
        """
        if not self.optimizer.reached:
            raise MethodError("call start_round() before the first step")
        self.optimizer.clear()
        seen: set[int] = set()
        try:
            for batch in batches:
                codes = set(batch.patients.tolist())
                if codes & seen:
                    raise MethodError(
                        "a patient's images must lie in one batch of a step: their mean is clipped"
                    )
                seen |= codes
                self._accumulate(batch)
            self.optimizer.step()
        finally:
            self.optimizer.clear()
        self.method.after_step()

    def close(self) -> None:
        """Take the hooks off the method and forget what they held."""
        self.optimizer.clear()
        self.rows.cleanup()
        for p in self.optimizer.params:
            del p.summed_grad  # type: ignore[attr-defined]

    def _accumulate(self, batch: Batch) -> None:
        owner, counts = batch.patients.unique(return_inverse=True, return_counts=True)[1:]
        self.rows.backward(batch, 1 / counts[owner].double(), self._bf16)
        self.optimizer.clip_and_accumulate(batch.patients)
