"""One private step on near-duplicates and an outlier: contrast over the batch as Opacus clips it, and ours.

SimCLR's loss (InfoNCE with negatives from the batch) makes every row's gradient depend on every record, so
clipping rows does not bound what a record changes. On near-duplicates every row's loss is that of telling it
from its twins, until an outlier joins or leaves.

The audit plays the same step many times, each time with its own coin for the one record that changes most.
The runs share nothing, so all of them together are as private to one coin as one of them is, and the one-run
audit holds with a canary a run. The auditor knows both sums; his score is the likelihood ratio of the two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from benchmarks.audit_runs import CLIP, NETWORK, SIZE
from sparsecontrast import losses
from sparsecontrast.config import compose
from sparsecontrast.data.phantom import render
from sparsecontrast.data.transforms import normalise
from sparsecontrast.methods import build_method
from sparsecontrast.methods.method import Batch
from sparsecontrast.noise import SecureStream
from sparsecontrast.privacy import Mechanism, PatientSGD

BATCH = 32
NEAR = 0.1  # deviation between near-duplicates, of normalised pixels
TEMPERATURE = 0.5  # SimCLR's on CIFAR-10 (arXiv 2002.05709)
Views = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Step:
    """One step on two neighbouring sets of records.

    Attributes:
        larger: sum of clipped gradients with the record, flat, in clips.
        smaller: without it.
        noised: adds the mechanism's own noise to a sum.
    """

    larger: Tensor
    smaller: Tensor
    noised: Callable[[Tensor], Tensor]

    @property
    def change(self) -> float:
        """By how many clips the record changes the sum; the claim rests on at most 1."""
        return float((self.larger - self.smaller).double().norm())

    def play(self, trials: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Toss a coin, take the step, score it: scores [trials] and the coins, boolean [trials]."""
        coins = np.random.default_rng([seed, 3]).random(trials) < 0.5
        direction = self.larger - self.smaller
        scores = [float(direction @ self.noised(self.larger if coin else self.smaller)) for coin in coins]
        return np.array(scores), coins


def records(seed: int) -> Views:
    """Two views [B, 1, H, W] of one film's near-duplicates, and of one film of another kind, the last."""
    generator = torch.Generator().manual_seed(seed)
    film = torch.from_numpy(render(0, 0, 0, 0, SIZE).image * 255).round().to(torch.uint8)
    pixels = normalise(film[None, None].float() / 255)
    views = pixels + NEAR * torch.randn(2, BATCH, 1, SIZE, SIZE, generator=generator)
    views[:, -1] = torch.randn(1, SIZE, SIZE, generator=generator)
    return views[0], views[1]


def naive(noise_multiplier: float, seed: int) -> Step:
    """Opacus as documented on InfoNCE over the batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(1, 16, 5, 2), nn.GroupNorm(4, 16), nn.GELU(),
            nn.Conv2d(16, 32, 5, 2), nn.GroupNorm(4, 32), nn.GELU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 32),
        )  # fmt: skip
    model = GradSampleModule(network, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=noise_multiplier, max_grad_norm=CLIP,
        expected_batch_size=BATCH, loss_reduction="sum", generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip

    def clipped(first: Tensor, second: Tensor) -> Tensor:
        rows = torch.cat([first, second]).requires_grad_()  # or its backward hooks warn
        one, other = model(rows).chunk(2)
        losses.info_nce(one, other, TEMPERATURE).sum().backward()
        for p in optimizer.params:  # both views of a record are its row
            p.grad_sample = p.grad_sample.view(2, len(first), *p.shape).sum(0)  # type: ignore[attr-defined]
        optimizer.clip_and_accumulate()
        total = torch.cat([p.summed_grad.flatten() for p in optimizer.params]) / CLIP  # type: ignore[attr-defined]
        optimizer.zero_grad()
        return total

    return _worst(clipped, records(seed), lambda total: _noised(optimizer, total))


def ours(noise_multiplier: float, seed: int) -> Step:
    """``patch_contrast`` and ``PatientSGD`` on the same records."""
    method = build_method(compose([*NETWORK, f"seed={seed}"]))
    method.start_round(1, 1)
    views = records(seed)
    count = len(views[0])
    engine = PatientSGD(
        method, torch.optim.SGD(method.parameters(), lr=1.0), Mechanism(1.0, noise_multiplier, CLIP, count),
        lambda told: None, SecureStream(seed, "noise"),
    )  # fmt: skip
    engine.start_round()

    def clipped(first: Tensor, second: Tensor) -> Tensor:
        shift = torch.zeros(len(first), 2, dtype=torch.long)
        engine._accumulate(Batch(first, second, torch.arange(len(first)), torch.Generator(), 0, shift))
        held = (getattr(p, "summed_grad", None) for p in engine.optimizer.params)
        parts = zip(engine.optimizer.params, held, strict=True)
        total = torch.cat([(torch.zeros_like(p) if h is None else h).flatten() for p, h in parts]) / CLIP
        engine.optimizer.clear()
        return total

    return _worst(clipped, views, lambda total: count * _noised(engine.optimizer, total))


def _worst(clipped: Callable[[Tensor, Tensor], Tensor], views: Views, noised: Callable) -> Step:
    """The step whose sum changes most when one of the records leaves."""
    whole, count = clipped(*views), len(views[0])
    steps = []
    for gone in range(count):
        rest = torch.arange(count) != gone
        steps.append(Step(whole, clipped(views[0][rest], views[1][rest]), noised))
    return max(steps, key=lambda step: step.change)


def _noised(optimizer: DPOptimizer, total: Tensor) -> Tensor:
    """What the optimizer makes of a sum, in clips."""
    parts = total.split([p.numel() for p in optimizer.params])
    for p, part in zip(optimizer.params, parts, strict=True):
        p.summed_grad = (part * CLIP).view_as(p)  # type: ignore[attr-defined]
    optimizer.add_noise()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in optimizer.params]
    released = torch.cat([f.flatten() for f in found]) / CLIP
    optimizer.zero_grad()  # in place
    return released
