import copy
import math
import os
import pickle

import numpy as np
import pytest
import torch

from sparsecontrast.noise import BLOCK, DRAWS, MANTISSA, SecureStream

MANY = torch.empty(400_000)


@pytest.mark.parametrize("stream", [SecureStream(), SecureStream(insecure_seed=1)])
@pytest.mark.parametrize("std", [1.0, 3.5])
def test_noise_is_gaussian_of_the_asked_deviation(stream, std):
    drawn = stream.gaussian(MANY, std).double() / std
    n = len(drawn)
    assert abs(drawn.mean()) < 5 / math.sqrt(n)
    assert abs(drawn.std() - 1) < 5 / math.sqrt(2 * n)  # standard error of a deviation
    assert abs((drawn**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for bound, beyond in ((1.0, 0.31731), (2.0, 0.0455), (3.0, 0.0027)):
        share = (drawn.abs() > bound).double().mean()
        assert abs(share - beyond) < 5 * math.sqrt(beyond / n)
    halves = drawn.view(2, -1)
    assert abs((halves[0] * halves[1]).mean()) < 5 / math.sqrt(n / 2)


@pytest.mark.parametrize("stream", [SecureStream(), SecureStream(insecure_seed=1)])
def test_what_one_radius_gave_is_spread_over_the_halves_of_a_block_and_independent(stream):
    block = stream.gaussian(torch.empty(48 * BLOCK), 1).double().view(48, 2, -1)
    assert abs((block[:, 0] * block[:, 1]).mean()) < 5 / math.sqrt(block.numel() / 2)
    squares = block**2 - 1
    assert abs((squares[:, 0] * squares[:, 1]).mean()) < 5 * 2 / math.sqrt(block.numel() / 2)


@pytest.mark.parametrize("count", [1, 2, 7, BLOCK - 1, BLOCK + 1, 3 * BLOCK])
def test_noise_is_the_sum_of_draws_by_the_formula(count):
    """Box and Muller, written out: 53 bits a uniform number, none used twice, four draws a sum."""
    found = SecureStream(insecure_seed=3).gaussian(torch.empty(count, dtype=torch.float64), 2.0)
    stream, wanted = SecureStream(insecure_seed=3), []
    half = math.ceil(count / (2 * math.ceil(count / BLOCK)))
    while len(wanted) < count:
        words = stream.integers(2 * DRAWS * half).reshape(2, DRAWS, half)
        radius = np.sqrt(-2 * np.log((words[0] + 1) / 2**MANTISSA))
        angle = 2 * np.pi * (words[1] / 2**MANTISSA)
        for part in (np.cos(angle), np.sin(angle)):
            wanted += (2 * (radius * part).sum(0) / math.sqrt(DRAWS)).tolist()
    np.testing.assert_allclose(found.numpy(), wanted[:count], rtol=1e-12, atol=1e-13)


def test_noise_of_many_tensors_is_one_stream_cut_in_their_shapes():
    like = [torch.zeros(3, 4), torch.zeros(5, dtype=torch.float64), torch.zeros(0), torch.zeros(())]
    drawn = SecureStream(insecure_seed=4).gaussians(like, 0.5)
    assert [(d.shape, d.dtype) for d in drawn] == [(p.shape, p.dtype) for p in like]
    whole = SecureStream(insecure_seed=4).gaussian(torch.zeros(18, dtype=torch.float64), 0.5)
    torch.testing.assert_close(torch.cat([d.double().flatten() for d in drawn]), whole, atol=1e-7, rtol=1e-7)
    assert SecureStream().gaussians([], 1.0) == []


def test_two_streams_are_independent_and_a_stream_never_repeats():
    first, second = SecureStream(), SecureStream()
    a, b, c = first.gaussian(MANY, 1), second.gaussian(MANY, 1), first.gaussian(MANY, 1)
    for x, y in ((a, b), (a, c), (b, c)):
        assert abs((x * y).mean()) < 5 / math.sqrt(len(x))
        assert not torch.equal(x, y)


def test_only_an_insecure_seed_repeats():
    a, b = (SecureStream(insecure_seed=7, name="a").gaussian(MANY, 1) for _ in range(2))
    other = SecureStream(insecure_seed=7, name="b").gaussian(MANY, 1)
    assert torch.equal(a, b) and not torch.equal(a, other)
    assert SecureStream(insecure_seed=0).insecure and not SecureStream().insecure


@pytest.mark.parametrize("again", [pickle.dumps, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_stream_is_never_saved(again, seed):
    with pytest.raises(TypeError, match="replayed noise"):
        again(SecureStream(seed))
    assert not hasattr(SecureStream(seed), "state_dict")


def test_noise_takes_shape_and_type(recwarn):
    for dtype in (torch.float32, torch.float64):
        drawn = SecureStream().gaussian(torch.zeros(3, 1, 5, dtype=dtype), 2.0)
        assert drawn.shape == (3, 1, 5) and drawn.dtype == dtype
    assert SecureStream().gaussian(torch.zeros(0), 1.0).shape == (0,)


def test_a_forked_process_draws_other_noise(monkeypatch):
    stream = SecureStream()
    twin = SecureStream()
    twin._cipher = stream._cipher  # what a fork leaves: one key, one position
    before = stream.integers(4)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    key = stream._cipher
    assert not np.array_equal(stream.integers(4), before) and stream._cipher is not key


def test_coins_fall_as_asked():
    stream = SecureStream()
    for probability in (0.01, 0.3, 1.0, 0.0):
        share = stream.chances(200_000, probability).mean()
        assert abs(share - probability) <= 5 * math.sqrt(probability * (1 - probability) / 200_000)


def test_a_generator_of_a_stream_is_drawn_whole():
    drawn = [SecureStream().generator() for _ in range(2)]
    a, b = (torch.randn(100_000, generator=g) for g in drawn)
    assert abs((a * b).mean()) < 5 / math.sqrt(len(a)) and abs(a.std() - 1) < 5 / math.sqrt(2 * len(a))
    seeds = {g.initial_seed() for g in drawn}
    assert not torch.equal(torch.randn(100_000, generator=torch.Generator().manual_seed(seeds.pop())), a)
    one, other = (SecureStream(insecure_seed=2).generator() for _ in range(2))
    assert torch.equal(torch.rand(9, generator=one), torch.rand(9, generator=other))
    stream = SecureStream(insecure_seed=2)
    first, second = stream.generator(), stream.generator()
    # the first draw comes after the whole state was turned over: no word of it is left of a fixed seed
    assert not (torch.rand(700, generator=first) == torch.rand(700, generator=second)).any()
