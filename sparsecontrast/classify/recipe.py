"""How ``classify train`` trains: k is chosen on held-out cells, then all cells that are not tested are used.

Two passes, each from new weights of the same seed:

    search    on ``split.train``; k follows the loss on ``split.val``; the k of the lowest loss is kept
    refit     on both parts, with that k, for all epochs; its last averaged weights are the result

A network without a k to choose has nothing to search, and is trained by the second pass alone. The split's
test cells are in neither.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsecontrast.classify.cells import Cells, Split
from sparsecontrast.classify.fit import Fitted, fit, refit
from sparsecontrast.classify.settings import FitConfig
from sparsecontrast.methods.sparse_attn_net import SparseAttnNet

Network = TypeVar("Network", bound=nn.Module)


def train_classifier(
    make: Callable[[Tensor], Network], cells: Cells, split: Split, config: FitConfig, seed: int,
    tick: Callable[[str], None] = lambda text: None,
) -> tuple[Network, Fitted]:  # fmt: skip
    """Train a new network; returns it in evaluation mode, and one row an epoch that names its ``pass``.

    Args:
        make: builds the network for the rows that it will train on; the same weights at each call.
        cells: all pictures.
        split: rows to train on, to hold out, and to test; the last are not looked at.
        config: of training; without ``refit`` the search is all, and its best weights are the result.
        seed: of batches, augmentation and exploration.
        tick: called once an epoch, with its figures in words.

    Raises:
        MethodError: a loss is no longer finite.
    """
    network = make(split.train)
    if not config.refit:
        done = fit(network, cells, split, config, seed, tick)
        return network, replace(done, rows=_named("search", done))
    everything = torch.cat([split.train, split.val]).sort().values
    final, rows, seconds = make(everything), [], 0.0
    if isinstance(network, SparseAttnNet) and network.floor < network.ceiling:
        found = fit(network, cells, split, config, seed, tick)
        rows, seconds = _named("search", found), found.seconds
        assert isinstance(final, SparseAttnNet)
        final.k = network.k
    done = refit(final, cells, everything, config, seed, tick)
    return final, Fitted(done.epoch, rows + _named("refit", done), seconds + done.seconds)


def _named(name: str, done: Fitted) -> list[dict[str, Any]]:
    return [{"pass": name, **row} for row in done.rows]
