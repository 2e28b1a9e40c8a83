"""Train one classifier on cells: epochs, a moving average of the weights, early stopping, and k.

Any network fits that turns ``Labelled`` into a loss of each row and images into logits; the baselines of
``benchmarks.cells`` are trained by the same lines as SparseAttnNet.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecontrast.classify.augment import augment, normalise
from sparsecontrast.classify.cells import Cells, Split
from sparsecontrast.classify.settings import FitConfig
from sparsecontrast.errors import MethodError
from sparsecontrast.methods.sparse_attn_net import Labelled, SparseAttnNet
from sparsecontrast.methods.word_budget import WordBudget

BATCH = 256  # of evaluation
CLIP = 1.0  # norm of a step's gradient
WARM_EMA = 10  # the average follows closely in the first steps, when weights still move far


@dataclass(frozen=True)
class Fitted:
    """What training ended with.

    Attributes:
        epoch: the one whose averaged weights the network now has: of the lowest held-out loss.
        rows: one entry an epoch, as ``metrics.jsonl`` has them.
        seconds: CPU seconds of training.
    """

    epoch: int
    rows: list[dict[str, Any]]
    seconds: float


def fit(
    network: nn.Module, cells: Cells, split: Split, config: FitConfig, seed: int,
    tick: Callable[[str], None] = lambda text: None,
) -> Fitted:  # fmt: skip
    """Train ``network`` in place on ``split.train``; it ends in evaluation mode, with its best weights.

    Args:
        network: ``SparseAttnNet``, whose ``k`` then follows ``split.val``, or any with ``forward(Labelled)``
            -> [B] and ``logits(images)`` -> [B, C].
        cells: all pictures.
        split: rows to train on and to hold out.
        config: of training.
        seed: of batches, augmentation and exploration.
        tick: called once an epoch, with its figures in words.

    Raises:
        MethodError: a loss is no longer finite; the network is then good for nothing.
    """
    budget, best, rows = _word_budget(network), _Best(), []
    started = time.process_time()
    average = copy.deepcopy(network).eval()
    for row in _epochs(network, average, cells, split.train, config, seed):
        epoch = row["epoch"]
        row |= held_out(average, cells, split.val)
        best.see(average, epoch, _finite(row["held_out_loss"], "held-out loss", epoch))
        row |= _adapt(budget, [network, average], row["held_out_loss"])
        rows.append(row)
        tick(f"epoch {epoch}, held-out loss {row['held_out_loss']:.3f}")
        if epoch - best.epoch >= config.patience:
            break
    best.restore(network)
    return Fitted(best.epoch, rows, time.process_time() - started)


def refit(
    network: nn.Module, cells: Cells, chosen: Tensor, config: FitConfig, seed: int,
    tick: Callable[[str], None] = lambda text: None,
) -> Fitted:  # fmt: skip
    """Train ``network`` in place on rows ``chosen`` for all epochs; it ends with the last averaged weights.

    Nothing is held out: ``k`` stays what it is, and no epoch is preferred. Arguments and errors as ``fit``'s.
    """
    started, rows = time.process_time(), []
    average = copy.deepcopy(network).eval()
    for row in _epochs(network, average, cells, chosen, config, seed):
        rows.append(row | ({"k": network.k} if isinstance(network, SparseAttnNet) else {}))
        tick(f"epoch {row['epoch']}, loss {row['loss']:.3f}")
    network.load_state_dict(average.state_dict())
    network.eval()
    return Fitted(config.epochs, rows, time.process_time() - started)


def _epochs(
    network: nn.Module, average: nn.Module, cells: Cells, rows: Tensor, config: FitConfig, seed: int
) -> Iterator[dict[str, Any]]:
    """Train an epoch at a time on ``rows``; ``average`` follows the weights; what each epoch has to tell."""
    generator, step = torch.Generator().manual_seed(seed), 0
    optimizer = build_optimizer(network, config)
    steps = config.epochs * math.ceil(len(rows) / config.batch_size)
    for epoch in range(1, config.epochs + 1):
        network.train()
        losses, order = [], rows[torch.randperm(len(rows), generator=generator)]
        for chosen in order.split(config.batch_size):
            set_rate(optimizer, config, step, steps)
            images = normalise(augment(cells.images[chosen], config.colour, generator))
            batch = Labelled(images, cells.labels[chosen], generator)
            losses.append(_finite(train_step(network, optimizer, batch), "loss", epoch))
            step += 1
            _follow(average, network, min(config.ema, step / (step + WARM_EMA)))
        yield {"epoch": epoch, "loss": sum(losses) / len(losses), "lr": optimizer.param_groups[0]["lr"]}


def _finite(loss: float, name: str, epoch: int) -> float:
    if not math.isfinite(loss):
        raise MethodError(f"classify: the {name} is {loss} in epoch {epoch}; lower train.lr")
    return loss


def logits(network: Any, images: Tensor) -> Tensor:
    """Judge uint8 images [N, 3, S, S]: [N, C]."""
    with torch.no_grad():
        return torch.cat([network.logits(normalise(part)).float() for part in images.split(BATCH)])


def held_out(network: nn.Module, cells: Cells, rows: Tensor) -> dict[str, float]:
    """Loss and accuracy on held-out pictures, all pictures of one weight."""
    found, labels = logits(network, cells.images[rows]), cells.labels[rows]
    return {
        "held_out_loss": F.cross_entropy(found, labels).item(),
        "held_out_accuracy": (found.argmax(1) == labels).float().mean().item(),
    }


class _Best:
    """The weights of the lowest held-out loss so far, and the k they were judged with."""

    def __init__(self) -> None:
        self.epoch, self.loss = 0, math.inf
        self.state: dict[str, Tensor] = {}
        self.k: int | None = None

    def see(self, network: nn.Module, epoch: int, loss: float) -> None:
        if loss < self.loss:
            self.epoch, self.loss = epoch, loss
            self.state = {name: value.clone() for name, value in network.state_dict().items()}
            self.k = network.k if isinstance(network, SparseAttnNet) else None

    def restore(self, network: nn.Module) -> None:
        network.load_state_dict(self.state)
        if isinstance(network, SparseAttnNet) and self.k is not None:
            network.k = self.k
        network.eval()


def _word_budget(network: nn.Module) -> WordBudget | None:
    if not isinstance(network, SparseAttnNet):
        return None
    c = network.config
    return WordBudget(network.ceiling, network.floor, c.k_tolerance, c.k_every, c.k_factor, c.k_smoothing)


def _adapt(budget: WordBudget | None, networks: list[nn.Module], loss: float) -> dict[str, Any]:
    """Let k follow the loss; returns what the epoch's row says of it."""
    if budget is None:
        return {}
    k = budget.observe(loss)
    for network in networks:
        assert isinstance(network, SparseAttnNet)
        network.k = k
    told = budget.trajectory[-1]
    return {"k": told["k"], "smoothed": told["smoothed"], "change": told["change"]}


def build_optimizer(network: nn.Module, config: FitConfig) -> torch.optim.AdamW:
    """Make AdamW over all parameters."""
    return torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def train_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, batch: Labelled,
    anchor: Sequence[tuple[Tensor, Tensor]] = (), mu: float = 0.0,
) -> float:  # fmt: skip
    """Take one step; returns the mean loss of the batch.

    Args:
        network: with ``forward(Labelled)`` -> [B].
        optimizer: of its parameters.
        batch: of one step.
        anchor: parameters and what FedProx's term pulls them back to.
        mu: weight of that term (Li et al. 2020, eq. 2).
    """
    loss = network(batch).mean()
    optimizer.zero_grad()
    loss.backward()
    for parameter, start in anchor:
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - start, alpha=mu)
    nn.utils.clip_grad_norm_(network.parameters(), CLIP)
    optimizer.step()
    return loss.item()


def set_rate(optimizer: torch.optim.Optimizer, config: FitConfig, step: int, steps: int) -> None:
    """Set the learning rate of a step: a linear rise, under a cosine that ends at 0 after ``steps``."""
    warm = min(1.0, (step + 1) / max(1.0, config.warmup * steps))
    for group in optimizer.param_groups:
        group["lr"] = config.lr * warm * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the average towards the network's weights; counters of a BatchNorm are copied."""
    for mine, new in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if mine.is_floating_point():
            mine.lerp_(new, 1 - decay)
        else:
            mine.copy_(new)
