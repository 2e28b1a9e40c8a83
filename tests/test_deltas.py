"""Updates on the wire: exact or rounded, counted from the same weights on both sides, nothing lost."""

import dataclasses

import numpy as np
import pytest
import torch

from sparsecontrast import payload
from sparsecontrast.deltas import pack_upload, quantise, weights_of
from sparsecontrast.errors import PayloadError

SHAPES = {"backbone.a": (2, 3), "backbone.b": (5,), "saliency.c": ()}
SIZE = 12


def vector(seed, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(SIZE)).astype(np.float32)


def tensors(flat):
    return payload.unpack(payload.repack(flat, SHAPES, "fp32"))


def sent(flat, reference, upload, dtype="fp32", residual=None):
    return pack_upload(tensors(flat), list(SHAPES), upload, dtype, reference, residual)


def received(packed, reference, upload, dtype="fp32", ratio=10.0):
    return weights_of(packed, SHAPES, upload, dtype, reference, ratio)


def reason(packed, reference, upload, *more):
    with pytest.raises(PayloadError) as caught:
        received(packed, reference, upload, *more)
    return caught.value.reason


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("upload", ["weights", "delta"])
def test_floats_arrive_as_they_were_sent(upload, dtype):
    reference = vector(0)
    trained = reference + vector(1, 0.01)
    packed, residual = sent(trained, reference, upload, dtype)
    assert residual is None and packed.flat.dtype == payload.DTYPES[dtype]
    found = received(packed, reference, upload, dtype)
    assert found.dtype == np.float32
    # half precision of an update is a hundred times finer than half precision of the weights
    limit = {"fp32": 3e-7, "fp16": 2e-3 if upload == "weights" else 2e-5}[dtype]
    assert np.abs(found - trained).max() <= limit


def test_eight_bits_round_each_tensor_by_its_own_scale():
    reference, update = vector(0), vector(1, 0.01)
    update[6:11] *= 1e-3  # one tensor moves a thousand times less
    packed, residual = sent(reference + update, reference, "delta_int8")
    assert packed.flat.dtype == np.int8 and packed.flat.nbytes == SIZE
    assert len(packed.manifest["scales"]) == 3 and np.abs(packed.flat).max() == 127
    found = received(packed, reference, "delta_int8")
    for part in (slice(0, 6), slice(6, 11), slice(11, 12)):
        step = np.abs((reference + update - reference)[part]).max() / 127
        assert np.abs((found - reference - update)[part]).max() <= step / 2 + 3e-7
    np.testing.assert_allclose(reference + update - found, residual, atol=3e-7)


def test_what_rounding_leaves_is_sent_later_and_none_of_it_is_lost():
    """Updates far below the step of their tensor: without the residual they would never arrive."""
    reference, residual = np.zeros(SIZE, np.float32), None
    update = np.full(SIZE, 1e-3, np.float32)
    update[0] = update[6] = update[11] = 1.0
    total, forgetful = np.zeros(SIZE), np.zeros(SIZE)
    for _ in range(40):
        packed, residual = sent(reference + update, reference, "delta_int8", residual=residual)
        total += weights_of(packed, SHAPES, "delta_int8", "fp32", reference + 1, 1e9) - 1
        forgetful += weights_of(sent(update, reference, "delta_int8")[0], SHAPES, "delta_int8", "fp32",
                                reference + 1, 1e9) - 1  # fmt: skip
    assert residual is not None
    np.testing.assert_allclose(total + residual, 40 * update.astype(np.float64), rtol=1e-4)
    assert (forgetful[1:6] == 0).all() and (total[1:6] > 0.03).all()


@pytest.mark.parametrize("flat", [np.zeros(SIZE, np.float32), np.full(SIZE, 1e-42, np.float32)])
def test_nothing_to_tell_is_zeros(flat):
    rounded, scales = quantise(flat, [6, 5, 1])
    assert not rounded.any() and scales == [1.0, 1.0, 1.0]
    packed, _ = sent(vector(0), vector(0), "delta_int8")
    np.testing.assert_array_equal(received(packed, vector(0), "delta_int8"), vector(0))


def test_the_receiver_gets_what_it_asked_for_or_refuses():
    reference = vector(0)
    packed = {u: sent(vector(1), reference, u)[0] for u in ("weights", "delta", "delta_int8")}
    for sent_as, one in packed.items():
        for asked in packed:
            if asked != sent_as:
                assert reason(one, reference, asked) in ("manifest", "dtype")
    assert reason(packed["delta"], reference, "delta", "fp16") == "dtype"


@pytest.mark.parametrize(
    ("scales", "why"),
    [([1.0, 1.0], "manifest"), ([1.0, 1.0, -1.0], "manifest"), ([1.0, 1.0, float("nan")], "manifest"),
     ([1.0, 1.0, float("inf")], "manifest"), ([1.0, 1.0, 0.0], "manifest"), (["1", 1.0, 1.0], "manifest"),
     ([3e38, 3e38, 3e38], "nonfinite"), ([1e4, 1e4, 1e4], "norm")],
)  # fmt: skip
def test_scales_that_no_training_makes_are_refused(scales, why):
    reference = vector(0)
    packed, _ = sent(vector(1), reference, "delta_int8")
    texts = [s for s in scales if isinstance(s, str)]
    manifest = payload.manifest_of(SHAPES, "int8", packed.flat, "delta", None if texts else scales)
    bad = dataclasses.replace(packed, manifest=manifest | {"scales": scales})
    assert reason(bad, reference, "delta_int8") == why


def test_changed_scales_break_the_hash():
    packed, _ = sent(vector(1), vector(0), "delta_int8")
    scales = [2 * s for s in packed.manifest["scales"]]
    bad = dataclasses.replace(packed, manifest=packed.manifest | {"scales": scales})
    assert reason(bad, vector(0), "delta_int8") == "manifest"


def test_an_update_that_multiplies_the_weights_is_refused_and_so_is_one_that_is_not_finite():
    reference = vector(0)
    assert reason(sent(reference * 20, reference, "delta")[0], reference, "delta") == "norm"
    assert reason(sent(reference * 20, reference, "delta_int8")[0], reference, "delta_int8") == "norm"
    for upload in ("weights", "delta", "delta_int8"):
        with pytest.raises(PayloadError, match="NaN"):
            bad = reference.copy()
            bad[3] = np.nan
            sent_state = {n: torch.from_numpy(np.array(t)) for n, t in zip(SHAPES, _split(bad), strict=True)}
            pack_upload(sent_state, list(SHAPES), upload, "fp32", reference)


def test_another_models_reference_or_residual_is_refused():
    for told in ({"reference": vector(0)[:-1]}, {"reference": vector(0), "residual": vector(1)[:-1]}):
        with pytest.raises(PayloadError) as caught:
            sent(vector(1), upload="delta_int8", **told)
        assert caught.value.reason == "size"


def _split(flat):
    parts = np.split(flat, [6, 11])
    return [part.reshape(shape) for part, shape in zip(parts, SHAPES.values(), strict=True)]
