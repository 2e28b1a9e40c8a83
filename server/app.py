"""The ServerApp: compose, open the run folder, greet the sites, run the rounds."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.log import fail, say

if TYPE_CHECKING:
    from sparsecontrast.federated import RunConfig

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation from the one key of its run config, ``overrides``.

    Raises:
        SparseContrastError: why the run failed; Flower then marks it ``finished:failed``.
    """
    from sparsecontrast.config import split_overrides
    from sparsecontrast.errors import SparseContrastError

    try:
        run(grid, split_overrides(str(context.run_config.get("overrides", ""))))
    except SparseContrastError as error:
        fail(f"{error.code}: {error}")
        raise


def run(grid: Grid, words: list[str]) -> None:
    """Run or continue a federation.

    Args:
        grid: Flower's.
        words: Hydra overrides.

    Raises:
        ConfigError: an impossible configuration.
        FederationError: too few sites, or too few valid replies in a round.
        StorageError: the run folder cannot be written, or holds nothing to continue.
    """
    from server.folder import alone, resolve
    from server.strategy import Aggregator
    from sparsecontrast.federated import kind_of
    from sparsecontrast.start import load_start

    config, words = resolve(words)
    kind = kind_of(config)
    kind.refuse_uncut(config)
    Aggregator(config.federation)  # its complaints come before anyone is asked to wait
    method = kind.build(config, pretrained=config.resume is None)  # a continued run has its own weights
    if config.resume is None:
        load_start(method, config)
    with alone(Path(config.output_dir)):
        _serve(grid, config, words, method)


def _serve(grid: Grid, config: "RunConfig", words: list[str], method: Any) -> None:
    from server.folder import open_folder
    from server.roll import Roll
    from server.rounds import Rounds, initial_weights
    from sparsecontrast import checkpoint, payload
    from sparsecontrast.errors import BackboneMismatchError
    from sparsecontrast.overrides import join
    from sparsecontrast.tensorboard import write_tensorboard

    names = sorted(method.shared_parameters())
    weights, strategy = initial_weights(method, names), {}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    folder = open_folder(config, words)
    if config.tensorboard:
        write_tensorboard(folder.path)  # empty, but it says now if TensorBoard is missing
    if folder.done is not None:
        last = checkpoint.read_round(folder.path, folder.done)
        if {n: tuple(t.shape) for n, t in last.tensors.items()} != shapes:
            raise BackboneMismatchError(f"{folder.path}: round {last.number} is of another backbone")
        weights, strategy = last.tensors, last.strategy
        say(f"continuing {folder.path} after round {last.number}")
    text = join(words)
    roll = Roll(grid, config.federation, payload.fingerprint(shapes), text)
    roll.open()
    Rounds(grid, roll, folder, text, weights, strategy).run()
    say(f"done: {folder.path}")
