"""A local round that goes on where a killed process left it.

Every few minutes one file takes all that the rest of the round follows from: tensors, the optimizer's
moments, the generator, the steps done and what they told. Asked for the same round again (the same weights
from the server, batches and settings), training goes on behind those steps and ends with the same bits as if
nothing had happened. The file of anything else is left alone, and the end of the round removes it.

A private round keeps none: what Poisson sampling drew and noise hid must not lie on a disk, and steps that
are taken again are charged again (``private_trainer.py``).
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sparsecontrast.checkpoint import read_tensors, write_tensors
from sparsecontrast.errors import CheckpointError, StorageError
from sparsecontrast.local_state import LocalState

EVERY_SECONDS = 300.0
Told = dict[str, list[float]]


class PartRound:
    """The file of a round that is not over.

    Args:
        path: of the file.
        words: of the caller, that a continued round must share: which local state it started from.
        every: seconds between two writings.
        say: told in words what could not be used.
    """

    def __init__(
        self, path: Path, words: str = "", every: float = EVERY_SECONDS,
        say: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self.path, self.words, self.every, self.say = path, words, every, say
        self._identity = b""
        self._written = time.monotonic()

    def restore(self, identity: str, local: LocalState, generator: torch.Generator) -> Told:
        """Continue, if the file is of this round; call it when batches are drawn and weights are loaded.

        Args:
            identity: of everything else that decides the round's result (``identity_of``).
            local: with the method and the optimizer; filled.
            generator: of the round; set.

        Returns:
            What the steps that are done told, by name; empty for none.
        """
        self._identity = hashlib.sha256(f"{identity}\n{self.words}".encode()).digest()
        if not self.path.exists():
            return {}
        try:
            saved = read_tensors(self.path)
            if saved["identity"].numpy().tobytes() != self._identity:
                return {}
            local.restore(saved)
            shared = {n.removeprefix("shared."): t for n, t in saved.items() if n.startswith("shared.")}
            _module(local).load_state_dict(shared, strict=False)
            generator.set_state(saved["generator"])
            return {n.removeprefix("told."): t.tolist() for n, t in saved.items() if n.startswith("told.")}
        except (CheckpointError, KeyError) as error:
            self.say(f"{error}; the round starts anew")
            return {}

    def keep(self, told: Told, local: LocalState, generator: torch.Generator) -> None:
        """Write the file if it is time: after a step, with what all steps so far told.

        A disk that is full costs the file, and the round goes on.
        """
        if time.monotonic() - self._written < self.every:
            return
        try:
            write_tensors(self.path, self._tensors(told, local, generator))
        except StorageError as error:
            self.say(f"{error}; if this round is killed, it starts anew")
        self._written = time.monotonic()

    def _tensors(self, told: Told, local: LocalState, generator: torch.Generator) -> dict[str, Tensor]:
        state, shared = _module(local).state_dict(), local.method.shared_parameters()
        return {
            **local.tensors(),
            **{f"shared.{name}": state[name].detach().cpu() for name in shared},
            **{f"told.{key}": torch.tensor(values, dtype=torch.float64) for key, values in told.items()},
            "generator": generator.get_state(),
            "identity": torch.from_numpy(np.frombuffer(self._identity, np.uint8).copy()),
        }

    def remove(self) -> None:
        """Forget it: the round is over, and its result is kept elsewhere."""
        self.path.unlink(missing_ok=True)


def identity_of(
    words: Sequence[object], batches: Sequence[Sequence[np.ndarray]], weights: Mapping[str, Tensor]
) -> str:
    """Digest of what decides a round's result: settings, rows of each batch, weights it starts from."""
    digest = hashlib.sha256(repr(tuple(words)).encode())
    for arrays in batches:
        for array in arrays:
            digest.update(np.ascontiguousarray(array, np.int64).tobytes() + b"\n")
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _module(local: LocalState) -> nn.Module:
    return local.method  # type: ignore[return-value]
