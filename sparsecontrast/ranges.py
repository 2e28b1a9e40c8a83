"""The range of every number in the configuration: one table.

What one key may be on its own stands here; what keys must be to each other stands in
``relations.py``. A value out of range would otherwise be found after all training, or never.
"""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, Literal

from sparsecontrast.errors import ConfigError

INF = float("inf")  # as an open end: any finite number; ``structure.build`` lets no other through
MANY = 10**9  # of things that are only counted
MAX_STEPS = 10**7  # of noisy training: the privacy loss of more no longer fits into memory
PIXELS = 8192  # of a side: the largest detectors have about half of it

Bounds = tuple[float, float, Literal["[]", "[)", "(]", "()"]]
"""Low, high, and whether each end belongs to the range."""

SHARE: Bounds = (0, 1, "[]")
WEIGHT: Bounds = (0, INF, "[)")
COUNT: Bounds = (1, MANY, "[]")
NOISE: Bounds = (0.1, 1000, "[]")  # below no guarantee means anything, above the accountant's grid is coarse
SEED: Bounds = (0, 2**63 - 1, "[]")  # torch takes no more bits, numpy no sign

RANGES: dict[str, Bounds] = {
    "seed": SEED,
    "backbone.img_size": (1, PIXELS, "[]"),
    "backbone.patch_size": (1, PIXELS, "[]"),
    "backbone.depth": (1, 1000, "[]"),
    "backbone.tiles": (2, 64, "[]"),
    "backbone.halo": (0, PIXELS, "[]"),
    "method.keep": (0, 1, "(]"),
    "method.cell": (2, PIXELS, "[]"),
    "method.explore": SHARE,
    "method.surprise_weight": WEIGHT,
    "method.centre_prior": WEIGHT,
    "method.temperature": (0, INF, "()"),
    "method.projection_dim": (1, 65536, "[]"),
    "method.projection_hidden": (1, 65536, "[]"),
    "method.momentum": SHARE,
    "method.distill_weight": WEIGHT,
    "method.distill_every": COUNT,
    "method.distill_fraction": (0, 1, "(]"),
    "method.entropy_floor": SHARE,
    "method.entropy_weight": WEIGHT,
    "method.sparsity_weight": WEIGHT,
    "method.dense_start": SHARE,
    "method.dense_end": SHARE,
    "method.mask_ratio": (0, 1, "()"),
    "method.high_weight": WEIGHT,
    "method.high_share": (0, 1, "(]"),
    "method.landmarks": (1, 65536, "[]"),
    "method.decoder_dim": (4, 65536, "[]"),
    "method.decoder_depth": (1, 1000, "[]"),
    "method.decoder_heads": (1, 65536, "[]"),
    "data.image_size": (1, PIXELS, "[]"),
    "data.val_fraction": (0, 1, "[)"),
    "data.test_fraction": (0, 1, "[)"),
    "data.merge_sites_to": COUNT,
    "data.min_images": COUNT,
    "data.phantom.sites": (1, 100_000, "[]"),
    "data.phantom.patients_per_site": (1, 100_000, "[]"),
    "data.phantom.images_per_patient": (1, 100_000, "[]"),
    "data.phantom.seed": SEED,
    "privacy.target_epsilon": (0, 1000, "(]"),
    "privacy.delta": (0, 1, "()"),
    "privacy.max_grad_norm": (0, INF, "()"),
    "privacy.noise_multiplier": NOISE,
    "privacy.sample_rate": (0, 1, "(]"),
    "privacy.planned_rounds": COUNT,
    "privacy.steps_per_round": COUNT,
    "privacy.images_per_patient": COUNT,
    "privacy.public_patients": COUNT,
    "privacy.insecure_seed": SEED,
    "federation.rounds": COUNT,
    "federation.sites": COUNT,
    "federation.fraction": (0, 1, "(]"),
    "federation.proximal_mu": WEIGHT,
    "federation.min_sites": COUNT,
    "federation.round_timeout": (0, INF, "()"),
    "federation.connect_timeout": (0, INF, "[)"),
    "federation.max_weight": (0, 1, "(]"),
    "federation.max_norm_ratio": (1, INF, "()"),  # at 1 no reply could differ from the global model
    "federation.alpha": (0, INF, "()"),
    "federation.workers": (1, 1024, "[]"),
    "train.batch_size": (2, MANY, "[]"),  # contrast needs two images
    "train.local_epochs": COUNT,
    "train.steps": COUNT,
    "train.lr": (0, INF, "()"),
    "train.weight_decay": WEIGHT,
    "train.warmup_rounds": SHARE,
    "train.crop_area": (0, 1, "(]"),
    "train.rotation": (0, 45, "[]"),
    "train.threads": (1, 1024, "[]"),
    "audit.canaries": SHARE,
    "audit.views": (0, 1000, "[]"),
    "audit.delta": (0, 1, "()"),
    "evaluation.auto.confidence": (0, 1, "()"),
    "evaluation.auto.tolerance": (0, 2, "[]"),  # of a cosine distance
    "evaluation.label_fractions": (0, 1, "(]"),
    "evaluation.bootstrap": (1, 1_000_000, "[]"),
    "evaluation.knn_neighbours": COUNT,
    "evaluation.overlays": (0, MANY, "[]"),
}


def check_ranges(config: Any) -> None:
    """Hold every key of ``RANGES`` to its range; None stands for no number, a tuple for each of its own.

    A key of another method than the configured one is not there and has nothing to hold.

    Raises:
        ConfigError: a value outside; says which key, and its range.
    """
    for key, bounds in RANGES.items():
        group, _, name = key.rpartition(".")
        value = getattr(attrgetter(group)(config) if group else config, name, None)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None:
                check_range(key, number, bounds)


def check_numbers(config: Any, bounds: Mapping[str, Bounds]) -> None:
    """Hold numbers, each of them there, to their ranges.

    Raises:
        ConfigError: a value outside; says which key, and its range.
    """
    for key, range_of in bounds.items():
        check_range(key, attrgetter(key)(config), range_of)


def check_range(name: str, number: float, bounds: Bounds) -> None:
    """Refuse a number outside of its bounds; not-a-number lies outside of all.

    Raises:
        ConfigError: it lies outside; the message opens with ``name``.
    """
    low, high, ends = bounds
    above = number >= low if ends[0] == "[" else number > low
    below = number <= high if ends[1] == "]" else number < high
    if not (above and below):
        raise ConfigError(f"{name}={number}: must be in {ends[0]}{low}, {high}{ends[1]}")
