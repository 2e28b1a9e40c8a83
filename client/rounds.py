"""What a site keeps on disk from round to round of a run: two rounds back, so that one can be run again.

``round_0007.safetensors`` is the trainer's; ``residual_0007.safetensors``, where updates travel in 8 bits, is
what rounding left of that round's (``sparsecontrast.deltas``).
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

    def residual(self, number: int) -> np.ndarray | None:
        """Return what rounding left of round ``number``'s update [n]; None where nothing was kept."""
        file = self._file("residual", number)
        if not file.exists():
            return None
        try:
            return read_tensors(file)["residual"].numpy()
        except (CheckpointError, KeyError) as error:  # a little of one update is lost, and no round
            note(self.state_dir, f"{error}; the next update starts from nothing left over")
            return None

    def part(self, restored: int) -> PartRound:
        """The file of the round at work, which started from the state of round ``restored``."""
        path = self.folder / "part.safetensors"
        return PartRound(path, f"from {restored}", say=lambda text: note(self.state_dir, text))

    def save(self, trainer: Any, number: int, residual: np.ndarray | None) -> None:
        """Write a round's files, the state last, and forget all but the newest two."""
        import torch

        if residual is not None:
            write_tensors(self._file("residual", number), {"residual": torch.from_numpy(residual)})
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
