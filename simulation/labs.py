"""A simulated federation of labs: who has how many pictures, and how the classifier does in the end."""

from pathlib import Path
from typing import TYPE_CHECKING

from sparsecontrast.errors import ConfigError
from sparsecontrast.terminal import print_table

if TYPE_CHECKING:
    from sparsecontrast.classify.federation import CellsRun


def prepare(config: "CellsRun", words: list[str], folder: Path) -> list[str]:
    """Look at the pictures before anyone trains on them; returns the overrides as they are.

    Raises:
        ConfigError: fewer labs than ``federation.sites``, or an old run in the folder.
        DataError: the pictures cannot be read as configured.
    """
    from server.folder import refuse_old_rounds
    from sparsecontrast.classify.cells import lab_names, load_cells, split_cells

    refuse_old_rounds(config)
    labs, wanted = lab_names(config.cells), config.federation.sites
    if len(labs) < wanted:
        raise ConfigError(
            f"federation.sites={wanted}, but there are {len(labs)} lab(s): {', '.join(labs)}; set "
            f"federation.sites={len(labs)}"
        )
    cells = load_cells(config.cells, config.train.image_size, config.classes)
    split = split_cells(cells, config.cells, config.seed)
    trained = [*split.train.tolist(), *split.val.tolist()]
    rows = []
    for lab in sorted(set(cells.labs)):
        own = [int(cells.labels[row]) for row in trained if cells.labs[row] == lab]
        held = sum(cells.labs[row] == lab for row in split.test.tolist())
        rows.append([lab, *(str(own.count(i)) for i in range(len(config.classes))), str(held)])
    print_table(["lab", *config.classes, "held out"], rows)
    if len(labs) > wanted:
        print(f"federation.sites={wanted}: not used: {', '.join(labs[wanted:])}", flush=True)
    return words


def evaluate(folder: Path) -> None:
    """Train what stands beside the global classifier, judge all, and write the report."""
    from sparsecontrast.classify.commands import judge_run
    from sparsecontrast.classify.federated_run import read_federated, train_local_only

    train_local_only(read_federated(folder))
    judge_run(folder)
