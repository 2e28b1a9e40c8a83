"""``init=``: a federation, or a pretraining, that starts from the weights of an earlier run.

Unlike ``backbone.pretrained``, which reads a timm network, this takes all that a run releases: the
backbone and the scorer. It is read once, where the run starts; sites get the weights from the server.

Where one of the two methods has no scorer (MIRAM), the backbone is all that they have in common: features
that were learnt by filling in can go on to learn by contrast, with a scorer that starts anew.
"""

from pathlib import Path

from torch import Tensor, nn

from sparsecontrast.checkpoint import latest, read_round, read_tensors
from sparsecontrast.config import anchored
from sparsecontrast.errors import BackboneMismatchError, CheckpointError, MissingDataError
from sparsecontrast.federated import RunConfig
from sparsecontrast.methods.method import Shared

SCORER = "saliency."


def load_start(method: Shared, config: RunConfig) -> None:
    """Load what ``init`` names into a method; nothing where it is null.

    Raises:
        MissingDataError: no such file or folder.
        CheckpointError: the folder holds no whole round, or the file is torn.
        BackboneMismatchError: the weights are of another backbone or another selection.
    """
    if config.init is None:
        return
    path = anchored(config.init)
    found = _read(path)
    assert isinstance(method, nn.Module), "a method is a module"
    state, names = method.state_dict(), method.shared_parameters()
    if not all(any(n.startswith(SCORER) for n in side) for side in (found, names)):
        found = {n: t for n, t in found.items() if not n.startswith(SCORER)}
        names = [n for n in names if not n.startswith(SCORER)]
    odd = sorted({*found} ^ {*names}) + [n for n in names if n in found and found[n].shape != state[n].shape]
    if odd:
        raise BackboneMismatchError(
            f"init={path}: {len(odd)} tensors are not this run's (first: {odd[0]}); start from a run with "
            "the same backbone and selection"
        )
    method.load_state_dict(found, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    """Read the newest whole round of a run folder, or one round's file."""
    if path.is_file():
        return read_tensors(path)
    if not path.is_dir():
        raise MissingDataError(f"init={path}: no such run folder, nor a file of weights")
    number = latest(path)
    if number is None:
        raise CheckpointError(f"init={path}: no whole round there; give the output_dir of a run")
    return read_round(path, number).tensors
