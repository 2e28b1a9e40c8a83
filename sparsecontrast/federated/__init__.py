"""What a federation trains: the one seam between the apps, which move weights, and what makes them.

The apps ask for a module with ``shared_parameters()``, for what a site has to train on, and for a learner
of rounds. Payload, verification, guard, log, strategies, checkpoints and resume know nothing else of it, so
they hold for every kind alike. A kind is a module of this package, found by the type of the configuration:

    images      self-supervised methods on a hospital's images
    cells       SparseAttnNet on a lab's labelled pictures of cells
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from sparsecontrast.config import compose_tree, hydra_tree, split_overrides
from sparsecontrast.settings import Config

if TYPE_CHECKING:
    from sparsecontrast.classify.federation import CellsRun
    from sparsecontrast.part_round import PartRound
    from sparsecontrast.trainer import TrainResult

RunConfig: TypeAlias = "Config | CellsRun"


@dataclass(frozen=True)
class Place:
    """Where a site trains.

    Attributes:
        name: of the site.
        simulated: whether the data hold other sites too.
        state_dir: its durable files.
        key_dir: where the key of its patients' pseudonyms lies.
        run_key: of the run.
        say: writes a line into the site's own log.
    """

    name: str
    simulated: bool
    state_dir: Path
    key_dir: Path
    run_key: str
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Learner:
    """A site's trainer and what it trains on.

    Attributes:
        trainer: with ``run`` and ``local``, such as ``trainer.LocalTrainer``.
        images: uint8, one row an image.
        codes: one integer an image: its patient, or its class.
    """

    trainer: Any
    images: Any
    codes: Any

    def run(self, number: int, rounds: int, mu: float, part: "PartRound | None") -> "TrainResult":
        """Train round ``number``; see ``LocalTrainer.run``."""
        return self.trainer.run(self.images, self.codes, number, rounds, mu, part)


class Kind(Protocol):
    """What a module of this package does; ``config`` is of its own type."""

    def at_site(self, heard: Any, told: Sequence[str]) -> Any:
        """Put what the site's file says of data and privacy in place of what the server's words gave."""
        ...

    def refuse_uncut(self, config: Any) -> None:
        """Refuse a run whose sites are not there yet."""
        ...

    def site_names(self, config: Any) -> list[str]:
        """Names of the sites in simulated data, sorted."""
        ...

    def build(self, config: Any, pretrained: bool = True) -> Any:
        """Build the module, the same bits from the same seed."""
        ...

    def learner(self, module: Any, config: Any, place: Place) -> Learner:
        """Load what the site trains on, and build its trainer around the module, which holds its weights."""
        ...


def kind_of(config: RunConfig) -> Kind:
    """Find the kind of a run."""
    name = "images" if isinstance(config, Config) else "cells"
    return importlib.import_module(f"sparsecontrast.federated.{name}")  # type: ignore[return-value]


def compose_run(overrides: Sequence[str] | str = ()) -> RunConfig:
    """Compose a federated run of any kind; as ``config.compose`` otherwise.

    Raises:
        ConfigError: an unknown group, key or value, or a relation that does not hold.
    """
    words = split_overrides(overrides) if isinstance(overrides, str) else list(overrides)
    tree = hydra_tree(words)
    if (tree.get("method") or {}).get("name") == "sparse_attn_net":
        from sparsecontrast.classify.federation import compose_cells

        return compose_cells(tree, words)
    return compose_tree(tree, words)
