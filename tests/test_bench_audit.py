"""``benchmarks.audit``: canaries go a patient's way, faults are caught, and what is sound is not accused."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks import audit, one_step
from benchmarks.audit_runs import CLIP, SIZE, Contender, Patients, Run, gradient_run, input_run
from benchmarks.canaries import LOUD, GradientCanaries, InputCanaries, attacks, exact_run
from sparsecontrast.accounting import calibrate
from sparsecontrast.auditing import audit as audited
from sparsecontrast.auditing import ceiling

CLAIM, STEPS, CANARIES = 2.0, 5, 4096
SIGMA = calibrate(CLAIM, audit.DELTA, 0.5, STEPS)


@pytest.fixture(scope="module")
def patients():
    return Patients(4)


def bound(contender, patients, seed=0):
    seen = gradient_run(contender, patients, CANARIES, SIGMA, STEPS, seed)
    return audited(np.stack(list(seen.scores.values())), seen.included, audit.DELTA)


@pytest.mark.parametrize("seed", [0, 1])
def test_ours_stays_below_its_claim_and_is_audited_at_all(patients, seed):
    found = bound(audit.SOUND, patients, seed)
    assert 0.1 < found.epsilon <= CLAIM
    exact = audit.exact_bounds(0.5, SIGMA, STEPS, CANARIES, 40, seed)
    assert exact.min() - 0.1 < found.epsilon < exact.max() + 0.1


@pytest.mark.parametrize(
    "contender",
    [c for c in audit.GRADIENTS if c.noise < 0.5 or c.replayed or c.by_film],
    ids=lambda c: c.name,
)
def test_a_fault_is_refuted(patients, contender):
    assert bound(contender, patients).epsilon > CLAIM


@pytest.mark.parametrize("contender", [c for c in audit.GRADIENTS if c.noise == 0.5 or c.everyone])
def test_a_smaller_fault_is_no_exact_run(patients, contender):
    assert bound(contender, patients).epsilon > audit.exact_bounds(0.5, SIGMA, STEPS, CANARIES, 40, 0).max()


def run_of(patients, count=300, seed=0, **words):
    run = Run(Contender("", **words), patients, np.arange(count) % 3 > 0, SIGMA, seed)
    return run, GradientCanaries(run.parameters, count, run.others())


def summed(run, pieces):
    """The sum before noise, in clips, flat over the parameters the loss reaches."""
    run.engine.optimizer.clear()
    for piece in pieces:
        run.engine._accumulate(piece)
    parts = [(p, p.summed_grad) for p in run.parameters]
    found = torch.cat([torch.zeros(p.numel()) if s is None else s.flatten() for p, s in parts]) / CLIP
    run.engine.optimizer.clear()
    return found


@pytest.mark.parametrize("by_film", [False, True])
def test_a_gradient_canary_is_clipped_like_a_patient(patients, by_film):
    run, canaries = run_of(patients, films=3, by_film=by_film)
    drawn = np.repeat(np.array([3, 7, 8, 250]), 3)
    total = summed(run, canaries.pieces(drawn, np.arange(12) if by_film else drawn))
    wanted = np.zeros(300)
    wanted[[3, 7, 8, 250]] = 3 if by_film else 1
    np.testing.assert_allclose(canaries.read(total), wanted, rtol=1e-5)
    assert total.norm() == pytest.approx(
        2 * (3 if by_film else 1), rel=1e-5
    )  # four of them, nothing elsewhere
    assert LOUD > 3  # a film's share of it alone is clipped as well


def test_canaries_lie_where_others_reach_least(patients):
    run, canaries = run_of(patients)
    others = run.others()
    assert len(np.unique(canaries.places)) == 300
    assert np.abs(canaries.read(others)).max() <= np.sort(np.abs(others.numpy()))[300]
    assert others.norm() > CLIP


def test_a_step_releases_the_included_and_the_noise_that_was_told(patients):
    run, canaries = run_of(patients, count=4000, sample_rate=1.0)
    seen = np.stack([canaries.read(run.step(canaries)) for _ in range(2)])
    error = seen - run.included
    assert abs(error.std() / SIGMA - 1) < 5 / np.sqrt(2 * error.size)
    assert abs(error.mean()) < 5 * SIGMA / np.sqrt(error.size)
    assert abs(np.corrcoef(error)[0, 1]) < 5 / np.sqrt(4000)


def test_a_replayed_stream_repeats_its_noise(patients):
    run, canaries = run_of(patients, sample_rate=1.0, replayed=True)
    first, second = (canaries.read(run.step(canaries)) for _ in range(2))
    np.testing.assert_allclose(first, second, atol=0.05)  # others' gradients move a little
    assert first.std() > 1


def test_the_likelihood_ratio_is_that_of_two_mixtures():
    rng, q, sigma = np.random.default_rng(0), 0.3, 1.7
    seen = rng.standard_normal((3, 5)) * 2
    out = np.exp(-(seen**2) / (2 * sigma**2))
    hit = np.exp(-((seen - 1) ** 2) / (2 * sigma**2))
    scores = attacks(seen, q, sigma)
    np.testing.assert_allclose(scores["likelihood ratio"], np.log((q * hit + (1 - q) * out) / out).sum(0))
    np.testing.assert_allclose(scores["deviation over steps"], seen.std(0))
    ratio = attacks(seen, 1.0, sigma)["likelihood ratio"]
    np.testing.assert_allclose(ratio, np.log(hit / out).sum(0))


def test_an_exact_run_is_the_mechanism():
    coins = np.arange(40_000) % 2 == 0
    seen = exact_run(coins, 0.25, 1.5, 2, np.random.default_rng(0))
    assert seen[:, coins].mean() == pytest.approx(0.25, abs=0.03) and abs(seen[:, ~coins].mean()) < 0.03
    assert seen[:, ~coins].std() == pytest.approx(1.5, rel=0.03)


def test_gradients_of_input_canaries_by_autograd(patients):
    run, _ = run_of(patients)
    canaries = InputCanaries(3, SIZE, 0)
    found = canaries.gradients(run.engine, run.parameters)
    for row, piece in enumerate(canaries.pieces(np.array([i]), np.array([i])) for i in range(3)):
        wanted = torch.autograd.grad(run.engine.module(next(piece)).sum(), run.parameters)
        flat = torch.cat([w.flatten() for w in wanted])
        torch.testing.assert_close(found[row], flat / max(CLIP, float(flat.norm())), atol=1e-4, rtol=1e-3)


def test_the_estimate_is_the_conditional_mean():
    """Of Gaussian coins of the same mean and variance: by conditioning the joint distribution outright."""
    rng, q, sigma = np.random.default_rng(0), 0.5, 1.3
    g = torch.from_numpy(rng.standard_normal((4, 9)))
    x = torch.from_numpy(rng.standard_normal(9))
    mean, variance = q / 2, q / 2 * (1 - q / 2)
    seen = variance * g.T @ g + sigma**2 * torch.eye(9, dtype=g.dtype)
    wanted = variance * g @ torch.linalg.solve(seen, x - mean * g.sum(0))
    np.testing.assert_allclose(InputCanaries.estimate(g, x, q, sigma), wanted.numpy(), rtol=1e-9)


def test_images_are_audited(patients):
    sigma, found = calibrate(1.0, audit.DELTA, 0.5, 6), {}
    for noise in (1.0, 0.01):
        seen = input_run(Contender("", noise=noise), patients, 96, sigma, 6, 0)
        scores = np.stack(list(seen.scores.values()))
        found[noise] = audited(scores, seen.included, audit.DELTA, shares=((0.2, 0.2),)).epsilon
        assert seen.learned is not None and seen.learned.std() > 0
    assert found[1.0] <= 1 < found[0.01]


@pytest.fixture(scope="module")
def steps():
    sigma = calibrate(CLAIM, audit.DELTA, 1.0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_step, "BATCH", 16)
        return {make: make(sigma, 0) for make in (one_step.naive, one_step.ours)}, sigma


def test_contrast_over_the_batch_is_refuted_in_one_step_and_ours_is_not(steps):
    naive, ours = steps[0].values()
    assert naive.change > 4 and 0.99 < ours.change <= 1 + 1e-6
    scores, coins = naive.play(300, 0)
    assert audited(scores, coins, audit.DELTA).epsilon > CLAIM
    scores, coins = ours.play(100, 0)
    assert audited(scores, coins, audit.DELTA).epsilon <= CLAIM < ceiling(100, audit.DELTA)


def test_the_noise_of_a_played_step_is_the_mechanisms_own(steps):
    for step in steps[0].values():
        noise = (step.noised(step.larger) - step.larger).double()
        told = noise[noise != -step.larger]  # what the loss does not reach gets no noise
        assert len(told) > 4000 and abs(float(told.std()) / steps[1] - 1) < 5 / np.sqrt(2 * len(told))


@pytest.fixture
def small(monkeypatch):
    scale = dataclasses.replace(audit.QUICK, patients=2, canaries=1024, steps=5, images=24, image_steps=1,
                                trials=40, exact=2)  # fmt: skip
    monkeypatch.setattr(audit, "QUICK", scale)
    monkeypatch.setattr(one_step, "BATCH", 6)
    keep = [c for c in audit.GRADIENTS if c == audit.SOUND or c.noise == 0]
    monkeypatch.setattr(audit, "GRADIENTS", keep)


def test_the_quick_benchmark_writes_its_rows(small, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert audit.main(["--quick", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["command"] == "python -m benchmarks.audit --quick --seed 0"
    rows = {(row["setting"], row["contender"]): row for row in result["rows"]}
    assert len(rows) == 2 + 4 + 2
    forgotten = rows["gradients", "noise forgotten"]
    assert forgotten["verdict"] == "refuted" and forgotten["lower_bound"] <= forgotten["ceiling"]
    for row in rows.values():
        assert row["claim"] == pytest.approx(2, rel=0.01) and 0 <= row["correct"] <= row["guesses"]
        assert not row["sound"] or row["lower_bound"] <= row["claim"]
    assert "Lower bounds of epsilon" in capsys.readouterr().out


def test_it_fails_where_what_is_sound_is_refuted(small, monkeypatch):
    monkeypatch.setattr(audit, "GRADIENTS", [Contender("ours, broken", sound=True, noise=0.0)])
    monkeypatch.setattr(audit, "IMAGES", ())
    monkeypatch.setattr(audit, "ONE_STEP", {})
    assert audit.main(["--quick"]) == 1
