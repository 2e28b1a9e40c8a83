"""A2A: what it gains, that noise stays noise, and that every piece does what its docstring says."""

import math

import numpy as np
import pytest
import torch

from sparsecontrast.errors import ConfigError, DataError, MethodError
from sparsecontrast.methods import a2a
from sparsecontrast.methods.a2a import A2AConfig, denoise, look_features, look_likelihood, swap_loss
from sparsecontrast.models.twin_pyramid import build_twin_pyramid
from sparsecontrast.ultrasound.looks import to_safe_range
from sparsecontrast.ultrasound.metrics import bias_db, cnr, gcnr, snr_db, speckle_snr
from tests.acquisitions import acquisition, disc, field

TINY = A2AConfig(steps=60, anatomy=(6, 8, 8), noise=(6, 8, 8), crop=48, phases=2)
SHORT = A2AConfig(steps=3, anatomy=(4, 4), noise=(4, 6), crop=32, phases=2, check_every=1)


def network(seed=0, config=TINY):
    generator = torch.Generator().manual_seed(seed)
    net = build_twin_pyramid(1 + len(a2a.SCALES), config.anatomy, config.noise, generator)
    torch.nn.init.normal_(net.head.weight, generator=generator)  # as it starts it would answer nothing
    return net


@pytest.fixture(scope="module")
def noisy():
    images, clean = acquisition(sigma=1.2)
    return images, clean.mean(0), denoise(images, TINY)


def test_contrast_gains_over_plain_compounding_and_the_mean_stays(noisy):
    images, clean, found = noisy
    inside, outside = disc(radius=12), ~disc(radius=17)
    compound = np.abs(images.mean(0))
    before, after = (gcnr(i[inside], i[outside]) for i in (compound, found.image))
    assert after > before + 0.1
    assert cnr(found.image[inside], found.image[outside]) > 1.15 * cnr(compound[inside], compound[outside])
    assert speckle_snr(found.anatomy[outside]) > 1.3 * speckle_snr(compound[outside])
    assert abs(bias_db(found.image[outside], clean[outside])) < 1
    assert bias_db(found.image[inside], clean[outside]) < bias_db(compound[inside], clean[outside]) - 4


def test_the_coherent_image_is_nearer_to_the_noise_free_compound(noisy):
    images, clean, found = noisy
    assert snr_db(found.coherent, clean) > snr_db(images.mean(0), clean) + 0.7
    turn = found.coherent * images.mean(0).conj()  # it weakens pixels, and never turns them
    assert np.abs(turn.imag).max() < 1e-5 * np.abs(turn).max()
    assert (np.abs(found.coherent) <= np.abs(found.compound) * (1 + 1e-6)).all()


@pytest.mark.parametrize("count", [2, 6])
def test_pure_noise_gives_no_structure(count):
    rng = np.random.default_rng(count)
    noise = np.stack([field(rng, (64, 64), 0.6) for _ in range(count)]).astype(np.complex64)
    found = denoise(noise, TINY)
    inside, outside = disc(radius=12), ~disc(radius=17)
    compound = np.abs(found.compound)
    # next to the noise it is dark, everywhere as dark, and nothing looks like a lesion
    assert np.median(found.anatomy) < 0.5 * found.noise_level
    assert np.quantile(found.anatomy, 0.99) < found.noise_level
    assert abs(found.anatomy[inside].mean() - found.anatomy[outside].mean()) < 0.1 * compound.mean()
    # and so is the image that is shown, which keeps a share of the speckle
    assert np.median(found.image) < 0.3 * found.noise_level
    assert np.sqrt((found.image**2).mean()) < 0.5 * found.noise_level
    assert abs(found.image[inside].mean() - found.image[outside].mean()) < 0.1 * compound.mean()
    assert gcnr(found.image[inside], found.image[outside]) < 0.3


def test_same_seed_same_bits_and_no_global_generator_is_touched():
    images, _ = acquisition(count=4)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = denoise(images, SHORT), denoise(images, SHORT)
    assert torch.equal(before, torch.get_rng_state())
    for name in ("image", "anatomy", "coherent", "noise"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert first.history == again.history
    other = denoise(images, a2a.with_changes(SHORT, [("seed", 1)]))
    assert not np.array_equal(first.image, other.image)


def test_the_unit_of_the_input_is_the_unit_of_the_output():
    images, _ = acquisition(count=4)
    one, four = denoise(images, SHORT), denoise(4 * images, SHORT)
    np.testing.assert_allclose(four.image, 4 * one.image, rtol=1e-4)
    assert four.noise_level == pytest.approx(4 * one.noise_level, rel=1e-5)


@pytest.mark.parametrize("power", [-80, -45, 0, 45, 80, 97])
def test_any_amplitude_gives_the_same_image_in_its_own_unit(power):
    """A power of two changes no digit: within the safe range, beyond it, and where squares would overflow."""
    images, _ = acquisition(count=4)
    one, other = denoise(images, SHORT), denoise((images * 2.0**power).astype(np.complex64), SHORT)
    for name in ("image", "anatomy", "coherent", "noise"):
        np.testing.assert_allclose(
            getattr(other, name) / 2.0**power, getattr(one, name), rtol=1e-4, atol=1e-6
        )
    assert other.noise_level / 2.0**power == pytest.approx(one.noise_level, rel=1e-4)


def test_usual_amplitudes_are_not_touched():
    images, _ = acquisition(count=4)
    for scale in (1e-9, 1.0, 3e4):
        same = (scale * images).astype(np.complex64)
        found, unit = to_safe_range(same)
        assert found is same and unit == 1


def test_an_image_that_is_not_finite_is_refused(monkeypatch):
    monkeypatch.setattr(a2a, "noise_map", lambda apertures: np.full(apertures.shape[1:], np.nan))
    with pytest.raises(MethodError, match="noise is not finite"):
        denoise(acquisition(count=4)[0], SHORT)


def test_speckle_goes_from_the_anatomy_to_the_coherent_image():
    images, _ = acquisition(count=4)
    none = denoise(images, a2a.with_changes(SHORT, [("speckle", 0.0)]))
    whole = denoise(images, a2a.with_changes(SHORT, [("speckle", 1.0)]))
    np.testing.assert_allclose(none.image, none.anatomy)
    np.testing.assert_allclose(whole.image, np.abs(whole.coherent), rtol=1e-6)


def test_the_likelihood_is_best_at_the_mean_power():
    look = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 1.7
    powers = torch.linspace(1, 12, 200)
    scores = torch.stack([look_likelihood(torch.full_like(look, math.log(p)), look) for p in powers])
    assert powers[scores.argmin()] == pytest.approx(2 * float((look**2).mean()), abs=0.06)


def test_the_loss_equals_one_written_out():
    config = a2a.with_changes(TINY, [("align", 0.3), ("noise_weight", 0.7), ("decorrelate", 0.2)])
    net, generator = network(), torch.Generator().manual_seed(1)
    seen, hidden = torch.randn(2, 3, 32, 24, generator=generator)
    codes, bases = [], []
    for look in seen:
        features, base = look_features(look[None])
        codes.append(net.anatomy(features))
        bases.append(base)
    nll = [
        look_likelihood(bases[0] + net.decode(codes[0]), hidden[1][None]),
        look_likelihood(bases[1] + net.decode(codes[1]), hidden[0][None]),
        look_likelihood(
            (bases[0] + bases[1]) / 2
            + net.decode([(a + b) / 2 for a, b in zip(codes[0], codes[1], strict=True)]),
            hidden[2][None],
        ),
        look_likelihood(bases[2] + net.decode(codes[2]), hidden[2][None]),
    ]
    align = sum(
        1 - torch.cosine_similarity(a, b, dim=1, eps=1e-6).mean()
        for a, b in zip(codes[0], codes[1], strict=True)
    )
    expected = sum(nll) / 4 + 0.3 * align
    torch.testing.assert_close(swap_loss(net, seen, hidden, config, False), expected, rtol=1e-4, atol=0)
    noise = [net.noise(look_features(look[None])[0]) for look in hidden[:2]]
    strange = 0.0
    for i, j in ((0, 1), (1, 0)):
        drawn = bases[i] + net.decode(codes[i], noise[j])
        logs = torch.log(2 * hidden[j] ** 2 + 1e-6 * torch.exp(bases[i]))
        strange = strange + (drawn - logs).abs().mean() / 2
    same = sum(
        torch.cosine_similarity(a, b, dim=1, eps=1e-6).mean() ** 2 for a, b in zip(*noise, strict=True)
    )
    expected = expected + 0.7 * (strange + 0.2 * same)
    torch.testing.assert_close(swap_loss(net, seen, hidden, config, True), expected, rtol=1e-4, atol=0)


def test_the_noise_part_leaves_the_anatomy_encoder_alone():
    net, generator = network(), torch.Generator().manual_seed(1)
    seen, hidden = torch.randn(2, 3, 32, 24, generator=generator)
    gradients = []
    for with_noise in (False, True):
        net.zero_grad()
        swap_loss(net, seen, hidden, TINY, with_noise).backward()
        gradients.append([p.grad.clone() for p in net.anatomy.parameters()])
        assert all((p.grad is not None) == with_noise for p in net.noise.parameters())
        net.noise.zero_grad(set_to_none=True)
    for without, with_it in zip(*gradients, strict=True):
        torch.testing.assert_close(without, with_it)


def test_no_noise_code_is_the_noise_code_zero_and_odd_sizes_pass():
    net = network()
    codes = net.anatomy(torch.randn(1, 5, 37, 29))
    assert [tuple(c.shape[-2:]) for c in codes] == [(37, 29), (19, 15), (10, 8)]
    zeros = [torch.zeros(1, n, *c.shape[-2:]) for n, c in zip(TINY.noise, codes, strict=True)]
    torch.testing.assert_close(net.decode(codes, zeros), net.decode(codes))
    ones = [torch.ones_like(z) for z in zeros]
    assert not torch.allclose(net.decode(codes, ones), net.decode(codes))


def test_the_features_do_not_know_the_scale():
    look = torch.randn(1, 40, 40, generator=torch.Generator().manual_seed(2))
    (features, base), (again, louder) = look_features(look), look_features(1000 * look)
    torch.testing.assert_close(features, again, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(louder - base, torch.full_like(base, 2 * math.log(1000)), atol=1e-4, rtol=0)


def test_groups_split_the_apertures_and_the_two_looks_stand_at_a_right_angle():
    looks = torch.from_numpy(acquisition(count=5)[0])
    seen, hidden = a2a._draw_swap(looks, 64, torch.Generator().manual_seed(3))
    whole = torch.complex(seen, hidden)
    # the groups have 2 and 3 of the 5 apertures, turned and perhaps mirrored like the compound
    torch.testing.assert_close((2 * whole[0] + 3 * whole[1]) / 5, whole[2], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(whole[2].abs().sum(), looks.mean(0).abs().sum(), atol=1e-2, rtol=1e-4)


def test_training_ends_when_the_held_out_aperture_stops_gaining(monkeypatch):
    scores, states = iter([3.0, 1.0, 2.0, 1.5, 1.2, 0.0]), []

    def score(net, kept, held):
        states.append({k: v.clone() for k, v in net.state_dict().items()})
        assert len(kept) == 5
        return next(scores)

    monkeypatch.setattr(a2a, "_held_out_score", score)
    config = a2a.with_changes(SHORT, [("steps", 40), ("patience", 3)])
    looks = torch.from_numpy(acquisition(count=6)[0])
    trained = a2a._train(looks, config, None)
    assert trained.steps == 5
    for name, value in trained.network.state_dict().items():
        assert torch.equal(value, states[1][name])


def test_the_held_out_score_is_least_where_the_power_is_right(monkeypatch):
    """-2 log likelihood of the aperture: log p + |x|^2 / p at the factor of p that makes it likeliest."""
    generator = torch.Generator().manual_seed(4)
    power = torch.where(torch.from_numpy(disc()), 0.1, 2.0)
    held = torch.randn(64, 64, dtype=torch.complex64, generator=generator) * power.sqrt()
    scores = {}
    for name, foretold in (("right", power), ("flat", torch.ones(64, 64)), ("turned", 1 / power)):
        monkeypatch.setattr(a2a, "anatomy_power", lambda network, looks, phases, told=foretold: told)
        scores[name] = a2a._held_out_score(network(), held[None], held)
        # the factor of a foretold power does not count
        monkeypatch.setattr(a2a, "anatomy_power", lambda network, looks, phases, told=7 * foretold: told)
        assert a2a._held_out_score(network(), held[None], held) == pytest.approx(scores[name], abs=1e-4)
    assert scores["right"] < scores["flat"] - 0.1 < scores["turned"] - 0.2
    factor = float((held.abs() ** 2 / power).mean())
    expected = float(torch.log(power * factor).mean()) + 1.0
    assert scores["right"] == pytest.approx(expected, abs=1e-4)


def test_the_step_whose_weights_are_kept_is_told(monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 1.5, 1.2, 0.0])
    monkeypatch.setattr(a2a, "_held_out_score", lambda net, kept, held: next(scores))
    found = denoise(acquisition(count=4)[0], a2a.with_changes(SHORT, [("steps", 40), ("patience", 3)]))
    assert (found.steps, found.kept_step) == (5, 2)
    two = denoise(acquisition(count=2)[0], SHORT)
    assert two.kept_step == two.steps == SHORT.steps


def test_with_two_apertures_all_steps_are_trained():
    found = denoise(acquisition(count=2)[0], SHORT)
    assert found.steps == SHORT.steps
    assert all(math.isnan(held) for _, _, held in found.history)


def test_progress_is_told():
    told = []
    denoise(acquisition(count=4)[0], SHORT, lambda step, steps: told.append((step, steps)))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("steps", 0), "method.steps=0: must be at least 1"),
        (("anatomy", (4, 4, 4)), "same number of levels"),
        (("lr", 0.0), "method.lr must be above 0"),
        (("speckle", 1.5), "method.speckle=1.5"),
        (("crop", 2), "too small for 2 levels"),
    ],
)
def test_impossible_settings_are_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        a2a.with_changes(SHORT, [change])


def test_what_cannot_be_trained_is_told():
    with pytest.raises(DataError, match="at least 2 apertures"):
        denoise(np.ones((1, 64, 64)), SHORT)
    config = a2a.with_changes(SHORT, [("steps", 30), ("lr", 1e30)])
    with pytest.raises(MethodError, match="lower method.lr"):
        denoise(acquisition(count=4)[0], config)
