import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import quality
from benchmarks import quality_arms as qa
from benchmarks.films import labels_by_size
from sparsecontrast.data.dataset import Dataset

TINY = quality.QUICK
ARMS = qa.arms(TINY)


def films(n=12):
    return np.random.Generator(np.random.PCG64(0)).integers(0, 256, (n, 32, 32), dtype=np.uint8)


@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_trains_and_answers_in_each_of_its_modes(name):
    trained = qa.train_arm(ARMS[name], TINY, films(), np.arange(8), 0, 2)
    assert set(trained.features) == set(ARMS[name].modes)
    assert all(f.shape[0] == 12 and np.isfinite(f).all() for f in trained.features.values())
    assert trained.facts["steps"] == 2
    assert trained.facts["chance_loss"] == pytest.approx(math.log(8))
    if "dense" in trained.features:
        assert not np.allclose(trained.features["own"], trained.features["dense"])


def test_a_seed_gives_the_same_features_and_another_one_others(tmp_path):
    one, two, other = (
        qa.train_arm(ARMS["ours"], TINY, films(), np.arange(8), seed, 2).features["own"] for seed in (0, 0, 1)
    )
    assert np.array_equal(one, two) and not np.allclose(one, other)


def test_arms_of_a_seed_start_from_equal_weights():
    dense, ours = (qa.build_arm(ARMS[name], TINY, 3).module for name in ("dense", "ours"))
    for name, value in dense.encoder.network.state_dict().items():
        assert torch.equal(value, ours.backbone.vit.state_dict()[name]), name


@pytest.mark.parametrize("name", ["ours", "random", "attention", "patch_dropout", "evit"])
def test_arms_of_a_seed_see_the_same_views_at_every_step(name, monkeypatch):
    seen, real = [], qa._batch

    def record(*args):
        batch = real(*args)
        seen.append(torch.cat([batch.first, batch.second]))
        return batch

    monkeypatch.setattr(qa, "_batch", record)
    for one in ("dense", name):
        qa.train_arm(ARMS[one], TINY, films(), np.arange(12), 0, 3)
    assert len(seen) == 6 and not torch.equal(seen[0], seen[1])
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))


def test_no_low_resolution_rival_computes_fewer_tokens_than_ours():
    protocol = qa.Protocol()
    side = protocol.size // protocol.patch
    rival = qa.arms(protocol)["low_resolution"].contender.keep * side**2
    work = qa.build_arm(qa.arms(protocol)["ours"], protocol, 0)
    m = work.module.backbone.kept_cells(protocol.keep)
    assert rival >= work.module.backbone.share(m) * side**2


def test_what_is_kept_is_read_again(tmp_path):
    trained = qa.train_arm(ARMS["dense"], TINY, films(), np.arange(8), 0, 2)
    qa.save(trained, tmp_path / "a" / "dense.npz")
    found = qa.load(tmp_path / "a" / "dense.npz")
    assert found.facts == trained.facts
    np.testing.assert_allclose(found.features["own"], trained.features["own"], atol=2e-3)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["dense.npz"]


def test_every_rival_of_the_protocol_ends_with_the_share_that_is_kept():
    """EViT's fused token, CLS and three roundings come on top; DynamicViT has none of them but CLS."""
    protocol = qa.Protocol()
    side = protocol.size // protocol.patch
    for name in ("evit", "tome", "patch_dropout"):
        work, seen = qa.build_arm(qa.arms(protocol)[name], protocol, 0), []
        work.module.encoder.network.norm.register_forward_pre_hook(
            lambda _, a, s=seen: s.append(a[0].shape[1])
        )
        work.infer(torch.zeros(1, 1, protocol.size, protocol.size))
        assert protocol.keep * side**2 - 1 <= seen[0] - 1 <= protocol.keep * side**2 + 5, name


def test_runs_of_the_former_evit_are_not_reused_and_those_of_other_arms_are(tmp_path):
    args = quality._arguments(["--quick", "--out", str(tmp_path)])
    for name in ("dense", "evit"):
        former = qa.Trained({"own": np.zeros((1, 1))}, {"steps": 2.0}, f"{TINY} {ARMS[name]}")
        qa.save(former, quality._file(args, "phantoms", "0", name))
    assert quality._trained(args, TINY, ("phantoms", "0", "dense"))
    with pytest.raises(SystemExit, match="delete it"):
        quality._trained(args, TINY, ("phantoms", "0", "evit"))


def test_a_run_of_another_protocol_is_never_taken_for_this_one(tmp_path):
    args = quality._arguments(["--quick", "--out", str(tmp_path)])
    job = ("phantoms", "0", "dense")
    assert not quality._trained(args, TINY, job)
    quality.train_one(args, TINY, *job)
    assert quality._trained(args, TINY, job)
    with pytest.raises(SystemExit, match="another protocol"):
        quality._trained(args, dataclasses.replace(TINY, steps=3), job)


def test_the_table_pairs_every_arm_with_dense(tmp_path):
    words = ["--quick", "--out", str(tmp_path), "--arms", "dense", "ours"]
    args = quality._arguments(words)
    for job in quality._jobs(args, TINY):
        quality.train_one(args, TINY, *job)
    rows = quality.score(args, TINY, "phantoms")
    macro = {r["arm"]: r for r in rows if (r["task"], r["label"]) == ("all findings", "macro")}
    assert {r["label"] for r in rows if r["task"] == "by size"} >= {"lesion under 2 patches", "larger lesion"}
    asked = {"ours", "ours, asked dense", "ours, asked int8"}
    assert set(macro) == {"dense", *asked, "random_init", "pixels_16x16"}
    assert macro["dense"]["minus_dense"] == macro["dense"]["seeds_low"] == 0
    ours, dense = macro["ours"], macro["dense"]
    assert ours["minus_dense"] == pytest.approx(np.mean(ours["seeds"]) - np.mean(dense["seeds"]), abs=2e-4)
    assert len(ours["seeds"]) == 2 and ours["seeds_low"] <= ours["minus_dense"] <= ours["seeds_high"]
    assert "minus_dense" not in macro["pixels_16x16"]  # one model for all seeds
    assert macro["dense"]["ours_minus"] == pytest.approx(ours["minus_dense"])
    assert macro["dense"]["ours_minus_low"] == pytest.approx(ours["minus_dense_low"], abs=1e-4)


def test_equal_time_is_the_dense_arms_at_the_cost_of_a_step():
    dense, same = (qa.Trained({}, {"steps": 300.0, "train_seconds": s}) for s in (160.0, 72.0))
    assert qa.equal_time_steps(dense, same) == 667
    args = quality._arguments(
        ["--arms", "low_resolution_at_equal_time", "--seeds", "0", "--data", "phantoms"]
    )
    order = [name for _, _, name in quality._jobs(args, TINY)]
    assert order == ["dense", "low_resolution", "low_resolution_at_equal_time"]


def test_lesions_are_asked_for_by_size():
    boxes = [np.array(b, dtype=np.float32).reshape(-1, 4) for b in ([], [[0, 0, 9, 9]], [[0, 0, 9, 9]] * 2)]
    boxes[2][1, 2:] = 30
    labels = [[], ["nodule"], ["nodule", "mass"]]
    frame = pd.DataFrame(index=range(3))
    found = labels_by_size(Dataset(np.zeros((3, 1, 1)), frame, boxes, labels, frame), 8)
    np.testing.assert_array_equal(found["lesion under 2 patches"], [0, 1, np.nan])
    np.testing.assert_array_equal(found["larger lesion"], [0, np.nan, 1])


def test_interval_of_students_t():
    low, high = quality._t_interval([0.01, 0.02, 0.03, 0.02, 0.02])
    assert (low, high) == pytest.approx((0.02 - 0.00878, 0.02 + 0.00878), abs=1e-5)
    assert quality._t_interval([0.1]) == (None, None)


CNN = dataclasses.replace(qa.PROTOCOLS["cnn"], size=64, steps=2, batch=4)


@pytest.mark.parametrize("name", list(qa.arms(CNN)))
def test_every_arm_of_a_cnn_trains_and_answers(name):
    images = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (6, 64, 64), dtype=np.uint8)
    trained = qa.train_arm(qa.arms(CNN)[name], CNN, images, np.arange(4), 0, 1)
    assert all(f.shape[0] == 6 and np.isfinite(f).all() for f in trained.features.values())


def test_a_cnn_is_compared_with_what_a_cnn_can_do_and_no_smaller_image_costs_less_than_ours():
    protocol = qa.PROTOCOLS["cnn"]
    known = qa.arms(protocol)
    assert {"dense", "ours", "low_resolution", "random", "ours_at_equal_time"} <= set(known)
    assert not {"evit", "tome", "patch_dropout", "all_coarse", "dynamic_vit"} & set(known)
    assert known["low_resolution"].contender.keep >= protocol.keep


def test_protocols_of_a_gpu_are_of_the_networks_and_the_size_of_the_bars():
    for name, backbone in (("gpu", "vit_tiny"), ("gpu_small", "vit_small")):
        protocol = qa.PROTOCOLS[name]
        assert (protocol.backbone, protocol.size, protocol.depth) == (backbone, 224, None)
        assert protocol.keep <= qa.LEAN  # a share at which the bars of speed were measured
        assert set(qa.arms(protocol)) == set(qa.arms(qa.PROTOCOLS["cpu"]))


def test_a_method_without_a_protocol_says_so(capsys):
    with pytest.raises(SystemExit):
        quality.main(["--method", "miram", "--protocol", "cnn"])
    assert "no protocol cnn" in capsys.readouterr().err
