"""Configuration of ``sparsecontrast classify``: ``configs/classify.yaml`` into frozen dataclasses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparsecontrast.config import hydra_tree, split_overrides
from sparsecontrast.errors import ConfigError
from sparsecontrast.methods.sparse_attn_net import SparseAttnConfig
from sparsecontrast.ranges import COUNT, INF, PIXELS, SEED, SHARE, WEIGHT, Bounds, check_numbers
from sparsecontrast.structure import build


@dataclass(frozen=True)
class CellsConfig:
    """Pictures of cells; ``configs/cells/wbc.yaml`` explains every field."""

    name: str
    layout: Literal["index", "folders"]
    root: str | None
    index: str | None
    path: str
    label: str
    lab: str
    group: str
    lab_name: str | None
    group_pattern: str | None
    classes: tuple[str, ...]
    min_images: int
    train_labs: tuple[str, ...]
    test_labs: tuple[str, ...]
    test_fraction: float
    val_fraction: float


@dataclass(frozen=True)
class FitConfig:
    """How a classifier is trained; ``configs/classify.yaml`` explains every field."""

    image_size: int
    epochs: int
    patience: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    ema: float
    label_smoothing: float
    balance: float
    colour: float
    threads: int
    refit: bool = False  # of runs that were trained before there was a choice


@dataclass(frozen=True)
class JudgeConfig:
    """What is told of a trained classifier."""

    bootstrap: int
    overlays: int


@dataclass(frozen=True)
class ClassifyConfig:
    """One run of ``classify``, whole; ``overrides`` is what the user said."""

    method: SparseAttnConfig
    cells: CellsConfig
    train: FitConfig
    evaluation: JudgeConfig
    seed: int
    output_dir: str
    overrides: tuple[str, ...] = ()


RANGES: dict[str, Bounds] = {
    "seed": SEED,
    "method.share": (0, 1, "(]"),
    "method.share_floor": (0, 1, "(]"),
    "method.patch": (1, PIXELS, "[]"),
    "method.explore": (0, 1, "[)"),
    "method.dither": WEIGHT,
    "method.distill_weight": WEIGHT,
    "method.k_tolerance": WEIGHT,
    "method.k_every": COUNT,
    "method.k_factor": (0, 1, "()"),
    "method.k_smoothing": (0, 1, "[)"),
    "method.width": (1, 4096, "[]"),
    "method.depth": (1, 64, "[]"),
    "method.heads": (1, 256, "[]"),
    "method.mlp_ratio": (1, 16, "[]"),
    "method.coarse_width": (1, 1024, "[]"),
    "method.place_bands": (1, 16, "[]"),
    "cells.min_images": (2, 10**9, "[]"),
    "cells.test_fraction": (0, 1, "[)"),
    "cells.val_fraction": (0, 1, "()"),
    "train.image_size": (8, 1024, "[]"),
    "train.epochs": COUNT,
    "train.patience": COUNT,
    "train.batch_size": COUNT,
    "train.lr": (0, INF, "()"),
    "train.weight_decay": WEIGHT,
    "train.warmup": SHARE,
    "train.ema": (0, 1, "[)"),
    "train.label_smoothing": (0, 1, "[)"),
    "train.balance": SHARE,
    "train.colour": (0, 2, "[]"),
    "train.threads": (1, 1024, "[]"),
    "evaluation.bootstrap": (1, 1_000_000, "[]"),
    "evaluation.overlays": (0, 1000, "[]"),
}


def compose_classify(overrides: Sequence[str] | str = ()) -> ClassifyConfig:
    """Compose ``configs/classify.yaml`` with Hydra overrides into a checked configuration.

    Raises:
        ConfigError: an unknown key or an impossible value; names it.
    """
    words = split_overrides(overrides) if isinstance(overrides, str) else list(overrides)
    tree = hydra_tree(words, "classify")
    method = tree.get("method") or {}
    if isinstance(method, dict) and method.get("name") != "sparse_attn_net":
        raise ConfigError(
            f"method={method.get('name')}: pretrains without labels; classify takes method=sparse_attn_net"
        )
    config = build(ClassifyConfig, {**tree, "overrides": tuple(words)}, "")
    check_classify(config)
    return config


def check_classify(config: ClassifyConfig) -> None:
    """Refuse values that are well-typed but impossible, by themselves or beside each other.

    Raises:
        ConfigError: the first one found.
    """
    check_numbers(config, RANGES)
    m, c = config.method, config.cells
    wrong = {
        f"method.share_floor={m.share_floor}: must not lie above method.share={m.share}": (
            m.share_floor > m.share
        ),
        f"method.width={m.width}: must be a multiple of method.heads={m.heads}": m.width % m.heads != 0,
        f"train.image_size={config.train.image_size}: must be a multiple of method.patch={m.patch}": (
            config.train.image_size % m.patch != 0
        ),
        "cells.index: layout=index needs the name of the table": c.layout == "index" and not c.index,
    }
    for message, found in wrong.items():
        if found:
            raise ConfigError(message)
