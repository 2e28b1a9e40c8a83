"""The gradient of every row of a batch, by hooks: Opacus 1.6 ``grad_sample_mode="hooks"``, made to fit.

Opacus turns a module that owns a parameter and has no formula into one functorch layer, children and
all: a timm ViT, with its class token, becomes one. Here a layer has a formula (``models/rows.py``), or
its parameters are given to the model once per row, or the model is refused; nothing is guessed.

Inside ``RowGradients.backward`` the model runs on detached weights (``torch.func.functional_call``), so
that autograd does not compute the summed weight gradients, which nobody needs, a second time. Hooks sit
on outputs as tensors: Opacus' module hooks make views of them, which ``x += shortcut`` in a ResNet would
break. Rows are folded back to the batch where a layer sees several parts of an image (a CNN's windows).

Rows are large: a whole gradient for each image. What they are multiplied out into is kept from one batch
to the next (``_room``), because memory that is asked for anew at each step has to be mapped page by page.

That formulas, hooks and folding are right for a model is not believed but checked: ``verify`` compares
with autograd row by row, on noise, at the start of each round. A loss that couples rows fails there too.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsecontrast.errors import MethodError
from sparsecontrast.methods.method import Batch
from sparsecontrast.models.rows import FOLDED, INNER, ROW_PARAMETERS, SAMPLERS, Outer, Rows, per_row

TOLERANCE = 1e-2  # of a parameter's gradient: float32 along two ways
ROUNDING = 1e-6  # of the whole gradient: of a parameter whose own is nothing but rounding


class RowGradients(GradSampleHooks):
    """Attach to a module whose rows' losses are their own; ``backward`` fills ``parameter.grad_sample``.

    Args:
        module: a method; its names, its state and its results stay as they are.

    Raises:
        MethodError: it holds a BatchNorm, or a parameter that no formula covers.
    """

    GRAD_SAMPLERS = {**GradSampleHooks.GRAD_SAMPLERS, **SAMPLERS}

    def __init__(self, module: nn.Module):
        refuse_batch_norm(module)
        self._rows = 0
        self._room: dict[Tensor, Tensor] = {}
        super().__init__(module, loss_reduction="sum", strict=False)
        self._loose = [name for name, owner, key in _owned(module) if key in _loose_of(owner)]

    def add_hooks(self, **_: Any) -> None:
        """Hook every layer that has a formula; called once, by Opacus' own start."""
        handles = self.autograd_grad_sample_hooks = self._module.autograd_grad_sample_hooks = []  # type: ignore[assignment]
        for name, layer in self._module.named_modules():
            formula = self.GRAD_SAMPLERS.get(type(layer))
            keys = [key for key, p in layer.named_parameters(recurse=False) if p.requires_grad]
            if formula is None and set(keys) - set(_loose_of(layer)):
                raise MethodError(
                    f"{name or 'the method'}.{keys[0]}: no rule for per-sample gradients of "
                    f"{type(layer).__name__}; private training needs one in models/rows.py"
                )
            if formula is None:
                continue
            if type(layer) in INNER and keys:
                _refuse_drop_path(name, layer)
                inner: list[Tensor] = []
                child = getattr(layer, INNER[type(layer)])
                handles.append(child.register_forward_hook(lambda m, i, o, kept=inner: kept.append(o)))
                hook = partial(self._record, formula, inner)
            else:
                hook = partial(self._record, formula, None)
            handles.append(layer.register_forward_hook(hook))
        self.enable_hooks()

    def backward(self, batch: Batch, weights: Tensor | None = None, bf16: bool = False) -> None:
        """Fill ``grad_sample`` [B, ...] of every parameter that the loss reaches, float32 at least.

        Nothing else is computed: ``parameter.grad`` stays as it was. A second call adds to the rows that are
        there; after ``clear`` it writes over them.

        Args:
            batch: B rows.
            weights: of the rows' losses [B]; None for 1.
            bf16: compute the network in bfloat16; rows are summed in float32 all the same.

        Raises:
            MethodError: the loss is not one value a row.
        """
        self._rows = len(batch.first)
        try:
            leaves = self._leaves()
            with torch.autocast(batch.first.device.type, torch.bfloat16, enabled=bf16):
                loss = torch.func.functional_call(self._module, leaves, (batch,))
            if loss.shape != (self._rows,):
                raise MethodError(
                    f"loss of shape {list(loss.shape)}: expected one value for each of {self._rows}"
                )
            total = (loss if weights is None else loss * weights.to(loss.dtype)).sum()
            total.backward()
            for name, leaf in leaves.items():
                if leaf.requires_grad and leaf.grad is not None:
                    parameter = self._module.get_parameter(name)
                    self._add({parameter: leaf.grad.view(self._rows, *parameter.shape)})
        finally:
            self._rows = 0

    def verify(self, probe: Callable[[], Batch]) -> set[str]:
        """Check row by row against autograd, in float32; return the names of what the loss reaches.

        Args:
            probe: makes the same batch of noise each time, its generator in the same state.

        Raises:
            MethodError: a parameter's rows are not the gradients of the rows' losses.
        """
        named = [(n, p) for n, p in self._module.named_parameters() if p.requires_grad]
        self.clear()
        self.backward(probe())
        found = [p.grad_sample for _, p in named]  # type: ignore[attr-defined]
        self.clear()
        loss = self._module(probe())
        for row in range(len(loss)):
            wanted = torch.autograd.grad(
                loss[row], [p for _, p in named], retain_graph=True, allow_unused=True
            )
            size = torch.stack([w.norm() for w in wanted if w is not None]).norm()
            for (name, _), rows, want in zip(named, found, wanted, strict=True):
                _compare(name, None if rows is None else rows[row], want, size)
        return {name for (name, _), rows in zip(named, found, strict=True) if rows is not None}

    def clear(self) -> None:
        """Forget all rows."""
        self.set_grad_sample_to_none()

    def cleanup(self) -> None:
        """Take the hooks off and give back the memory."""
        super().cleanup()
        self._room.clear()

    def _leaves(self) -> dict[str, Tensor]:
        """Stand-ins of all trained parameters: detached, or one a row."""
        named = {n: p for n, p in self._module.named_parameters() if p.requires_grad}
        loose = set(self._loose)
        return {n: per_row(p, self._rows) if n in loose else p.detach() for n, p in named.items()}

    def _record(
        self,
        formula: Any,
        inner: list[Tensor] | None,
        layer: nn.Module,
        given: tuple[Any, ...],
        output: Tensor,
    ) -> None:
        """Hold a layer's input until the gradient of its output comes by."""
        source = inner.pop() if inner is not None else given[0]
        if not self._rows or not torch.is_grad_enabled():
            return
        if not output.requires_grad:  # the first layer: weights and images are without gradient
            output.requires_grad_()
        held = source.detach()
        output.register_hook(partial(self._collect, formula, layer, held, held._version))

    def _collect(self, formula: Any, layer: nn.Module, held: Tensor, version: int, gradient: Tensor) -> None:
        if held._version != version:
            raise MethodError(f"{type(layer).__name__}: its input was overwritten before its gradient came")
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            gradient, held = gradient.detach(), held.to(gradient.dtype)
            if type(layer) in FOLDED:
                held, gradient = (x.unflatten(0, (self._rows, -1)) for x in (held, gradient))
            self._add(formula(layer, [held], gradient))

    def _add(self, rows: Rows) -> None:
        """Sum the uses of a parameter: each view is one, and so is each part of an image."""
        for parameter, new in rows.items():
            held = parameter.grad_sample  # type: ignore[attr-defined]
            if isinstance(new, Outer):
                into = self._place(parameter, new.gradient) if held is None else held
                new.folded(self._rows).add_to(into, first=held is None)
            else:
                new = _folded(new.to(torch.promote_types(new.dtype, torch.float32)), self._rows)
                into = new if held is None else held.add_(new)
            parameter.grad_sample = into  # type: ignore[attr-defined]

    def _place(self, parameter: Tensor, like: Tensor) -> Tensor:
        """Memory for the rows of a parameter [B, ...]; it grows with the largest batch."""
        dtype, room = torch.promote_types(like.dtype, torch.float32), self._room.get(parameter)
        if room is None or len(room) < self._rows or (room.dtype, room.device) != (dtype, like.device):
            self._room.pop(parameter, None)  # both at once would not fit where one does
            room = self._room[parameter] = like.new_empty(self._rows, *parameter.shape, dtype=dtype)
        return room[: self._rows]


def refuse_batch_norm(module: nn.Module) -> None:
    """Refuse every kind of BatchNorm, frozen or not.

    Raises:
        MethodError: names the first one. In training its statistics mix the rows of a batch; frozen, they
            were computed from records outside of all accounting.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) or "BatchNorm" in type(layer).__name__:
            raise MethodError(
                f"{name}: {type(layer).__name__} mixes the patients of a batch (frozen, it holds statistics "
                "that were never charged); private training needs GroupNorm or LayerNorm in its place"
            )


def _refuse_drop_path(name: str, layer: nn.Module) -> None:
    if not isinstance(getattr(layer, "drop_path", nn.Identity()), nn.Identity):
        raise MethodError(f"{name}: stochastic depth has no rule for per-sample gradients; set it to 0")


def _owned(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Full name, owner and own name of every parameter."""
    for path, owner in module.named_modules():
        for key, _ in owner.named_parameters(recurse=False):
            yield f"{path}.{key}" if path else key, owner, key


def _loose_of(owner: nn.Module) -> tuple[str, ...]:
    return ROW_PARAMETERS.get(type(owner), ())


def _folded(rows: Tensor, count: int) -> Tensor:
    """Sum the parts of each image: [count * parts, ...] -> [count, ...]."""
    return rows if len(rows) == count else rows.unflatten(0, (count, -1)).sum(1)


def _compare(name: str, rows: Tensor | None, wanted: Tensor | None, size: Tensor) -> None:
    """Hold one row's gradient of one parameter to autograd's.

    Raises:
        MethodError: they differ by more than rounding.
    """
    nothing = torch.zeros(())
    difference = ((nothing if rows is None else rows) - (nothing if wanted is None else wanted)).norm()
    own = nothing if wanted is None else wanted.norm()
    if not difference <= TOLERANCE * own + ROUNDING * size:
        raise MethodError(
            f"{name}: its per-sample gradient is not that of the row's loss (off by {float(difference):.3g} "
            f"of {float(size):.3g}); either rows are coupled, or models/rows.py has no right rule for it"
        )
