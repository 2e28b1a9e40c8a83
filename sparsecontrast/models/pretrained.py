"""Pretrained weights of a timm model: from the hub or a local file, fitted to grey images."""

from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsecontrast.errors import MissingDataError, ModelError
from sparsecontrast.settings import BackboneConfig


def pretrained_state(config: BackboneConfig) -> dict[str, Tensor]:
    """Read the weights that ``backbone.pretrained`` names: true for timm's hub, else a safetensors file.

    Raises:
        MissingDataError: the file is not there, or the weights cannot be fetched.
        ModelError: the file is torn, or timm has no weights of that name.
    """
    if config.pretrained is True:
        return _hub_state(config.name)
    path = Path(str(config.pretrained))
    if not path.is_file():
        raise MissingDataError(
            f"backbone.pretrained={path}: no such file; give a safetensors file of {config.name}, or true"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"backbone.pretrained={path}: not a whole safetensors file: {error}") from error


def sum_over_rgb(state: dict[str, Tensor], stem: str) -> dict[str, Tensor]:
    """Return ``state`` with the first convolution's weight [D, C, p, p] on one channel.

    The sum, not the mean: a grey image fed to all channels gives the same features.
    """
    return {**state, stem: state[stem].sum(1, keepdim=True)}


def load_fitting(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the model's own names from ``state``; others, such as a classifier's, are left aside.

    Raises:
        ModelError: a tensor is missing or of another shape.
    """
    wanted = model.state_dict()
    state = {k: v for k, v in state.items() if k in wanted}
    missing = sorted(set(wanted) - set(state))
    wrong = sorted(k for k, v in state.items() if v.shape != wanted[k].shape)
    if missing or wrong:
        raise ModelError(f"backbone.pretrained: missing {missing[:3]}, of another shape {wrong[:3]}")
    model.load_state_dict(state)


def _hub_state(name: str) -> dict[str, Tensor]:
    try:
        with torch.random.fork_rng(devices=[]):  # the projector starts the same with and without
            return timm.create_model(name, pretrained=True).state_dict()
    except RuntimeError as error:
        raise ModelError(f"backbone.pretrained=true: timm has no weights of {name}: {error}") from error
    except Exception as error:  # the hub's client has its own errors for each way in which a fetch fails
        raise MissingDataError(
            f"backbone.pretrained=true: cannot fetch the weights of {name}, no network or hub off "
            f"({type(error).__name__}): give a local safetensors file with backbone.pretrained=FILE"
        ) from error
