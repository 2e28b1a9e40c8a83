"""A trained classifier and the folder of its run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecontrast.classify.settings import ClassifyConfig
from sparsecontrast.methods.sparse_attn_net import SparseAttnNet

if TYPE_CHECKING:
    from sparsecontrast.classify.federation import CellsRun


@dataclass(frozen=True)
class Trained:
    """A run folder, read back.

    Attributes:
        folder: absolute.
        config: of the run, or what comes nearest to it of a federated one.
        network: in evaluation mode.
        facts: ``model.json``, or what stands for it.
        rows: of ``metrics.jsonl``: one an epoch, or in a federation one a round and lab, and one a round.
        federated: the federated run; None for a training on one machine.
    """

    folder: Path
    config: ClassifyConfig
    network: SparseAttnNet
    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    federated: "CellsRun | None" = None
