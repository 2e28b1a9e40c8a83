import io

import numpy as np
import pytest
import torch

from sparsecontrast import payload
from sparsecontrast.errors import PayloadError

SHAPES = {"backbone.w": (3, 4), "backbone.b": (4,), "saliency.s": (), "backbone.a": (2, 1, 2)}


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def packed(dtype="fp32", seed=0):
    return payload.pack(tensors(seed), list(SHAPES), dtype)


def changed(flat=None, **manifest):
    original = packed()
    return payload.Payload(original.flat if flat is None else flat, {**original.manifest, **manifest})


def reason(call, *args, **kwargs):
    with pytest.raises(PayloadError) as caught:
        call(*args, **kwargs)
    assert caught.value.code == f"payload_{caught.value.reason}"
    return caught.value.reason


def test_round_trip_is_exact_in_fp32_and_one_rounding_in_fp16():
    before = tensors()
    after = payload.unpack(packed())
    assert all(torch.equal(before[n], after[n]) for n in SHAPES)
    half = payload.unpack(packed("fp16"))
    assert all(torch.equal(before[n].half().float(), half[n]) for n in SHAPES)
    assert all(t.dtype == torch.float32 for t in half.values())


def test_layout_depends_on_names_not_on_order():
    backwards = dict(reversed(tensors().items()))
    a, b = packed(), payload.pack(backwards, list(reversed(list(SHAPES))), "fp32")
    assert a.flat.tobytes() == b.flat.tobytes()
    assert a.manifest == b.manifest
    assert a.flat.ndim == 1
    assert a.manifest["names"] == sorted(SHAPES)


def test_repack_of_the_vector_is_the_same_payload():
    a = packed()
    assert payload.repack(a.flat, SHAPES, "fp32").manifest == a.manifest


@pytest.mark.parametrize(
    "name", ["projector.0.weight", "teacher.w", "optimizer.exp_avg.backbone.w", "backbone"]
)
def test_pack_refuses_what_may_not_leave_even_if_the_method_allows_it(name):
    assert reason(payload.pack, {name: torch.ones(2)}, [name], "fp32") == "names"


def test_pack_wants_exactly_the_allowed_tensors():
    more = tensors() | {"backbone.more": torch.ones(1)}
    assert reason(payload.pack, more, list(SHAPES), "fp32") == "names"
    fewer = {n: t for n, t in tensors().items() if n != "backbone.w"}
    assert reason(payload.pack, fewer, list(SHAPES), "fp32") == "names"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pack_refuses_nan_and_infinity(value):
    bad = tensors()
    bad["backbone.w"][1, 1] = value
    assert reason(payload.pack, bad, list(SHAPES), "fp32") == "nonfinite"


def test_pack_refuses_overflow_in_fp16_and_integers():
    big = tensors()
    big["backbone.w"][0, 0] = 1e6
    assert reason(payload.pack, big, list(SHAPES), "fp16") == "nonfinite"
    whole = tensors() | {"backbone.b": torch.ones(4, dtype=torch.int64)}
    assert reason(payload.pack, whole, list(SHAPES), "fp32") == "dtype"


def test_verify_accepts_what_pack_made():
    for dtype in ("fp32", "fp16"):
        good = packed(dtype)
        payload.verify(good, SHAPES, dtype)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (changed(names=["backbone.a", "backbone.b", "backbone.w"]), "names"),
        (changed(names=[*sorted(SHAPES), "teacher.w"]), "names"),
        (changed(names=["backbone.b", "backbone.a", "backbone.w", "saliency.s"]), "names"),
        (changed(shapes=["2x1x2", "4", "4x3", ""]), "shape"),
        (changed(shapes=["2x1x2", "4", "3x4"]), "shape"),
        (changed(shapes=["2x1x2", "4", "3x4", "", "1"]), "shape"),
        (changed(flat=packed().flat[:-1]), "size"),
        (changed(flat=np.append(packed().flat, np.float32(0))), "size"),
        (changed(flat=packed().flat.reshape(3, 7)), "size"),
        (changed(flat=packed().flat.astype(np.float64)), "dtype"),
        (changed(dtype="fp16"), "dtype"),
        (changed(dtype="bf16"), "dtype"),
        (changed(flat=packed(seed=1).flat), "manifest"),
        (changed(version=1), "manifest"),
        (changed(kind="delta"), "manifest"),
        (changed(scales=[1.0] * (len(SHAPES) - 1)), "manifest"),
        (changed(scales=[1.0] * (len(SHAPES) - 1) + [2.0]), "manifest"),
        (changed(dtype="int8"), "dtype"),
        (changed(extra=1), "manifest"),
        (changed(names="backbone.w"), "manifest"),
    ],
)
def test_verify_refuses(bad, expected):
    assert reason(payload.verify, bad, SHAPES) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_verify_refuses_nan_and_infinity_whose_hash_is_right(value):
    flat = packed().flat.copy()
    flat[5] = value
    bad = payload.Payload(flat, payload.manifest_of(SHAPES, "fp32", flat))
    assert reason(payload.verify, bad, SHAPES) == "nonfinite"


@pytest.mark.parametrize("factor", [1e4, 1e-4, 0.0])
def test_an_absurd_norm_is_refused(factor):
    flat = packed().flat
    payload.check_norm(flat * np.float32(9), flat, 10.0)
    payload.check_norm(flat / np.float32(9), flat, 10.0)
    assert reason(payload.check_norm, flat * np.float32(factor), flat, 10.0) == "norm"


def test_verify_insists_on_the_agreed_dtype():
    assert reason(payload.verify, packed("fp16"), SHAPES, "fp32") == "dtype"


def test_npy_round_trip_and_every_truncation_is_refused():
    flat = packed().flat
    data = payload.to_npy(flat)
    assert np.array_equal(payload.from_npy(data), flat)
    assert np.array_equal(np.load(io.BytesIO(data), allow_pickle=False), flat)
    for length in range(len(data)):
        assert reason(payload.from_npy, data[:length]) == "size"
    assert reason(payload.from_npy, data + b"x") == "size"


def test_a_header_that_promises_terabytes_allocates_nothing():
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**12,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    assert reason(payload.from_npy, buffer.getvalue() + b"\0" * 64) == "size"


@pytest.mark.parametrize("text", [
    b"(" * 9000, b"[" * 9000, b"-" * 9000 + b"1", b"1+" * 4000 + b"1j", b"\'", b"\n  1\n 2", b"{[]: 1}",
    b"\0" * 64, b"\xff" * 64, b"",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",)}",
    b"{'descr': [('a', [('b', '<f4')] * 3)], 'fortran_order': False, 'shape': (1,)}",
])  # fmt: skip
@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_hostile_header_is_refused_like_a_torn_one(text, version):
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    data = b"\x93NUMPY" + bytes([version, 0]) + length + text + b"\0" * 4
    assert reason(payload.from_npy, data) == "size"


@pytest.mark.parametrize("array", [np.array([{}], dtype=object), np.ones(3), np.ones((2, 2), np.float32)])
def test_only_float_vectors_are_read_and_nothing_is_unpickled(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    assert reason(payload.from_npy, buffer.getvalue()) == "dtype"


def test_fingerprint_tells_architectures_apart():
    same = payload.fingerprint(dict(reversed(SHAPES.items())))
    assert payload.fingerprint(SHAPES) == same
    assert payload.fingerprint({**SHAPES, "backbone.w": (4, 3)}) != same
    assert payload.fingerprint({n: s for n, s in SHAPES.items() if n != "backbone.w"}) != same
