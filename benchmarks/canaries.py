"""Canaries in a private run: patients whose traces in what is released are looked for.

Gradient canaries (Nasr et al. 2023, arXiv 2302.07956; the "Dirac" canaries of Steinke et al. 2023, arXiv
2305.08846) stand for the worst patient: the gradient is chosen, not computed, ten clips long in one
coordinate of its own. From there on it goes the way of every patient's: the sampler draws it, the optimizer
clips, sums and drowns it. Input canaries are images; their gradient is the network's.

The auditor sees all released weights, after every step, and knows all but who was in, who was drawn, and
the noise. In units of the clip, a step adds b + N(0, sigma^2) to a gradient canary's coordinate, b = 1
where it was in and drawn; its best score is the likelihood ratio, summed over steps (Neyman and Pearson):

    log(1 - q + q exp((x - 1/2) / sigma^2)).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sparsecontrast.methods.method import Batch
from sparsecontrast.privacy import PatientSGD

LOUD = 10.0  # clips: how long a gradient canary's gradient is before it is clipped
CELLS = 4_000_000  # numbers in a piece of gradient canaries' rows: bounds memory
ROWS = 64  # input canaries in a piece


@dataclass(frozen=True)
class Shout(Batch):
    """Rows of gradient canaries on one parameter; there are no images.

    Attributes:
        parameter: of the method.
        elements: of the flattened parameter, one a row [B].
    """

    parameter: nn.Parameter | None = None
    elements: Tensor | None = None


class GradientCanaries:
    """A coordinate of its own for each of ``count`` patients: those that other patients reach least.

    Args:
        parameters: that the loss reaches.
        count: m, at most the number of coordinates.
        others: the other patients' sum at the first weights, flat over all parameters; it stands in the
            auditor's way, who does not know which of them were drawn.
    """

    def __init__(self, parameters: list[nn.Parameter], count: int, others: Tensor):
        self.parameters = parameters
        self.ends = np.cumsum([p.numel() for p in parameters])
        assert count <= self.ends[-1] == len(others), "fewer coordinates than canaries"
        self.places = np.sort(np.argsort(others.abs().numpy(), kind="stable")[:count])

    def pieces(self, canaries: np.ndarray, codes: np.ndarray) -> Iterator[Shout]:
        """Make the rows of a step, in pieces that fit into memory.

        Args:
            canaries: of each row, ascending; a patient of several films has as many rows.
            codes: whom each row counts for, as clipping sees it.
        """
        owner = np.searchsorted(self.ends, self.places[canaries], side="right")
        for index in np.unique(owner):
            parameter, mine = self.parameters[index], np.flatnonzero(owner == index)
            start = self.ends[index] - parameter.numel()
            size = max(1, CELLS // parameter.numel())
            breaks = np.flatnonzero(np.diff(canaries[mine])) + 1  # a patient's rows stay together
            pieces = np.split(mine, breaks)
            per = max(1, size // max(map(len, pieces)))
            for first in range(0, len(pieces), per):
                rows = np.concatenate(pieces[first : first + per])
                elements = torch.from_numpy(self.places[canaries[rows]] - start)
                yield _shout(parameter, elements, torch.from_numpy(codes[rows]))

    def read(self, released: Tensor) -> np.ndarray:
        """The canaries' coordinates of a flat vector over all parameters, float64 [m]."""
        return released[torch.from_numpy(self.places)].double().numpy()


def _shout(parameter: nn.Parameter, elements: Tensor, codes: Tensor) -> Shout:
    nothing = torch.empty(len(codes), 0)
    return Shout(nothing, nothing, codes, torch.Generator(), 0, None, parameter, elements)


class InputCanaries:
    """Images unlike any film: white noise, and for a second view other white noise.

    Their gradients are nearly orthogonal to each other (cosine 0.03 in the mean), to which no other kind of
    image came close that was tried: what images have in common, their gradients have.

    Args:
        count: m.
        size: pixels of a side.
        seed: of the noise.
    """

    def __init__(self, count: int, size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = torch.randn(2, count, 1, size, size, generator=generator)
        self.shift = torch.randint(-1, 2, (count, 2), generator=generator)
        self.count = count

    def pieces(self, canaries: np.ndarray, codes: np.ndarray) -> Iterator[Batch]:
        """Make the rows of a step, in pieces that fit into memory; ``codes`` say whom each counts for."""
        for start in range(0, len(canaries), ROWS):
            chosen = torch.from_numpy(canaries[start : start + ROWS])
            owner = torch.from_numpy(codes[start : start + ROWS])
            generator = torch.Generator().manual_seed(0)  # nothing is drawn from it
            yield Batch(self.first[chosen], self.second[chosen], owner, generator, 0, self.shift[chosen])

    def gradients(self, engine: PatientSGD, parameters: list[nn.Parameter]) -> Tensor:
        """Clipped gradient of every canary at the present weights, in clips [m, weights]."""
        found = []
        for piece in self._all():
            engine.rows.backward(piece)
            found.append(torch.cat([p.grad_sample.flatten(1) for p in parameters], dim=1))  # type: ignore[attr-defined]
            engine.optimizer.clear()
        rows = torch.cat(found)
        return rows.div_(rows.norm(dim=1, keepdim=True).clamp(min=engine.optimizer.max_grad_norm))

    @torch.no_grad()
    def losses(self, method: nn.Module) -> np.ndarray:
        """Loss of every canary at the present weights, float64 [m]."""
        return torch.cat([method(piece) for piece in self._all()]).double().numpy()

    @staticmethod
    def estimate(
        gradients: Tensor, released: Tensor, sample_rate: float, noise_multiplier: float
    ) -> np.ndarray:
        """Estimate who was in a step, linearly and with the least mean square, float64 [m].

        The plain inner product with a canary's gradient holds those of all other canaries too. The auditor
        knows them: released = sum_j b_j g_j + noise, b_j with mean q / 2 before anything is seen.

        Args:
            gradients: in clips [m, weights].
            released: in clips [weights].
            sample_rate: q as claimed.
            noise_multiplier: sigma as the auditor takes it to be.
        """
        mean = sample_rate / 2
        gram = (gradients @ gradients.T).double()
        unexplained = (gradients @ released).double() - mean * gram.sum(1)
        gram.diagonal().add_(noise_multiplier**2 / (mean * (1 - mean)))
        return torch.linalg.solve(gram, unexplained).numpy()

    def _all(self) -> Iterator[Batch]:
        everyone = np.arange(self.count)
        return self.pieces(everyone, everyone)


class AuditedSGD(PatientSGD):
    """``PatientSGD`` that also takes gradient canaries; whatever is a batch of images is left to it."""

    def _accumulate(self, batch: Batch) -> None:
        if not isinstance(batch, Shout):
            return super()._accumulate(batch)
        parameter, elements = batch.parameter, batch.elements
        assert parameter is not None and elements is not None
        owner, counts = batch.patients.unique(return_inverse=True, return_counts=True)[1:]
        rows = torch.zeros(len(elements), parameter.numel())
        # as PatientSGD does it: a row holds its share of its patient's mean
        share = LOUD * self.optimizer.max_grad_norm / counts[owner]
        rows[torch.arange(len(elements)), elements] = share
        parameter.grad_sample = rows.view(-1, *parameter.shape)  # type: ignore[attr-defined]
        self.optimizer.clip_and_accumulate(batch.patients)


def weights(parameters: list[nn.Parameter]) -> Tensor:
    """All parameters as one flat vector."""
    return torch.cat([p.detach().flatten() for p in parameters])


def attacks(seen: np.ndarray, sample_rate: float, noise_multiplier: float) -> dict[str, np.ndarray]:
    """Scores [m] of gradient canaries: the likelihood ratio, and the deviation over steps.

    The second finds what the first is blind to: noise that is the same in every step cancels in differences.

    Args:
        seen: the canaries' coordinates in units of the clip [steps, m].
        sample_rate: q as claimed.
        noise_multiplier: sigma as claimed.
    """
    exponent = (seen - 0.5) / noise_multiplier**2
    if sample_rate == 1:
        ratio = exponent
    else:
        ratio = np.logaddexp(np.log1p(-sample_rate), np.log(sample_rate) + exponent)
    return {"likelihood ratio": ratio.sum(0), "deviation over steps": seen.std(0)}


def exact_run(
    included: np.ndarray, sample_rate: float, noise_multiplier: float, steps: int, rng: np.random.Generator
) -> np.ndarray:
    """What an auditor sees of a mechanism that does exactly what it claims, [steps, m]."""
    drawn = included & (rng.random((steps, len(included))) < sample_rate)
    return drawn + noise_multiplier * rng.standard_normal(drawn.shape)
