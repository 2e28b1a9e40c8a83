"""What the trainer, the payload and the evaluation may know of a pretraining method."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sparsecontrast.errors import MethodError

Views = Literal["two", "shifted", "one"]
"""What a step shows a method of each image; see ``Method``."""

SHARED = ("backbone.", "saliency.")  # the only prefixes whose tensors may leave a site


@dataclass(frozen=True)
class Batch:
    """Two views of B images.

    Attributes:
        first: [B, 1, H, W], normalised.
        second: [B, 1, H, W]; the first again where the method asks for one view.
        patients: integer codes [B].
        generator: randomness of this step.
        step: 0-based step at this site in this round.
        shift: where the views lie to each other, in cells (down, across) [B, 2] long: cell (r, c) of the
            first shows what cell (r, c) + shift of the second shows (``transforms.shifted_views``);
            None where each view has a geometry of its own.
    """

    first: Tensor
    second: Tensor
    patients: Tensor
    generator: torch.Generator
    step: int
    shift: Tensor | None = None


@dataclass(frozen=True)
class Look:
    """What the method looks at: raw scores [B, cells], kept cells [B, m], the grid (rows, columns)."""

    scores: Tensor
    kept: Tensor
    grid: tuple[int, int]


class Choice(NamedTuple):
    """What is computed of each image: a backbone's second and third argument.

    Attributes:
        kept: cells in full detail [B, m], ascending; None for all.
        focus: weights of those cells in the second half of the embedding [B, m] (of all [B, cells] where
            all are kept), rows sum to 1; None for an embedding without it.
    """

    kept: Tensor | None
    focus: Tensor | None


class Shared(Protocol):
    """An ``nn.Module`` of which a part is trained together with others."""

    def shared_parameters(self) -> list[str]:
        """Names in ``state_dict()`` that may leave a site."""
        ...

    def reset_local(self) -> None:
        """Start the site's local parts anew from the shared ones: a site without a past."""
        ...


class Method(Shared, Protocol):
    """A pretraining method, an ``nn.Module``.

    ``per_sample`` is true only when row i's loss depends on row i alone; private training refuses
    a method whose ``per_sample`` is false. ``views`` says what a step shows it: ``two`` of each image, two
    that are ``shifted`` by whole cells of ``cell_size`` pixels, ``Batch.shift`` says how
    (``transforms.shifted_views``), or ``one`` in true grey values (``transforms.mae_view``).
    """

    per_sample: bool
    views: Views

    @property
    def cell_size(self) -> int:
        """Side of a cell in pixels."""
        ...

    @property
    def backbone(self) -> nn.Module:
        """The network that is pretrained; its tensors may leave a site."""
        ...

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of each row, [B]."""
        ...

    def start_round(self, round_number: int, rounds: int) -> None:
        """Set what the schedule says for round 1..rounds; the same at every site."""
        ...

    def after_step(self) -> None:
        """Update what follows the weights (an EMA teacher) after an optimizer step."""
        ...

    def metrics(self) -> dict[str, float]:
        """Scalars of the last step that may leave a site."""
        ...

    def encode(self, images: Tensor, keep: str | float = "dense") -> Tensor:
        """Embed images [B, 1, H, W] -> [B, D], deterministic, without gradient."""
        ...


def refuse_coupled(method: Method) -> None:
    """Refuse a method whose loss of a row depends on other rows.

    Raises:
        MethodError: says why.
    """
    if not method.per_sample:
        raise MethodError(
            f"{type(method).__name__} compares the images of a batch with each other: one patient then "
            "changes every row's gradient, no clipping of single patients bounds that, and the epsilon would "
            "be false; use method=patch_contrast or method=miram"
        )
