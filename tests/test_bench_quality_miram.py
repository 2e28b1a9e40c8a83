"""``benchmarks.quality --method miram``: its arms, the rival, and the table that pairs them."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from benchmarks import quality
from benchmarks import quality_arms as qa
from benchmarks import quality_miram as qm
from benchmarks.rivals import moco_v3
from sparsecontrast.methods.method import Batch

TINY = qm.QUICK
ARMS = qm.arms(TINY)


def films(n=12):
    return np.random.Generator(np.random.PCG64(0)).integers(0, 256, (n, 32, 32), dtype=np.uint8)


@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_trains_and_embeds(name):
    trained = qm.train_arm(ARMS[name], TINY, films(), np.arange(8), 0, 2)
    assert set(trained.features) == {"own"} and trained.features["own"].shape == (12, 192)
    assert np.isfinite(trained.features["own"]).all() and trained.facts["steps"] == 2
    again = qm.train_arm(ARMS[name], TINY, films(), np.arange(8), 0, 2)
    assert np.array_equal(again.features["own"], trained.features["own"])
    assert not np.allclose(trained.features["own"], qm.untrained(TINY, 0, films()))


def test_arms_of_a_seed_start_from_one_encoder_and_see_the_same_films():
    works = {name: qm.build_arm(arm, TINY, 3, 2) for name, arm in ARMS.items()}
    first = works["mae"].module.backbone.state_dict()
    for name, work in works.items():
        for key, tensor in work.module.backbone.state_dict().items():
            if key != "coarse":  # of other methods
                assert torch.equal(tensor, first[key]), (name, key)
    other = qm.build_arm(ARMS["mae"], TINY, 4, 2).module.backbone.state_dict()
    assert not torch.equal(other["vit.pos_embed"], first["vit.pos_embed"])
    seen = [qm._batch(arm, films(40), np.arange(40), TINY, 0, 5) for arm in ARMS.values()]
    assert all(b.first.shape == seen[0].first.shape for b in seen)
    assert sum(b.second is b.first for b in seen) == len(seen) - 2  # contrast alone makes two views


def test_what_the_arms_reconstruct():
    modules = {n: qm.build_arm(a, TINY, 0, 2).module for n, a in ARMS.items() if not a.contrast}
    assert modules["mae"].high_decoder is None and modules["mae_low"].high_decoder is None
    assert (
        modules["mae"].low_decoder.head.out_features == 4 * modules["mae_low"].low_decoder.head.out_features
    )
    kinds = {
        n: type(m.high_decoder.blocks[0].attn.attention).__name__
        for n, m in modules.items()
        if m.high_decoder
    }
    assert kinds == {
        "miram": "Nystromformer", "miram_linformer": "Linformer", "miram_performer": "Performer",
        "miram_softmax": "SoftmaxAttention", "miram_at_equal_time": "Nystromformer",
            "miram_some": "SoftmaxAttention", "miram_some_at_equal_time": "SoftmaxAttention",
    }  # fmt: skip


def moco(steps=4):
    return qm.build_arm(ARMS["moco_v3"], TINY, 0, steps).module


def views(n=6, step=0):
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, n, 1, 32, 32, generator=g)
    return Batch(first, second, torch.arange(n), g, step)


def test_contrast_of_moco_is_infonce_by_hand():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 7, generator=g)
    found = moco_v3.contrast(q, k)
    for i in range(5):
        cosine = [float(torch.cosine_similarity(q[i], k[j], 0)) / 0.2 for j in range(5)]
        wanted = 2 * 0.2 * (math.log(sum(map(math.exp, cosine))) - cosine[i])
        assert float(found[i]) == pytest.approx(wanted, rel=1e-4)


def test_the_average_follows_and_gets_no_gradient():
    m = moco()
    before = copy.deepcopy(m.average)
    loss = m(views())
    assert loss.shape == (6,)
    loss.mean().backward()
    assert all(p.grad is None for p in m.average.parameters())
    assert m.backbone.vit.patch_embed.proj.weight.grad is None  # frozen
    with torch.no_grad():
        for p in m.backbone.parameters():
            p.add_(1.0)
    m.after_step()
    for mean, old, new in zip(m.average[0].parameters(), before[0].parameters(), m.backbone.parameters(),
                              strict=True):  # fmt: skip
        torch.testing.assert_close(mean, old + 0.01 * (new - old), atol=1e-6, rtol=1e-5)


def test_the_momentum_rises_to_one():
    found = [moco_v3.momentum(step, 10) for step in range(11)]
    assert found[0] == pytest.approx(0.99) and found[-1] == 1 and found == sorted(found)


def test_the_quick_command_trains_scores_and_is_continued(tmp_path, capsys):
    words = ["--method", "miram", "--quick", "--out", str(tmp_path), "--arms", "miram"]
    args = quality._arguments(words)
    assert args.data == ["phantoms"] and len(args.seeds) == 2
    for job in quality._jobs(args, TINY):
        quality.train_one(args, TINY, *job)
    quality.main([*words, "--json", str(tmp_path / "out.json")])  # nothing is left to train
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["name"] == "quality-miram" and "--method miram" in result["command"]
    with pytest.raises(SystemExit, match="another protocol"):  # other steps are another run
        quality.main([*words, "--steps", "3"])
    macro = {r["arm"]: r for r in result["rows"] if (r["task"], r["label"]) == ("all findings", "macro")}
    assert set(macro) == {"mae", "miram", "pixels_16x16", "random_init"}
    assert macro["mae"]["minus_mae"] == 0 and len(macro["miram"]["seeds"]) == 2
    gap = np.mean(macro["miram"]["seeds"]) - np.mean(macro["mae"]["seeds"])
    assert macro["mae"]["ours_minus"] == pytest.approx(gap, abs=2e-4)
    assert macro["miram"]["minus_mae_low"] <= macro["miram"]["minus_mae"] <= macro["miram"]["minus_mae_high"]


def test_each_data_set_has_its_questions_and_its_folder():
    args = quality._arguments(["--method", "miram", "--root", "/films", "--mammograms", "/breasts"])
    assert args.data == ["phantoms", "guangzhou", "mias"] and args.out == "outputs/quality-miram"
    from sparsecontrast.config import compose

    asked = {d: [t["name"] for t in compose(quality._tasks(args, d)).evaluation.tasks] for d in args.data}
    assert asked["phantoms"] == [] and asked["guangzhou"] == [
        "bacterial against viral", "pneumonia against normal",
    ]  # fmt: skip
    assert asked["mias"] == ["normal or benign or malignant", "malignant against benign"]


def test_equal_time_is_that_of_the_masked_autoencoder():
    args = quality._arguments(
        ["--method", "miram", "--arms", "moco_v3_at_equal_time", "--seeds", "0", "--data", "phantoms"]
    )
    order = [name for _, _, name in quality._jobs(args, TINY)]
    assert order == ["mae", "moco_v3", "moco_v3_at_equal_time"]
    mae, moco_steps = (qa.Trained({}, {"steps": 9.0, "train_seconds": s}) for s in (2.0, 6.0))
    assert qa.equal_time_steps(mae, moco_steps) == 3
