"""Poisson sampling of patients: the sampling that the accountant of a private run assumes.

Each step includes every patient with the same public probability q, independently of all others and
of all other steps (Abadi et al., Deep learning with differential privacy, arXiv 1607.00133, section
3.1; Mironov et al., arXiv 1908.10530). A batch has no fixed size: it may be empty, and an empty one is a
step like any other. Shuffled epochs of fixed batches are another mechanism, with a larger epsilon.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from sparsecontrast.errors import ConfigError, TooFewImagesError
from sparsecontrast.noise import SecureStream


class PatientSampler:
    """Draw patients, and a few images of each.

    Args:
        patients: integer codes [N], whom each image shows.
        sample_rate: q in (0, 1], public and fixed: never computed from the number of patients at hand.
        images_per_patient: at most so many of a patient's images enter a step, drawn anew each time.
        stream: the only source of randomness.

    Raises:
        ConfigError: a rate or a cap that is impossible.
        TooFewImagesError: there is no image.
    """

    def __init__(
        self, patients: np.ndarray, sample_rate: float, images_per_patient: int, stream: SecureStream
    ):
        if not 0 < sample_rate <= 1:
            raise ConfigError(f"sample_rate={sample_rate}: must be in (0, 1]")
        if images_per_patient < 1:
            raise ConfigError(f"images_per_patient={images_per_patient}: must be at least 1")
        if len(patients) == 0:
            raise TooFewImagesError("no image to sample from")
        order = np.argsort(patients, kind="stable")
        starts = np.flatnonzero(np.diff(patients[order])) + 1
        self._rows = np.split(order, starts)
        self.sample_rate, self.images_per_patient, self._stream = sample_rate, images_per_patient, stream

    def __len__(self) -> int:
        return len(self._rows)

    def draw(self) -> list[np.ndarray]:
        """Draw one step: the rows of each patient it includes, ascending; none for an empty step."""
        included = np.flatnonzero(self._stream.chances(len(self), self.sample_rate))
        return [self._some(self._rows[patient]) for patient in included]

    def _some(self, rows: np.ndarray) -> np.ndarray:
        """At most ``images_per_patient`` of a patient's rows, all equally likely."""
        if len(rows) <= self.images_per_patient:
            return np.sort(rows)
        order = np.argsort(self._stream.integers(len(rows)), kind="stable")
        return np.sort(rows[order[: self.images_per_patient]])


def chunks(drawn: Iterable[np.ndarray], max_rows: int) -> Iterator[np.ndarray]:
    """Cut a step into batches of at most ``max_rows`` rows that fit into memory, patients left whole.

    A patient's images must meet in one batch: their mean gradient is clipped, not each part of it.

    Raises:
        ConfigError: a patient alone has more rows.
    """
    held: list[np.ndarray] = []
    for rows in drawn:
        if len(rows) > max_rows:
            raise ConfigError(f"max_rows={max_rows}: a patient alone has {len(rows)} images in a step")
        if sum(map(len, held)) + len(rows) > max_rows:
            yield np.concatenate(held)
            held = []
        held.append(rows)
    if held:
        yield np.concatenate(held)
