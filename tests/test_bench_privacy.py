"""``benchmarks.privacy``: its steps do what they are timed for, and Opacus' rows are the right gradients."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import privacy
from benchmarks.contenders import Model
from benchmarks.memory import peak_of
from benchmarks.private_arms import OURS, STAGES, TIMM, Arm, Raw, _raw, build_step
from sparsecontrast.coupling import noise_batch

TOY = (("backbone.depth", 1), ("backbone.patch_size", 8), ("method.projection_hidden", 16))
MODEL = Model("vit_tiny", 48, TOY)
CNN = Model("convnext_atto", 96, (("backbone.tiles", 3),))
FEW = replace(privacy.QUICK, memory=False)


def toy_step(arm, model=MODEL, images=4):
    step = build_step(arm, model, images)
    return step, step.module


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_arm_trains_and_its_stages_are_those_of_its_kind(precision):
    for arm in privacy.arms(MODEL, precision, FEW):
        step, module = toy_step(arm)
        before = [p.detach().clone() for p in module.parameters() if p.requires_grad]
        step()
        after = [p for p in module.parameters() if p.requires_grad]
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert sum(moved) > len(moved) // 2, arm
        spent = {stage: seconds[0] for stage, seconds in step.spent.items()}
        assert set(spent) == set(STAGES) and spent["forward_backward"] > 0 and spent["optimizer"] > 0
        assert (spent["noise"] > 0) == arm.private
        if arm.method == OURS:
            assert (spent["clip"] > 0) == arm.private


def test_arms_of_a_share_compute_that_share():
    seen = {}
    for arm in privacy.arms(MODEL, "fp32", FEW):
        step, module = toy_step(arm)
        vit = module.backbone.vit if arm.method == OURS else module.network
        counts = seen[arm] = []
        vit.blocks[0].register_forward_pre_hook(
            lambda _, given, counts=counts: counts.append(given[0].shape[1] - 1)
        )
        step()
        patches = vit.patch_embed.num_patches
        limit = arm.keep * patches
        assert counts and max(counts) <= limit + 0.5, arm
        if arm.method != OURS or arm.keep == 1:
            assert counts[0] == round(limit), arm
        else:
            assert counts[0] > 0.7 * limit, arm


@pytest.mark.parametrize("way", ["opacus_hooks", "opacus_frozen"])
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_plain_opacus_is_given_a_model_whose_rows_it_gets_right(way, keep):
    from opacus.grad_sample import GradSampleModule

    module = _raw(Arm(way, keep, private=True), MODEL).train()
    module.backbone = type("Sized", (), {"img_size": 48})
    batch = noise_batch(module, 3)
    trained = [p for p in module.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(module(batch)[1], trained)
    hooked = GradSampleModule(module, loss_reduction="sum")
    with pytest.warns(UserWarning):
        hooked(batch).sum().backward()
    for parameter, gradient in zip(trained, wanted, strict=True):
        torch.testing.assert_close(parameter.grad_sample[1], gradient, atol=1e-5, rtol=1e-3)


def test_raw_timm_compares_the_same_places_of_both_views():
    module = _raw(Arm(TIMM, 0.5), MODEL).eval()
    module.backbone = type("Sized", (), {"img_size": 48})
    batch = noise_batch(module, 2)
    same = replace(batch, second=batch.first)
    assert (module(same) < module(batch)).all()
    assert isinstance(module, Raw) and module.stacked
    module.stacked = False
    torch.testing.assert_close(module(batch), module(replace(batch)), atol=1e-5, rtol=1e-5)


def test_pieces_and_films_are_the_same_images_and_patients_stay_whole():
    seen = {}
    for arm in (Arm(OURS, 0.5, True), Arm(OURS, 0.5, True, pieces=2), Arm(OURS, 0.5, True, films=2)):
        step, module = toy_step(arm)
        taken = seen[arm] = []
        run = module.forward
        module.forward = lambda batch, run=run, taken=taken: taken.append(batch) or run(batch)
        step()
    whole, pieces, films = seen.values()
    assert [len(b.first) for b in pieces] == [2, 2] and len(whole) == len(films) == 1
    assert torch.equal(torch.cat([b.first for b in pieces]), whole[0].first)
    assert films[0].patients.tolist() == [0, 0, 1, 1]


def test_a_cnn_has_its_arms_and_no_opacus():
    found = privacy.arms(CNN, "fp32", FEW)
    assert {arm.method for arm in found} == {OURS, TIMM}
    for arm in (found[0], Arm(OURS, 0.5, True)):
        toy_step(arm, CNN, 2)[0]()


def test_the_peak_holds_the_rows_of_a_private_step():
    peaks = [peak_of(partial(build_step, Arm(OURS, 0.5, private), MODEL, 32)) for private in (False, True)]
    weights = sum(p.numel() for p in _raw(Arm(TIMM), MODEL).parameters()) * 4 / 2**20
    assert peaks[1] - peaks[0] > 0.5 * 32 * weights


def test_the_quick_benchmark_writes_whole_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "_changes", lambda name, size: TOY)
    file = tmp_path / "privacy.json"
    privacy.main(["--quick", "--size", "48", "--no-memory", "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["command"] == "python -m benchmarks.privacy --quick --models vit_tiny --size 48 --no-memory"
    assert {row["precision"] for row in result["rows"]} == {"fp32", "bf16"}
    for row in result["rows"]:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, int | float))
        assert 0 < row["of_dense_low"] <= row["of_dense"] <= row["of_dense_high"]
        stages = sum(row[f"{stage}_ms"] for stage in STAGES)
        assert stages == pytest.approx(row["cost_ms"], rel=0.8)
        assert ("of_own" in row) == (row["private"] and row["method"] == OURS)
        assert ("opacus_ratio" in row) == ("of_own" in row and row["keep"] == 0.5)
    fastest = [r for r in result["rows"] if r["precision"] == "fp32" and r["of_dense"] == 1]
    assert len(fastest) == 1 and not fastest[0]["private"]
