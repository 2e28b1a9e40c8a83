import math

import numpy as np
import pytest

from sparsecontrast.errors import ConfigError, TooFewImagesError
from sparsecontrast.noise import SecureStream
from sparsecontrast.sampling import PatientSampler, chunks

PATIENTS = np.array([5, 2, 5, 9, 5, 2, 7, 5])


def test_each_patient_is_in_a_step_with_the_same_chance_independently():
    sampler = PatientSampler(PATIENTS, 0.3, 2, SecureStream())
    steps = 4000
    seen = np.zeros((steps, 10))
    for step in range(steps):
        for rows in sampler.draw():
            assert len(set(PATIENTS[rows])) == 1
            seen[step, PATIENTS[rows[0]]] = 1
    rates = seen[:, [2, 5, 7, 9]].mean(0)
    assert (abs(rates - 0.3) < 5 * math.sqrt(0.21 / steps)).all()
    together = (seen[:, 2] * seen[:, 5]).mean()
    assert abs(together - 0.09) < 5 * math.sqrt(0.09 * 0.91 / steps)
    assert (seen.sum(1) == 0).mean() > 0.2  # empty steps are real: 0.7^4 = 0.24


def test_a_patients_images_are_capped_and_all_get_their_turn():
    sampler = PatientSampler(PATIENTS, 1.0, 2, SecureStream(insecure_seed=1))
    counts = np.zeros(8)
    for _ in range(900):
        drawn = sampler.draw()
        assert [len(rows) for rows in drawn] == [2, 2, 1, 1]
        counts[np.concatenate(drawn)] += 1
    assert (counts[[1, 5, 3, 6]] == 900).all()
    assert (abs(counts[[0, 2, 4, 7]] / 900 - 0.5) < 5 * math.sqrt(0.25 / 900)).all()
    assert len(sampler) == 4


def test_only_an_insecure_stream_repeats_its_draws():
    def rows(stream):
        sampler = PatientSampler(np.arange(200), 0.5, 1, stream)
        return np.concatenate(sampler.draw()).tolist()

    assert rows(SecureStream(3)) == rows(SecureStream(3)) != rows(SecureStream())


def test_chunks_leave_patients_whole():
    drawn = [np.arange(3), np.array([10, 11]), np.array([20]), np.arange(30, 34)]
    got = [rows.tolist() for rows in chunks(drawn, 5)]
    assert got == [[0, 1, 2, 10, 11], [20, 30, 31, 32, 33]]
    assert list(chunks([], 5)) == []
    with pytest.raises(ConfigError, match="max_rows=3"):
        list(chunks(drawn, 3))


@pytest.mark.parametrize(
    ("rate", "cap", "says"), [(0.0, 1, "sample_rate"), (1.1, 1, "sample"), (0.5, 0, "im")]
)
def test_impossible_values_are_refused(rate, cap, says):
    with pytest.raises(ConfigError, match=says):
        PatientSampler(PATIENTS, rate, cap, SecureStream())
    with pytest.raises(TooFewImagesError):
        PatientSampler(PATIENTS[:0], 0.5, 1, SecureStream())
