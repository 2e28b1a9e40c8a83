"""Configuration of a federated ``classify``: ``configs/config.yaml`` with ``experiment=cells``.

A federated run has no moving average of the weights (the server's average stands for it), no early stopping
(rounds are fixed) and no held-out loss of a site (it may not leave). So k, the words read of a picture, stays
at its ceiling in every round: a k of each lab's own would make them train different networks.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparsecontrast.classify.settings import (
    CellsConfig,
    ClassifyConfig,
    FitConfig,
    JudgeConfig,
    check_classify,
)
from sparsecontrast.config import OWN_COMMANDS
from sparsecontrast.errors import ConfigError
from sparsecontrast.methods.sparse_attn_net import SparseAttnConfig
from sparsecontrast.overrides import key_of
from sparsecontrast.ranges import COUNT, RANGES, SHARE, Bounds, check_numbers
from sparsecontrast.relations import federation_relations
from sparsecontrast.settings import FederationConfig, PrivacyConfig, SiteConfig
from sparsecontrast.structure import build


@dataclass(frozen=True)
class RoundsConfig:
    """How each lab trains; ``configs/experiment/cells.yaml`` explains every field."""

    image_size: int
    batch_size: int
    local_epochs: int
    lr: float
    weight_decay: float
    warmup_rounds: float
    label_smoothing: float
    balance: float
    colour: float
    threads: int


@dataclass(frozen=True)
class JudgedConfig:
    """What is told of the global classifier, and what is trained beside it."""

    bootstrap: int
    overlays: int
    baselines: tuple[Literal["local_only"], ...]


@dataclass(frozen=True)
class CellsRun:
    """One federated run of ``classify``, whole."""

    method: SparseAttnConfig
    cells: CellsConfig
    privacy: PrivacyConfig
    federation: FederationConfig
    site: SiteConfig
    train: RoundsConfig
    evaluation: JudgedConfig
    seed: int
    output_dir: str
    resume: str | None
    init: str | None
    tensorboard: bool
    experiment: str | None = None
    overrides: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The run's, sorted: what the network's outputs stand for, at every site."""
        return tuple(sorted(set(self.cells.classes)))


OURS: dict[str, Bounds] = {
    **{key: bounds for key, bounds in RANGES.items() if key.startswith("federation.") or key == "seed"},
    "train.local_epochs": COUNT,
    "train.warmup_rounds": SHARE,
}


def compose_cells(tree: Mapping[str, Any], words: Sequence[str]) -> CellsRun:
    """Check what Hydra made of overrides.

    Args:
        tree: of ``config.hydra_tree``, with the keys of all kinds of runs.
        words: the overrides. A key of another kind that they set is refused as unknown.

    Raises:
        ConfigError: an unknown key, an impossible value, or no ``cells.classes``.
    """
    if "image_size" not in tree["train"]:
        raise ConfigError(f"method=sparse_attn_net: {OWN_COMMANDS['sparse_attn_net']}")
    asked = [key_of(word) for word in words]
    config = build(CellsRun, {**_own_keys(CellsRun, tree, asked), "overrides": tuple(words)}, "")
    check_cells(config)
    return config


def check_cells(config: CellsRun) -> None:
    """Refuse what is impossible.

    Raises:
        ConfigError: the first thing found, with what it may be.
    """
    check_numbers(config, OURS)
    if len(config.classes) < 2:
        raise ConfigError(
            f"cells.classes={list(config.cells.classes)}: labs may not choose their own in a federated run; "
            "name at least two, such as cells.classes=[eosinophil,lymphocyte,monocyte,neutrophil]"
        )
    if config.federation.partition != "by_site":
        raise ConfigError(
            f"federation.partition={config.federation.partition}: the sites of pictures are labs; leave "
            "it at by_site"
        )
    for holds, message in federation_relations(config.federation):
        if not holds:
            raise ConfigError(message)
    check_classify(as_classify(config))


def as_classify(config: CellsRun) -> ClassifyConfig:
    """The run as a training on one machine would be told it: all its epochs, k and weights left alone."""
    t, e = config.train, config.evaluation
    epochs = t.local_epochs * config.federation.rounds
    fit = FitConfig(
        image_size=t.image_size, epochs=epochs, patience=epochs, batch_size=t.batch_size, lr=t.lr,
        weight_decay=t.weight_decay, warmup=t.warmup_rounds, ema=0.0, label_smoothing=t.label_smoothing,
        balance=t.balance, colour=t.colour, threads=t.threads,
    )  # fmt: skip
    judged = JudgeConfig(e.bootstrap, e.overlays)
    return ClassifyConfig(
        config.method, config.cells, fit, judged, config.seed, config.output_dir, config.overrides
    )


def _own_keys(cls: Any, values: Mapping[str, Any], asked: Sequence[str], where: str = "") -> dict[str, Any]:
    """Leave out what ``configs/`` sets of other kinds of runs; what the user's words set stays."""
    hints, found = typing.get_type_hints(cls), {}
    for key, value in values.items():
        path = f"{where}{key}"
        if key in hints:
            nested = dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping)
            found[key] = _own_keys(hints[key], value, asked, f"{path}.") if nested else value
        elif any(word == path or word.startswith(f"{path}.") for word in asked):
            found[key] = value
    return found
