import numpy as np
import pytest
import torch

from sparsecontrast.batches import epoch_batches
from sparsecontrast.config import compose
from sparsecontrast.errors import CheckpointError, MethodError, TooFewImagesError
from sparsecontrast.methods import build_method
from sparsecontrast.trainer import LocalTrainer, derive_seed, explicit_attention, lr_factor

TINY = [
    "backbone.img_size=32",
    "backbone.patch_size=4",
    "backbone.depth=1",
    "method.projection_hidden=32",
    "train.batch_size=8",
    "method.distill_every=2",
]


def images(n=16, seed=0):
    rng = np.random.Generator(np.random.PCG64(seed))
    coarse = rng.integers(0, 256, (n, 4, 4), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def stripes(n):
    """Images that differ in frequency and direction, so that contrast is easy."""
    y, x = np.mgrid[0:32, 0:32] / 32
    turns = [(1 + i // 4, i % 4 * np.pi / 4) for i in range(n)]
    waves = [np.sin(2 * np.pi * f * (x * np.cos(a) + y * np.sin(a))) for f, a in turns]
    return (127 + 127 * np.stack(waves)).astype(np.uint8)


def trainer(*overrides, site="a", method=None):
    config = compose([*TINY, *overrides])
    return LocalTrainer(method or build_method(config), config, site)


def weights(t):
    return {n: p.clone() for n, p in t.module.state_dict().items()}


def assert_same(a, b):
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def run(t, number=1, rounds=4, data=None, **options):
    data = images() if data is None else data
    return t.run(data, np.arange(len(data)), number, rounds, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_bits_other_site_other_bits(precision):
    one, two, other = (trainer(f"train.precision={precision}", site=s) for s in ("a", "a", "b"))
    for t in (one, two, other):
        run(t)
    assert_same(weights(one), weights(two))
    assert not torch.equal(one.module.backbone.vit.cls_token, other.module.backbone.vit.cls_token)


SELECTIONS = pytest.mark.parametrize("selection", ["surprise", "attention"])  # without and with a teacher


@SELECTIONS
def test_a_round_after_save_and_load_equals_a_round_without(tmp_path, selection):
    one = trainer(f"selection={selection}")
    run(one, 1)
    one.local.save(tmp_path / "state.safetensors")
    shared = {n: one.module.state_dict()[n].clone() for n in one.method.shared_parameters()}
    run(one, 2)
    two = trainer(f"selection={selection}")
    two.module.load_state_dict(shared, strict=False)  # as a fresh process receives them
    two.local.load(tmp_path / "state.safetensors")
    run(two, 2)
    assert_same(weights(one), weights(two))


@SELECTIONS
def test_local_state_holds_no_shared_tensor(tmp_path, selection):
    from safetensors.torch import load_file

    t = trainer(f"selection={selection}")
    run(t)
    t.local.save(tmp_path / "state.safetensors")
    local = {n.removeprefix("local.") for n in load_file(tmp_path / "state.safetensors") if n[:5] == "local"}
    assert local and not local & set(t.method.shared_parameters())
    assert any(n.startswith("teacher.") for n in local) == (selection == "attention")


def test_torn_state_is_a_clear_error(tmp_path):
    t = trainer()
    t.local.save(tmp_path / "s.safetensors")
    whole = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "s.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="torn"):
        trainer().local.load(tmp_path / "s.safetensors")


def test_training_learns_to_tell_images_apart():
    t = trainer("train.local_epochs=10", "train.batch_size=16")
    losses = [run(t, r, 5, stripes(16)).metrics["contrast"] for r in range(1, 5)]
    assert losses[-1] < 0.5 * np.log(16)
    result = run(t, 5, 5, stripes(16))
    assert result.steps == 10 and result.images == 160
    assert result.metrics["chance_loss"] == pytest.approx(np.log(16))


def test_proximal_term_holds_the_weights_near_the_global_ones():
    distances = []
    for mu in (0.0, 100.0):
        t = trainer("train.local_epochs=4")
        start = weights(t)
        run(t, proximal_mu=mu)
        distances.append(
            sum((v - start[n]).norm() for n, v in weights(t).items() if n.startswith("backbone."))
        )
    assert distances[1] < distances[0]


def test_proximal_gradient_is_mu_times_the_distance():
    t = trainer("train.local_epochs=1")
    p = t.module.backbone.vit.cls_token
    anchor = [(p, p.detach() - 0.5)]
    t.optimizer.step = lambda: None  # look at the gradient itself
    plain = trainer()
    plain.optimizer.step = lambda: None
    data, codes, rows = images(8), np.arange(8), np.arange(8)
    for each, a in ((t, anchor), (plain, [])):
        each.module.train()
        each.method.start_round(1, 4)
        each._step(data, codes, rows, rows, torch.Generator().manual_seed(0), 0, a, 3.0)
    other = plain.module.backbone.vit.cls_token
    torch.testing.assert_close(p.grad, other.grad + 1.5)


@pytest.mark.parametrize(("n", "patients"), [(1, [0]), (3, [5, 5, 5])])
def test_too_few_images_or_patients(n, patients):
    with pytest.raises(TooFewImagesError, match="site a"):
        trainer().run(images(n), np.array(patients), 1, 4)


def test_exploding_loss_is_an_error_not_nan_weights():
    t = trainer()
    with torch.no_grad():
        t.module.projector[0].weight.fill_(torch.nan)
    with pytest.raises(MethodError, match="lower train.lr"):
        run(t)


def test_a_small_site_trains_on_one_batch():
    result = run(trainer(), data=images(3))
    assert result.steps == 1 and result.images == 3


def test_same_patient_partners_are_of_the_same_patient_and_vary():
    patients = np.array([0, 0, 0, 1, 2, 2, 0, 1])
    config = compose([*TINY, "method.same_patient=true", "train.local_epochs=50"])
    pairs = epoch_batches(patients, config, torch.Generator().manual_seed(0))
    assert all((patients[rows] == patients[partners]).all() for rows, partners in pairs)
    assert {int(p) for rows, partners in pairs for r, p in zip(rows, partners, strict=True) if r == 0} == {
        0,
        1,
        2,
        6,
    }


def test_every_image_is_seen_once_an_epoch():
    pairs = epoch_batches(np.arange(24), compose(TINY), torch.Generator().manual_seed(0))
    assert sorted(int(r) for rows, _ in pairs for r in rows) == list(range(24))


@pytest.mark.parametrize(("steps", "local_epochs"), [(1, 5), (3, 1), (7, 2)])
def test_steps_are_counted_whatever_the_images(steps, local_epochs):
    words = [*TINY, f"train.steps={steps}", f"train.local_epochs={local_epochs}"]
    for count in (5, 24, 29):
        pairs = epoch_batches(np.arange(count), compose(words), torch.Generator().manual_seed(0))
        assert [len(rows) for rows, _ in pairs] == [min(8, count)] * steps
        first = [int(r) for rows, _ in pairs[: count // 8] for r in rows]
        assert len(set(first)) == len(first)  # an image comes again once a pass is over
    passes = epoch_batches(np.arange(24), compose(TINY), torch.Generator().manual_seed(0))
    counted = epoch_batches(
        np.arange(24), compose([*TINY, "train.steps=3"]), torch.Generator().manual_seed(0)
    )
    assert all((a[0] == b[0]).all() for a, b in zip(passes, counted, strict=True))


def test_learning_rate_rises_then_falls_to_zero():
    factors = [lr_factor(x / 10, 10, 0.1) for x in range(0, 101)]
    assert factors[0] < 0.05 and factors[10] == pytest.approx(1, abs=1e-2) and factors[-1] == pytest.approx(0)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))


def test_derived_seeds_are_stable_and_distinct():
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)
    assert len({derive_seed(s, w, r) for s in range(3) for w in "ab" for r in range(3)}) == 18


@pytest.mark.filterwarnings("ignore")  # the compiler warns of torch itself
def test_the_compiled_backbone_equals_the_eager_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    eager, compiled = trainer(), trainer("train.compile=true")
    x = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    choice = eager.method.choose(x, 0.5)
    found = []
    for backbone in (eager.method.backbone, compiled.method.backbone):
        out = backbone(x, *choice)
        out.square().sum().backward()
        found.append((out, backbone.vit.blocks[0].attn.qkv.weight.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    assert compiled.method.backbone._compiled_call_impl is not None
    assert eager.method.backbone._compiled_call_impl is None


@pytest.mark.parametrize("compile_", [False, pytest.param(True, marks=pytest.mark.filterwarnings("ignore"))])
def test_attention_is_written_out_for_few_tokens_and_fused_for_many(monkeypatch, compile_):
    """Both ways are the same function, in one module, whatever came before."""
    monkeypatch.setattr("sparsecontrast.trainer.EXPLICIT_TOKENS", 40)
    plain, chosen = trainer().method.backbone, trainer().method.backbone
    explicit_attention(chosen)
    attention = chosen.vit.blocks[0].attn
    if compile_:
        chosen.compile(dynamic=False, backend="eager")  # traced as ever; what is built of it is not asked
    x = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    few = torch.tensor([[0, 1]] * 4)
    for kept, fused in ((None, True), (few, False), (None, True)):
        found = []
        for backbone in (plain, chosen):
            backbone.zero_grad()
            out = backbone(x, kept)
            out.square().sum().backward()
            found.append((out, backbone.vit.blocks[0].attn.qkv.weight.grad.clone()))
        assert attention.fused_attn is fused
        torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_bf16_on_a_cpu_chooses_attention_by_tokens_and_fp32_leaves_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    x = torch.randn(2, 1, 32, 32)
    for precision, fused in (("bf16", False), ("fp32", True)):
        backbone = trainer(f"train.precision={precision}").method.backbone
        backbone(x)
        assert {block.attn.fused_attn for block in backbone.vit.blocks} == {fused}
