"""SparseAttnNet on a lab's labelled pictures of cells, as a federation trains it: each lab is a site.

Pictures, folders and columns are the lab's own; the classes, which are the size of the network, and the size
of a picture are the run's. A lab's test groups are never trained on, and never leave it either.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsecontrast.config import hydra_tree
from sparsecontrast.errors import ConfigError, EmptySiteError
from sparsecontrast.federated import Learner, Place
from sparsecontrast.overrides import key_of
from sparsecontrast.runs import QUARANTINE
from sparsecontrast.settings import PrivacyConfig
from sparsecontrast.structure import build as build_dataclass

if TYPE_CHECKING:
    from sparsecontrast.classify.cells import Cells
    from sparsecontrast.classify.federation import CellsRun
    from sparsecontrast.classify.settings import CellsConfig

# A worker serves many labs and rounds of one run: the pictures are read once.
_pictures: dict[str, "Cells"] = {}


def at_site(heard: "CellsRun", told: Sequence[str]) -> "CellsRun":
    """Put the lab's pictures and privacy in place, and keep the run's classes.

    Raises:
        ConfigError: the lab's file sets the classes, or something impossible.
    """
    from sparsecontrast.classify.federation import check_cells

    config = dataclasses.replace(
        heard,
        cells=dataclasses.replace(own_cells(told), classes=heard.cells.classes),
        privacy=build_dataclass(PrivacyConfig, hydra_tree(list(told))["privacy"], "privacy."),
    )
    check_cells(config)
    return config


def own_cells(told: Sequence[str]) -> "CellsConfig":
    """Read what a site's file says of its pictures.

    Raises:
        ConfigError: an unknown key or value, or one that sets the classes.
    """
    from sparsecontrast.classify.settings import CellsConfig

    if "cells.classes" in map(key_of, told):
        raise ConfigError(
            "cells.classes: of the run, not of a site; take it out of the site's file. Pictures of other "
            "classes are left out by themselves"
        )

    return build_dataclass(CellsConfig, hydra_tree(list(told))["cells"], "cells.")


def refuse_uncut(config: "CellsRun") -> None:
    """Refuse nothing: labs are what they are."""


def site_names(config: "CellsRun") -> list[str]:
    """Names of the labs that train, sorted."""
    from sparsecontrast.classify.cells import lab_names

    return lab_names(config.cells)


def build(config: "CellsRun", pretrained: bool = True) -> Any:
    """Build the network; nothing of it is ever pretrained.

    Raises:
        PrivacyError: the run, or the site, asks for privacy.
    """
    from sparsecontrast.classify.lab import build_network

    return build_network(config)


def learner(module: Any, config: "CellsRun", place: Place) -> Learner:
    """Load the lab's pictures that may be trained on, and build its trainer.

    Raises:
        EmptySiteError: none of the run's classes.
        DataError: the pictures cannot be read as configured.
    """
    from sparsecontrast.classify.lab import LabTrainer

    own = training_set(config, place)
    return Learner(LabTrainer(module, config, place.name, own.labels), own.images, own.labels)


def training_set(config: "CellsRun", place: Place) -> "Cells":
    """Return the lab's pictures without its test groups.

    Raises:
        EmptySiteError: there is none.
    """
    from sparsecontrast.classify.cells import training_rows

    cells = _loaded(config, place)
    rows = training_rows(cells, config.cells, config.seed)
    if place.simulated:
        rows = rows[[lab == place.name for lab in cells.labs[rows.numpy()]]]
    if not len(rows):
        raise EmptySiteError(
            f"lab {place.name}: no picture to train on of the classes {', '.join(config.classes)}; see "
            f"{QUARANTINE}, cells.*_labs and cells.test_fraction"
        )
    return cells.select(rows)


def _loaded(config: "CellsRun", place: Place) -> "Cells":
    """Read the pictures, or take them from memory; what is left out is counted and listed at the site."""
    from sparsecontrast.classify.cells import load_cells
    from sparsecontrast.data.csv_files import write_table

    key = repr((config.cells, config.train.image_size, str(place.key_dir)))
    if key not in _pictures:
        cells = load_cells(config.cells, config.train.image_size, classes=config.classes)
        write_table(cells.left_out, place.key_dir / QUARANTINE)
        for reason, count in cells.left_out["reason"].value_counts().items():
            place.say(f"{count} picture(s) left out: {reason}")
        _pictures.clear()
        _pictures[key] = cells
    return _pictures[key]
