"""All that a private round tells besides weights: functions of the configuration and the ledger alone.

The trainer tells it, and the guard makes it again from what the ledger holds: a number that differs, which
could carry anything about an image, does not leave.
"""

import math

from sparsecontrast.accounting import Charge
from sparsecontrast.methods.schedule import keep_ratio
from sparsecontrast.settings import Config, MiramConfig

COARSE = 10  # least step of a rounded number of patients


def disclosure(
    config: Config, charge: Charge, epsilon: float, delta: float, patients: int, weights: int,
    round_number: int, rounds: int,
) -> dict[str, float]:  # fmt: skip
    """Return the scalars of a private round, the numbers of patients and steps apart.

    Args:
        config: of the run, privacy that of the site.
        charge: of the round, as the ledger holds it.
        epsilon: of the cohort's worst patient after it.
        delta: of the policy.
        patients: ``public_patients``.
        weights: numbers in the tensors that leave.
        round_number: 1-based server round.
        rounds: of the whole run.

    Returns:
        epsilon, delta, noise_multiplier; keep, the share of tokens that the schedule has; noise_to_signal,
        sigma sqrt(d) / (q N): the norm of a step's noise in the d weights over the largest norm that the sum
        of its q N patients can have, were all their gradients parallel; insecure_noise where it is seeded.
    """
    sigma = charge.noise_multiplier
    told = {
        "epsilon": epsilon, "delta": delta, "noise_multiplier": sigma,
        "keep": share_of_tokens(config, round_number, rounds),
        "noise_to_signal": sigma * math.sqrt(weights) / (charge.sample_rate * patients),
    }  # fmt: skip
    return told | ({} if config.privacy.insecure_seed is None else {"insecure_noise": 1.0})


def public_patients(config: Config, count: int) -> int:
    """Return the number that scales the steps and weighs the site: a constant, or rounded from ``count``.

    Rounded down to two digits, or to tens below 100; at least 10. No noise covers it then: it can betray one
    patient where the number stands at a step. ``privacy.public_patients`` puts a constant in its place.
    """
    step = max(COARSE, 10 ** (len(str(count)) - 2))
    return config.privacy.public_patients or max(COARSE, count // step * step)


def share_of_tokens(config: Config, round_number: int, rounds: int) -> float:
    """Share of the image tokens that a round computes, in (0, 1]."""
    if isinstance(config.method, MiramConfig):
        patches = (config.backbone.img_size // (config.backbone.patch_size or config.backbone.img_size)) ** 2
        return round((1 - config.method.mask_ratio) * patches) / patches
    return keep_ratio(config.method, round_number, rounds)
