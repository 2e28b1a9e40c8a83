"""How many tokens are kept, by SERVER round: the same number at every site."""

import math

from sparsecontrast.settings import MethodConfig

RAMP = 0.2  # of all rounds: the cosine from dense to the target, after the dense start


def keep_ratio(config: MethodConfig, round_number: int, rounds: int) -> float:
    """Return the share of tokens to compute in round 1..rounds, in [config.keep, 1].

    Dense for the first ``dense_start`` of the rounds, a cosine down to ``config.keep``, then
    constant, dense again for the last ``dense_end`` (shares are rounded to whole rounds).
    """
    start, end, ramp = (round(x * rounds) for x in (config.dense_start, config.dense_end, RAMP))
    if round_number <= start or round_number > rounds - end:
        return 1.0
    progress = min(1.0, (round_number - start) / max(1, ramp))
    return config.keep + (1 - config.keep) * (1 + math.cos(math.pi * progress)) / 2
