"""Does a row's loss depend on other rows? The question behind ``Method.per_sample``, answered by autograd.

Clipping bounds what one record can change only if the record enters one summand. ``coupling`` measures
max |dL_j / dx_i| over i != j: exactly 0 where rows are independent, whatever the weights; any other
value refutes the claim. In-batch negatives, BatchNorm in training, queues and batch quantiles all show.

No batch can prove independence, but a structural zero is a strong sign: no path of the graph leads from
x_i to L_j, and rounding makes no zeros.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsecontrast.methods.method import Batch


def coupling(method: Callable[[Batch], Tensor], batch: Batch) -> float:
    """Return max over i != j of |dL_j / dx_i| over the pixels of both views, >= 0.

    Rows of one patient count as well: privacy regroups them after the fact.

    Args:
        method: its module, in the mode in which it trains.
        batch: B >= 2 rows, near-duplicates among them if there is a choice: on random rows a coupling
            can be small.
    """
    views = [view.detach().clone().requires_grad_() for view in (batch.first, batch.second)]
    loss = method(dataclasses.replace(batch, first=views[0], second=views[1]))
    largest = 0.0
    for row in range(len(loss)):
        found = torch.autograd.grad(loss[row], views, retain_graph=True, allow_unused=True)
        for gradient in found:
            if gradient is not None:
                others = torch.arange(len(loss), device=gradient.device) != row
                largest = max(largest, float(gradient[others].abs().max()))
    return largest


def noise_batch(method: Any, rows: int = 2, seed: int = 0) -> Batch:
    """Make a batch of noise of the method's size: what a model is checked on before it sees a patient.

    The views are unrelated, which no gradient minds, and lie as far apart as views may.
    """
    generator = torch.Generator().manual_seed(seed)
    size = method.backbone.img_size
    like = next(method.parameters())
    device = like.device
    first, second = torch.randn(2, rows, 1, size, size, generator=generator).to(like)
    shift = torch.tensor([[1, -1], [-1, 0], [0, 1]])[torch.arange(rows) % 3].to(device)
    return Batch(first, second, torch.arange(rows, device=device), generator, 0, shift)
