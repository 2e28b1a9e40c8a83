"""What a site keeps on disk from round to round of a run: two rounds back, so that one can be run again.

``round_0007.safetensors`` is the trainer's; ``residual_0007.safetensors``, where updates travel in 8 bits, is
what rounding left of that round's (``sparsecontrast.deltas``), and what was left over before it: that is owed
still where the round's reply was lost, refused or late, for the numbers that carried it never counted. It is
passed on from one file to the next, however many replies in a row are lost.
"""

from pathlib import Path
from typing import Any

import numpy as np

from client.log import note
from sparsecontrast.checkpoint import read_tensors, write_tensors
from sparsecontrast.errors import CheckpointError
from sparsecontrast.part_round import PartRound

STATES_KEPT = 2  # a round that is run again needs the state before it


class KeptRounds:
    """The local states of one run of one site.

    Args:
        folder: of the run.
        state_dir: of the site, where its log lies.
    """

    def __init__(self, folder: Path, state_dir: Path):
        self.folder, self.state_dir = folder, state_dir

    def restore(self, trainer: Any, number: int) -> int:
        """Load the newest whole state of a round before ``number``; returns that round, 0 for none."""
        for candidate in sorted((n for n in self._kept() if n < number), reverse=True):
            try:
                trainer.local.load(self._file("round", candidate))
                return candidate
            except CheckpointError as error:
                note(self.state_dir, f"{error}; trying an older local state")
        return 0

    def residual(self, number: int, counted: int | None = None) -> np.ndarray | None:
        """Return what is owed to the server after round ``number`` [n]; None for nothing.

        Args:
            number: the round whose state was restored.
            counted: the last round in which the server joined this site's reply, 0 for none. Where it is
                earlier than ``number``, the update of ``number`` is gone, as without rounding it would be,
                and so is what it left; what was left over before it is owed. None where it is not told.
        """
        file = self._file("residual", number)
        if not file.exists():
            return None
        try:
            kept = read_tensors(file)
            if counted is None or counted >= number:
                return kept["residual"].numpy()
            return kept["before"].numpy() if "before" in kept else None
        except (CheckpointError, KeyError) as error:  # a little of one update is lost, and no round
            note(self.state_dir, f"{error}; the next update starts from nothing left over")
            return None

    def part(self, restored: int) -> PartRound:
        """The file of the round at work, which started from the state of round ``restored``."""
        path = self.folder / "part.safetensors"
        return PartRound(path, f"from {restored}", say=lambda text: note(self.state_dir, text))

    def save(
        self, trainer: Any, number: int, residual: np.ndarray | None, before: np.ndarray | None = None
    ) -> None:
        """Write a round's files, the state last, and forget all but the newest two.

        Args:
            trainer: whose local state it is.
            number: the round.
            residual: [n], what rounding left of its update; None where nothing is fed back.
            before: [n], what was added to that update; None for nothing.
        """
        import torch

        if residual is not None:
            left = {"residual": residual} | ({} if before is None else {"before": before})
            arrays = {name: torch.from_numpy(array) for name, array in left.items()}
            write_tensors(self._file("residual", number), arrays)
        trainer.local.save(self._file("round", number))
        self.part(number).remove()
        for old in sorted(n for n in self._kept() if n <= number)[:-STATES_KEPT]:
            for kind in ("residual", "round"):
                self._file(kind, old).unlink(missing_ok=True)

    def _kept(self) -> list[int]:
        files = self.folder.glob("round_[0-9]*.safetensors")
        return [int(path.stem.removeprefix("round_")) for path in files]

    def _file(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}_{number:04d}.safetensors"
