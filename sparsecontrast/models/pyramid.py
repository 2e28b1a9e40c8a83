"""Which token stands for which part of an image: patches, cells, cells of cells, and so on.

Level 0 are the patches; a cell of level l is ``cell x cell`` cells of level l - 1. Where a cell of
level 1 is kept, its patches are tokens. Every other part of the image is one token of the highest
level at which it is not *opened*: opened are the cells above a kept one, and beside them the ones
nearest to many, until each level has opened as many as there are kept cells (or all it has). So the
number of tokens depends on the number m of kept cells alone, whatever they are: shapes are static,
and every patch is covered exactly once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecontrast.errors import MethodError
from sparsecontrast.levels import stack_grids
from sparsecontrast.models import tokens


class Pyramid(nn.Module):
    """The levels of one image size. It has nothing to learn; as a module it moves its tables to the device.

    Args:
        grids: (rows, columns) of each level, patches first.
        cell: side of a cell in cells of the level below.
    """

    def __init__(self, grids: tuple[tuple[int, int], ...], cell: int):
        super().__init__()
        self.grids = grids
        self.cell = cell
        for level, finer in enumerate(grids[:-1]):
            # made once: in a forward pass a GPU would wait for the copy, at every level
            self.register_buffer(f"inside_{level}", tokens.cell_positions(finer, cell), persistent=False)

    def inside(self, level: int) -> Tensor:
        """Cells of ``level`` (0: patches) inside each cell of the level above: [cells above, cell^2]."""
        return getattr(self, f"inside_{level}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Cells of each level, patches first."""
        return tuple(rows * columns for rows, columns in self.grids)

    def opened_counts(self, m: int) -> tuple[int, ...]:
        """Opened cells of levels 1 and up where ``m`` cells of level 1 are kept."""
        return tuple(min(m, size) for size in self.sizes[1:])

    def token_counts(self, m: int) -> tuple[int, ...]:
        """Tokens of each level, patches first."""
        opened = self.opened_counts(m)
        present = [self.cell**2 * n for n in opened] + [self.sizes[-1]]
        return (present[0], *(p - o for p, o in zip(present[1:], opened, strict=True)))

    def kept_cells(self, keep: float) -> int:
        """Return m >= 1, the cells of level 1 to keep: the tokens are nearest to ``keep`` of the patches.

        Raises:
            MethodError: ``keep`` lies outside of what there can be.
        """
        smallest = self.sizes[-1] / self.sizes[0]
        if not smallest - 1e-9 <= keep <= 1:
            raise MethodError(
                f"keep={keep}: must be in [{smallest:g}, 1]: the whole image takes at least "
                f"{self.sizes[-1]} tokens of {self.sizes[0]}"
            )
        wanted = keep * self.sizes[0]
        return min(range(1, self.sizes[1] + 1), key=lambda m: abs(sum(self.token_counts(m)) - wanted))

    def coarse(self, kept: Tensor) -> list[Tensor]:
        """Cells that are tokens, of levels 1 and up, for kept cells [B, m]: [B, K_l] each, ascending."""
        opened = [kept]
        for level, count in enumerate(self.opened_counts(kept.shape[1])[1:], start=2):
            opened.append(self._parents(opened[-1], level, count))
        found = []
        for level, own in enumerate(opened, start=1):
            above = opened[level] if level < len(opened) else None
            found.append(tokens.complement(own, self.sizes[level], self._children(above, level)))
        return found

    def areas(self, m: int, device: torch.device) -> Tensor:
        """Patches that each token stands for, [tokens]: patches first, then level by level."""
        counts = enumerate(self.token_counts(m))
        # pieces of known length: a length that is read from a tensor can be neither compiled nor exported
        return torch.cat(
            [torch.full((n,), self.cell ** (2 * level), device=device) for level, n in counts]
        ).float()

    def _parents(self, cells: Tensor, level: int, count: int) -> Tensor:
        """``count`` cells of ``level``: those above ``cells`` of the level below, then those nearest."""
        rows, columns = self.grids[level]
        below = self.grids[level - 1][1]
        above = cells // below // self.cell * columns + cells % below // self.cell
        hits = torch.zeros(cells.shape[0], rows * columns, device=cells.device)
        hits = hits.scatter_add(1, above, torch.ones_like(above, dtype=hits.dtype))
        near = F.avg_pool2d(hits.unflatten(1, (rows, columns))[:, None], 3, stride=1, padding=1)
        return tokens.top_k(near.flatten(1) + 1e6 * (hits > 0), count)

    def _children(self, cells: Tensor | None, level: int) -> Tensor | None:
        """Cells of ``level`` inside opened ``cells`` of the level above; None for the highest level's all."""
        return None if cells is None else self.inside(level)[cells].flatten(1)


def build_pyramid(grid: tuple[int, int], cell: int) -> Pyramid:
    """Stack the levels of a grid of patches; ``grid`` is a multiple of ``cell``."""
    return Pyramid(stack_grids(grid, cell), cell)
