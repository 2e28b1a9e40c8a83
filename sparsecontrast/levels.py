"""How an image is cut into cells: plain numbers, for the configuration and the backbone alike."""

STRIDE = 32  # pixels of the image in one of a CNN's last feature map, for every network here
LARGEST = 8  # cells of a side of the highest level, where it can be cut so far


def stack_grids(grid: tuple[int, int], cell: int) -> tuple[tuple[int, int], ...]:
    """Stack levels on a grid of patches until a side has at most ``LARGEST`` cells, or cannot be cut.

    Args:
        grid: (rows, columns) of patches, multiples of ``cell``.
        cell: side of a cell in cells of the level below.

    Returns:
        (rows, columns) of each level, patches first; always one level of cells.
    """
    grids = [grid, (grid[0] // cell, grid[1] // cell)]
    while cell > 1 and max(grids[-1]) > LARGEST and all(n % cell == 0 for n in grids[-1]):
        grids.append((grids[-1][0] // cell, grids[-1][1] // cell))
    return tuple(grids)
