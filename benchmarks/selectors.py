"""Who says where to look: our scorer, what it is made of, and its rivals; none sees a label.

A selector is a function from images to scores of their cells. Those that learn do so on random views
of the training images, as training draws them, from weights and batches of one seed.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.contenders import Model
from benchmarks.rivals.relaxed import ChangedViT, PerturbedTopK, StraightThrough, contrast
from sparsecontrast.data.transforms import Augmentation, random_view
from sparsecontrast.methods.method import Batch
from sparsecontrast.methods.sparse_contrast import SparseContrast
from sparsecontrast.models.saliency import centre_scores, energy_scores
from sparsecontrast.models.sparse_vit import build_sparse_vit
from sparsecontrast.models.surprise import SurprisePredictor
from sparsecontrast.trainer import derive_seed, explicit_attention, lr_factor

Selector = Callable[[Tensor], Tensor]  # images [B, 1, S, S] -> scores [B, cells]
Objective = Callable[[Tensor, torch.Generator, int], Tensor]  # uint8 images, draws, step -> loss
LAST = 20  # steps whose mean is the loss that is told
VIEWS = Augmentation(area=(0.6, 1.0), degrees=7.0)  # configs/config.yaml
ALONE = ("surprise", "reconstruction_error")  # learn without a backbone
JOINTLY = ("distillation", "straight_through", "perturbed_top_k")  # learn with the contrast
FIXED = ("prior_alone", "energy", "random")
NAMES = (ALONE[0], "surprise_without_prior", *ALONE[1:], *JOINTLY, *FIXED)
Budget = dict[str, float]  # steps, images of a step, CPU seconds; with the contrast also its loss and chance
UNTRAINED: Budget = {"steps": 0, "step_images": 0, "train_seconds": 0.0}


@dataclass(frozen=True)
class Protocol:
    """What every learnt selector of one data set gets.

    Attributes:
        size: of the images in pixels.
        patch: pixels of a patch's side; a cell is 2 x 2 patches.
        depth: blocks of the vit_tiny of those that learn with the contrast.
        steps: of a scorer that learns alone.
        batch: views of such a step.
        lr: its highest learning rate.
        contrast_steps: of those that learn with the contrast.
        contrast_batch: images of such a step, two views each.
        contrast_lr: its highest learning rate.
        keep: share of the tokens that the contrast computes.
    """

    size: int = 112
    patch: int = 8
    depth: int = 4
    steps: int = 500
    batch: int = 64
    lr: float = 3e-3
    contrast_steps: int = 80
    contrast_batch: int = 32
    contrast_lr: float = 1e-3
    keep: float = 0.35

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        side = self.size // self.patch // 2
        return side, side


@dataclass(frozen=True)
class Trial:
    """Training images, uint8 [N, S, S], a protocol, and the seed of weights, batches and views."""

    images: np.ndarray
    protocol: Protocol
    seed: int


class ReconstructionError(SurprisePredictor):
    """The same network without a variance: plain squared error, and its logarithm as the score."""

    def predict(self, small: Tensor) -> tuple[Tensor, Tensor]:
        """Foretell the detail of every cell from the others; the log variance is 0."""
        mean, log_variance = super().predict(small)
        return mean, torch.zeros_like(log_variance)


def selectors(trial: Trial, names: Sequence[str] = NAMES) -> Iterator[tuple[str, Selector, Budget]]:
    """Yield each selector's name, itself, and what its training took (``Budget``)."""
    for name in ALONE:
        asked = {name, "surprise_without_prior"} if name == "surprise" else {name}
        if not asked & set(names):
            continue
        scorer, budget = learn_alone(name, trial)
        if name in names:
            yield name, scorer, budget
        if "surprise_without_prior" in asked & set(names):
            bare = copy.deepcopy(scorer)
            bare.prior = torch.zeros_like(bare.prior)
            yield "surprise_without_prior", bare, budget
    for name in JOINTLY:
        if name in names:
            yield (name, *learn_jointly(name, trial))
    for name in FIXED:
        if name in names:
            yield name, fixed(name, trial), UNTRAINED


def learn_alone(name: str, trial: Trial) -> tuple[SurprisePredictor, Budget]:
    """Train a scorer whose loss needs no backbone; one view of each image a step."""
    p, kind = trial.protocol, SurprisePredictor if name == "surprise" else ReconstructionError
    with _weights_of(trial):
        scorer = kind(p.grid)

    def objective(pixels: Tensor, generator: torch.Generator, _: int) -> Tensor:
        return scorer.read(random_view(pixels, generator, p.size, VIEWS)[0])[1].mean()

    return scorer, _train(scorer, objective, trial, p.steps, p.batch, p.lr)[0]


def learn_jointly(name: str, trial: Trial) -> tuple[nn.Module, Budget]:
    """Train the whole contrastive method and return its scorer."""
    p = trial.protocol
    with _weights_of(trial):
        module, scorer, after_step = _contrastive(name, trial)
    explicit_attention(module)

    def objective(pixels: Tensor, generator: torch.Generator, step: int) -> Tensor:
        first, second = (random_view(pixels, generator, p.size, VIEWS)[0] for _ in range(2))
        if step:
            after_step()  # what follows the step before
        with torch.autocast("cpu", torch.bfloat16):
            return module(Batch(first, second, torch.arange(len(first)), generator, step)).mean()

    told = (p.contrast_steps, p.contrast_batch, p.contrast_lr)
    budget, losses = _train(module, objective, trial, *told)
    contrast = {
        "contrast_loss": float(np.mean(losses[-LAST:])),
        "chance_loss": math.log(budget["step_images"]),
    }
    return scorer, budget | contrast


def fixed(name: str, trial: Trial) -> Selector:
    """Return a selector that learns nothing."""
    grid = trial.protocol.grid
    cells = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(derive_seed(trial.seed, "random"))
    return {
        "prior_alone": lambda x: centre_scores(grid).expand(len(x), -1),
        "energy": lambda x: energy_scores(x, grid),
        "random": lambda x: torch.rand(len(x), cells, generator=generator),
    }[name]


def _contrastive(name: str, trial: Trial) -> tuple[nn.Module, nn.Module, Callable[[], None]]:
    """Method, scorer, and what follows a step; the scorer of all three is the same network."""
    p = trial.protocol
    changes: dict[str, Any] = {
        "backbone.patch_size": p.patch, "backbone.depth": p.depth, "method.keep": p.keep,
        "method.selection": "attention", "method.focus": False, "method.temperature": 0.15,
    }  # fmt: skip
    backbone, method = Model("vit_tiny", p.size, tuple(changes.items())).configs()
    sparse = build_sparse_vit(backbone, method.cell)
    if name == "distillation":
        module = SparseContrast(method, sparse)
        module.keep = p.keep
        return module, module.saliency, module.after_step
    kind = StraightThrough if name == "straight_through" else PerturbedTopK
    draws = torch.Generator().manual_seed(derive_seed(trial.seed, name))
    encoder = kind(ChangedViT(sparse.vit, sparse.cell), method, draws)
    return contrast(encoder, method), encoder.saliency, lambda: None


def _train(
    module: nn.Module, objective: Objective, trial: Trial, steps: int, batch: int, lr: float
) -> tuple[Budget, list[float]]:
    """Train in place; returns what it took, views included, and the loss (of a method: contrast) by step."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, betas=(0.9, 0.95), weight_decay=0.05)
    generator = torch.Generator().manual_seed(derive_seed(trial.seed, "batches"))
    size, losses, start = min(batch, len(trial.images)), [], time.process_time()
    for step in range(steps):
        drawn = torch.randperm(len(trial.images), generator=generator)[:size].sort().values.numpy()
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, steps, 0.1)
        optimizer.zero_grad(set_to_none=True)
        loss = objective(torch.from_numpy(trial.images[drawn]), generator, step)
        loss.backward()
        optimizer.step()
        losses.append(getattr(module, "metrics", dict)().get("loss", float(loss.detach())))
    module.eval()
    return {"steps": steps, "step_images": size, "train_seconds": time.process_time() - start}, losses


@contextmanager
def _weights_of(trial: Trial) -> Iterator[None]:
    """Draw weights from the trial's seed, and leave torch's own generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        yield
