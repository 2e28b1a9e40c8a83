"""Fair coins for patients: whoever draws tails is held out, so that a run can be audited afterwards.

An audit asks whether released weights tell who was trained on. Its answer is a bound only where chance
alone decided who was (Steinke et al., arXiv 2305.08846): so each canary's coin is tossed before the sites
start, on its own, and stands in ``partition.csv``, column ``canary``: ``in``, ``out``, or empty for a
patient without a coin. Splits, sites and order of the rows stay what they would be without it.
"""

from typing import TYPE_CHECKING

import numpy as np

from simulation.partition import numbered_patients
from sparsecontrast.data.dataset import CANARY, HELD_OUT

if TYPE_CHECKING:
    import pandas as pd


def toss(frame: "pd.DataFrame", share: float, seed: int) -> "pd.DataFrame":
    """Give a share of the patients to train on a coin each, and write down how it fell.

    Args:
        frame: an index; its order of rows does not matter. Coins that it holds already are kept.
        share: of the patients with images in the split ``train``, in [0, 1].
        seed: of the run; the same seed and files give the same coins, whatever the key of the pseudonyms.

    Returns:
        A copy with the column ``canary``; the frame itself where no coin is wanted.
    """
    if share == 0 or CANARY in frame:
        return frame
    from sparsecontrast.trainer import derive_seed

    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "canaries")))
    codes = numbered_patients(frame)
    chosen, heads = rng.random((2, codes.max() + 1))
    train = (frame["split"] == "train").to_numpy()
    asked = train & (chosen[codes] < share)
    return frame.assign(**{CANARY: np.where(asked, np.where(heads[codes] < 0.5, "in", HELD_OUT), "")})
