"""Small private methods, and the sums of their clipped gradients."""

from functools import partial

import torch
from torch import nn

from sparsecontrast.config import compose
from sparsecontrast.methods import build_method
from sparsecontrast.methods.method import Batch
from sparsecontrast.noise import SecureStream
from sparsecontrast.privacy import Mechanism, PatientSGD

VIT = ["backbone.img_size=48", "backbone.patch_size=8", "backbone.depth=1"]
CNN = ["backbone=convnext_atto", "backbone.img_size=96", "backbone.tiles=3"]
RESNET = ["backbone=resnet18", "backbone.img_size=96", "backbone.tiles=3"]


class Tiny(nn.Module):
    """Two views of a row should look alike; what it is given is what the library's methods are given."""

    per_sample = True

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten())
            self.head = nn.Sequential(nn.Linear(4 * 36, 5), nn.LayerNorm(5), nn.Linear(5, 3))
        self.backbone.img_size = 8  # type: ignore[assignment]
        self.average = nn.Parameter(self.head[0].weight.detach().clone(), requires_grad=False)
        self.steps = 0

    def forward(self, batch):
        first, second = (self.head(self.backbone(view)) for view in (batch.first, batch.second))
        return (first - second).square().sum(1) + first.square().sum(1)

    @torch.no_grad()
    def after_step(self):
        self.steps += 1
        self.average.lerp_(self.head[0].weight, 0.5)


def library_method(kind, *words):
    told = ["method=patch_contrast", "method.projection_hidden=16", "method.projection_dim=8"]
    m = build_method(compose([*told, "method.keep=0.4", "method.explore=0", *kind, *words]))
    m.start_round(10, 20)
    return m


def engine(method, charge=lambda told: None, seed=1, clip=0.05, sigma=1.0, q=0.5, patients=8, **words):
    told = Mechanism(q, sigma, clip, patients)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=1.0)
    found = PatientSGD(method, optimizer, told, charge, SecureStream(seed), **words)
    found.start_round()
    return found


def batch_of(method, patients, kind="random", seed=0, dtype=torch.float32):
    """Rows of these patients; of kind ``alike``, all but the first row are near-duplicates."""
    g = torch.Generator().manual_seed(seed)
    size, n = method.backbone.img_size, len(patients)
    views = torch.randn(2, n, 1, size, size, generator=g, dtype=dtype)
    if kind == "alike":
        views[:, 1:] = views[:, 1:2] + 1e-3 * views[:, 1:]
    shift = torch.tensor([[1, 0], [0, -1], [0, 0], [-1, 1]])[torch.arange(n) % 4]
    return Batch(views[0], views[1], torch.tensor(patients), torch.Generator().manual_seed(0), 0, shift)


def take(batch, rows):
    rows = torch.as_tensor(rows)
    return Batch(batch.first[rows], batch.second[rows], batch.patients[rows],
                 torch.Generator().manual_seed(0), 0, batch.shift[rows])  # fmt: skip


def clipped_sum(made, batch):
    """The sum before noise, one flat vector."""
    made.optimizer.clear()
    if len(batch.patients):
        made._accumulate(batch)
    named = partial(getattr)
    parts = [
        torch.zeros_like(p) if (s := named(p, "summed_grad")) is None else s for p in made.optimizer.params
    ]
    made.optimizer.clear()
    return torch.cat([part.flatten() for part in parts])


def brute_force_sum(method, batch, clip):
    """One patient at a time by autograd: mean loss, gradient, clip, sum."""
    trained = [p for p in method.parameters() if p.requires_grad]
    total = 0
    for patient in batch.patients.unique():
        loss = method(take(batch, (batch.patients == patient).nonzero()[:, 0])).mean()
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        flat = torch.cat([
            (torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, trained, strict=True)
        ])  # fmt: skip
        total = total + flat * min(1.0, clip / float(flat.norm()))
    return total
