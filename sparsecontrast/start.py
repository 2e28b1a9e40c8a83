"""``init=``: a federation, or a pretraining, that starts from the weights of an earlier run.

Unlike ``backbone.pretrained``, which reads a timm network, this takes all that a run releases: the
backbone and the scorer. It is read once, where the run starts; sites get the weights from the server.
"""

from pathlib import Path

from torch import Tensor, nn

from sparsecontrast.checkpoint import latest, read_round, read_tensors
from sparsecontrast.config import anchored
from sparsecontrast.errors import BackboneMismatchError, CheckpointError, MissingDataError
from sparsecontrast.methods.method import Method
from sparsecontrast.settings import Config


def load_start(method: Method, config: Config) -> None:
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
