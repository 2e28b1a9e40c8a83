import copy

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from sparsecontrast import losses
from sparsecontrast.accounting import Charge
from sparsecontrast.config import compose
from sparsecontrast.disclosure import disclosure
from sparsecontrast.errors import ConfigError, MethodError
from sparsecontrast.methods import build_method
from sparsecontrast.noise import SecureStream
from sparsecontrast.privacy import Mechanism
from tests.private import CNN, VIT, Tiny, batch_of, brute_force_sum, clipped_sum, engine, library_method, take

KINDS = pytest.mark.parametrize("kind", [VIT, CNN], ids=["vit", "cnn"])
FILMS = [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]  # patients of one to four images


@KINDS
def test_sum_is_that_of_a_loop_over_patients(kind):
    method = library_method(kind).double()
    made = engine(method, clip=0.05)
    batch = batch_of(method, FILMS[: 6 if kind is VIT else 3], dtype=torch.float64)
    wanted = brute_force_sum(method, batch, 0.05)
    assert (clipped_sum(made, batch) - wanted).norm() <= 2e-6 * wanted.norm()  # MARGIN is 1e-6 of it
    loose = engine_again(made, clip=1e4)
    wanted = brute_force_sum(method, batch, 1e4)
    assert (clipped_sum(loose, batch) - wanted).norm() <= 1e-9 * wanted.norm()


def engine_again(made, **words):
    made.close()
    return engine(made.method, **words)


@pytest.mark.parametrize("data", ["random", "alike"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_removing_a_patient_changes_the_sum_by_at_most_the_clip(data, dtype):
    method = Tiny().to(dtype)
    made = engine(method, clip=0.05)
    batch = batch_of(method, [0, *[p + 1 for p in FILMS], 5, 6], data, dtype=dtype)
    whole, changes = clipped_sum(made, batch), []
    for patient in batch.patients.unique():
        rest = take(batch, (batch.patients != patient).nonzero()[:, 0])
        changes.append(float((whole - clipped_sum(made, rest)).double().norm()) / 0.05)
    assert max(changes) <= 1 + 1e-6
    assert max(changes) > 0.99  # the bound is reached: clipping is not far below C


@KINDS
def test_removing_a_patient_of_four_films_from_near_duplicates(kind):
    method = library_method(kind)
    made = engine(method, clip=0.01)
    batch = batch_of(method, [0, 1, 1, 1, 1, 2], "alike")
    whole = clipped_sum(made, batch)
    for patient in (0, 1, 2):
        rest = take(batch, (batch.patients != patient).nonzero()[:, 0])
        change = (whole - clipped_sum(made, rest)).double().norm() / 0.01
        assert change <= 1 + 1e-6


def test_clipping_films_instead_of_patients_would_break_the_bound():
    """Why rows are regrouped: the same four films as four patients change the sum by more than one clip."""
    method = Tiny()
    made = engine(method, clip=0.05)
    films = batch_of(method, [0, 1, 2, 3], "alike")
    apart = clipped_sum(made, films)
    films.patients.fill_(7)
    assert apart.norm() > 2 * 0.05 >= 2 * clipped_sum(made, films).norm()


@pytest.mark.parametrize("where", [(0,), (2,)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_record_counts_nothing(where, value):
    method = Tiny()
    made = engine(method)
    batch = batch_of(method, [0, 1, 2, 2])
    batch.first[list(where), :, 0, 0] = value
    healthy = take(batch, [i for i in range(4) if batch.patients[i] not in batch.patients[list(where)]])
    torch.testing.assert_close(clipped_sum(made, batch), clipped_sum(made, healthy), atol=1e-8, rtol=1e-5)
    made.step([batch])
    assert all(torch.isfinite(p).all() for p in method.parameters())


def test_a_broken_film_in_a_vit():
    method = library_method(VIT)
    made = engine(method, clip=0.01)
    batch = batch_of(method, [0, 1, 2])
    batch.second[1] = float("nan")
    found, wanted = clipped_sum(made, batch), clipped_sum(made, take(batch, [0, 2]))
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-4)


def released(method, made, batches):
    """What a step adds to the weights, in units of the noise's deviation."""
    before = torch.cat([p.detach().flatten().clone() for p in made.optimizer.params])
    made.step(batches)
    after = torch.cat([p.detach().flatten() for p in made.optimizer.params])
    told = made.optimizer.mechanism
    scale = told.sample_rate * told.patients / (told.noise_multiplier * told.max_grad_norm)
    return (before - after).double() * scale


def test_noise_has_its_deviation_and_two_sites_have_their_own():
    methods = [Tiny(), Tiny()]
    for m in methods:  # many parameters, so that a deviation can be told
        m.head[0] = nn.Linear(4 * 36, 800)
        m.head[1], m.head[2] = nn.LayerNorm(800), nn.Linear(800, 3)
        m.average = nn.Parameter(m.head[0].weight.detach().clone(), requires_grad=False)
    one, two = (released(m, engine(m, clip=0.3, sigma=2.0, seed=None), []) for m in methods)
    n = len(one)
    for drawn in (one, two):
        assert n > 1e5 and abs(drawn.std() - 1) < 5 / (2 * n) ** 0.5 and abs(drawn.mean()) < 5 / n**0.5
    assert abs((one * two).mean()) < 5 / n**0.5


def test_how_much_longer_the_noise_is_than_any_signal_is_known_beforehand():
    method = library_method(VIT)
    made = engine(method, clip=0.3, sigma=2.0)
    told, shared = made.optimizer.mechanism, method.shared_parameters()
    before = {name: method.state_dict()[name].clone() for name in shared}
    made.step([])  # an empty draw: noise alone
    noise = sum((method.state_dict()[name] - before[name]).square().sum() for name in shared) ** 0.5
    charge = Charge(told.noise_multiplier, told.sample_rate, 1)
    count = sum(before[name].numel() for name in shared)
    ratio = disclosure(compose(VIT), charge, 1.0, 1e-5, told.patients, count, 1, 1)["noise_to_signal"]
    # q N patients of norm C, all alike, would move the weights by C
    assert ratio == pytest.approx(float(noise) / told.max_grad_norm, rel=0.02)


def test_a_step_is_the_noised_sum_over_the_public_number():
    method = Tiny()
    made = engine(method, clip=0.05, sigma=0.7)
    batch = batch_of(method, [0, 1, 1])
    total = clipped_sum(made, batch).double() / (0.7 * 0.05)
    noise = released(copy.deepcopy(Tiny()), engine(Tiny(), clip=0.05, sigma=0.7, seed=5), [])
    made.optimizer.stream = SecureStream(5)
    torch.testing.assert_close(released(method, made, [batch]), noise + total, atol=1e-4, rtol=1e-4)


def test_an_empty_batch_is_a_step_of_noise_and_is_charged():
    charged = []
    method = Tiny()
    made = engine(method, charged.append)
    drawn = released(method, made, [])
    assert 0.8 < drawn.std() < 1.2 and charged == [made.optimizer.mechanism] and method.steps == 1


def test_a_large_batch_in_pieces_is_one_step():
    charged = []
    whole, pieces = Tiny(), Tiny()
    batch = batch_of(whole, [0, 1, 1, 2, 3, 3])
    engine(whole, seed=3).step([batch])
    parts = (take(batch, rows) for rows in ([0], [1, 2, 3], [4, 5]))
    engine(pieces, charged.append, seed=3).step(parts)
    for a, b in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert len(charged) == 1


def state(method, made):
    """All that a step may touch."""
    held = [
        getattr(p, key, None) for p in made.optimizer.params for key in ("grad_sample", "summed_grad", "grad")
    ]
    return {n: t.clone() for n, t in method.state_dict().items()}, [h for h in held if h is not None]


def refuse(told):
    raise RuntimeError("budget spent")


@pytest.mark.parametrize("how", ["while reading", "by the ledger", "by hand"])
def test_an_interrupted_step_leaves_nothing_behind(how):
    method, fresh = Tiny(), Tiny()
    made = engine(method, refuse if how == "by the ledger" else lambda told: None, seed=4)
    made.optimizer.stream.gaussian = None if how != "while reading" else made.optimizer.stream.gaussian
    before, _ = state(method, made)
    batch = batch_of(method, [0, 1, 2])

    def batches():
        yield take(batch, [0])
        if how == "by hand":
            raise KeyboardInterrupt
        if how == "while reading":
            raise OSError("disk")
        yield take(batch, [1, 2])

    with pytest.raises({"while reading": OSError, "by the ledger": RuntimeError}.get(how, KeyboardInterrupt)):
        made.step(batches())
    after, held = state(method, made)
    assert held == [] and method.steps == 0 and not made.optimizer.original_optimizer.state
    assert all(torch.equal(before[n], after[n]) for n in before)
    made.optimizer.charge, made.optimizer.stream = lambda told: None, SecureStream(9)
    made.step([take(batch, [1, 2])])
    engine(fresh, seed=9).step([take(batch, [1, 2])])
    for a, b in zip(method.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_ledger_is_asked_before_any_noise_is_drawn():
    order = []
    method = Tiny()
    made = engine(method, lambda told: order.append("charged"))
    draw = made.optimizer.stream.gaussian
    made.optimizer.stream.gaussian = lambda *words: order.append("noise") or draw(*words)
    made.step([batch_of(method, [0, 1])])
    assert order == ["charged", "noise"]  # noise of all parameters is one stream


def test_an_average_of_weights_sees_released_weights_alone():
    method = Tiny()
    made = engine(method)
    start = method.average.clone()
    made.step([batch_of(method, [0, 1])])
    torch.testing.assert_close(method.average, start.lerp(method.head[0].weight, 0.5))
    assert not list(method.named_buffers())  # nothing else of the module could remember a batch
    library = library_method(VIT)
    made = engine(library)
    trained = {n for n, p in library.named_parameters() if library.get_parameter(n) in made.optimizer.reached}
    assert {n for n in library.state_dict() if n.startswith("saliency.")} <= trained
    assert set(library.state_dict()) == trained  # all that is ever shared or saved is clipped and noised


def test_a_patient_in_two_pieces_is_refused():
    method = Tiny()
    batch = batch_of(method, [0, 1, 1])
    with pytest.raises(MethodError, match="one batch"):
        engine(method).step([take(batch, [0, 1]), take(batch, [2])])


def test_contrast_over_the_batch_is_refused_and_says_why():
    method = build_method(compose(VIT))
    with pytest.raises(MethodError, match="no clipping of single patients bounds that.*patch_contrast"):
        engine(method)


def test_what_was_never_checked_does_not_step():
    method = Tiny()
    made = engine(method)
    made.optimizer.reached.pop()
    with pytest.raises(MethodError, match="start_round"):
        made.step([batch_of(method, [0])])
    made.optimizer.reached.clear()
    with pytest.raises(MethodError, match="start_round"):
        made.step([])


def test_bf16_is_clipped_and_summed_in_float32():
    method = library_method(VIT)
    made = engine(method, clip=0.01, bf16=True)
    batch = batch_of(method, [0, 1, 1, 2], "alike")
    whole = clipped_sum(made, batch)
    assert whole.dtype == torch.float32
    exact = clipped_sum(engine_again(made, clip=0.01), batch)
    assert torch.cosine_similarity(whole, exact, dim=0) > 0.98
    made = engine_again(made, clip=0.01, bf16=True)
    for patient in (0, 1, 2):
        rest = take(batch, (batch.patients != patient).nonzero()[:, 0])
        alone = take(batch, (batch.patients == patient).nonzero()[:, 0])
        assert clipped_sum(made, alone).double().norm() <= 0.01 * (1 + 1e-6)
        assert (whole - clipped_sum(made, rest)).double().norm() <= 0.01 * (1 + 1e-5)


@pytest.mark.parametrize(
    "wrong", [(0.0, 1.0, 1.0, 1), (0.5, 0.0, 1.0, 1), (0.5, 1.0, float("inf"), 1), (0.5, 1.0, 1.0, 0)]
)
def test_an_impossible_mechanism_is_refused(wrong):
    with pytest.raises(ConfigError, match="must be"):
        Mechanism(*wrong)


class Naive(nn.Module):
    """An encoder as a tutorial would train it privately."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8))

    def forward(self, images):
        return self.net(images)


def naive_sum(first, second, clip):
    """Opacus as documented, on InfoNCE over the batch: clip rows, sum."""
    model = GradSampleModule(Naive(), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=1.0,
        max_grad_norm=clip,
        expected_batch_size=len(first),
        loss_reduction="sum",
    )
    rows = torch.cat([first, second]).requires_grad_()  # or its backward hooks warn
    a, b = model(rows).chunk(2)
    losses.info_nce(a, b, 0.1).sum().backward()
    for p in optimizer.params:  # both views of a record are its row
        p.grad_sample = p.grad_sample.view(2, len(first), *p.shape).sum(0)
    optimizer.clip_and_accumulate()
    return torch.cat([p.summed_grad.flatten() for p in optimizer.params])


def test_plain_opacus_on_contrast_over_the_batch_breaks_its_claim():
    """The reason for all of this: one record less changes the clipped sum by several clips, not by one."""
    g = torch.Generator().manual_seed(0)
    alike = torch.randn(1, 1, 8, 8, generator=g) + 1e-2 * torch.randn(2, 16, 1, 8, 8, generator=g)
    outlier = torch.randn(2, 1, 1, 8, 8, generator=g)
    first, second = torch.cat([alike, outlier], dim=1)
    clip = 0.05
    whole = naive_sum(first, second, clip)
    changes = []
    for row in range(17):
        rest = [i for i in range(17) if i != row]
        changes.append(float((whole - naive_sum(first[rest], second[rest], clip)).norm()) / clip)
    assert max(changes) > 2, changes
