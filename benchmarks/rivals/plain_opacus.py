"""Opacus 1.6 as it is documented, around a raw timm network: the private step that needs nothing of ours.

A timm ViT keeps its class token and its positions on its root. Opacus has no formula for such a module
and makes one functorch layer of it and all its children: each row's gradient is computed by running the
whole network again under ``vmap``. Three ways:

- ``hooks``: the default, ``GradSampleModule``;
- ``ghost``: ``GradSampleModuleFastGradientClipping``, two backward passes; what has a formula for its norm
  is clipped without per-sample gradients, which leaves out the functorch layer;
- ``frozen``: hooks, with class token and positions not trained. Then every layer is hooked by itself. It is
  what a user can do in one line, and it trains less.

Noise is torch's Mersenne Twister in float32, one draw a number: cheaper than a cryptographic stream, and
foreseeable. Rows are clipped, so an image is the unit of privacy. No ledger is asked.
"""

from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

from sparsecontrast.methods.method import Batch

WAYS = ("hooks", "ghost", "frozen")
Loss = Callable[[Batch], Tensor]


def freeze_tokens(vit: nn.Module) -> None:
    """Exclude from training what lies on the root of a timm ViT."""
    for _, parameter in vit.named_parameters(recurse=False):
        parameter.requires_grad_(False)


def opacus_step(
    way: str, module: nn.Module, optimizer: torch.optim.Optimizer, images: int, clip: float, sigma: float
) -> tuple[Callable[[Callable[[Loss], Tensor]], None], DPOptimizer]:
    """Make a private step of a module that gives the loss of each row.

    Args:
        way: one of ``WAYS``.
        module: in training; its parameters are those of ``optimizer``.
        optimizer: without privacy.
        images: rows of a batch.
        clip: norm to which rows are clipped.
        sigma: deviation of the noise over ``clip``.

    Returns:
        The step, which is given how to get the losses [B] from the wrapped module; and the optimizer.
    """
    told: dict[str, Any] = {"noise_multiplier": sigma, "max_grad_norm": clip, "expected_batch_size": images}
    if way != "ghost":
        hooked = GradSampleModule(module, loss_reduction="mean")
        private = DPOptimizer(optimizer, **told)

        def step(losses: Callable[[Loss], Tensor]) -> None:
            private.zero_grad(set_to_none=True)
            losses(hooked).mean().backward()
            private.step()

        return step, private
    fast = GradSampleModuleFastGradientClipping(module, loss_reduction="mean", max_grad_norm=clip)  # type: ignore[arg-type]
    ghost = DPOptimizerFastGradientClipping(optimizer, **told)

    def ghost_step(losses: Callable[[Loss], Tensor]) -> None:
        ghost.zero_grad(set_to_none=True)
        DPTensorFastGradientClipping(fast, ghost, losses(fast), "mean").backward()  # type: ignore[arg-type]
        ghost.step()

    return ghost_step, ghost
