"""MIRAM under patient-level DP-SGD: right rows, a bounded patient, and a private round of a federation."""

from functools import partial

import pytest
import torch
import yaml

from sparsecontrast import checkpoint
from sparsecontrast.account import open_account
from sparsecontrast.config import compose
from sparsecontrast.coupling import noise_batch
from sparsecontrast.methods import build_method, miram
from sparsecontrast.models import tokens
from sparsecontrast.models.linear_attention import ATTENTIONS
from sparsecontrast.overrides import assign, without
from sparsecontrast.private_trainer import PrivateTrainer
from sparsecontrast.row_gradients import RowGradients
from tests.federations import FEDERATION, MODEL, rows, serve, write_images
from tests.private import batch_of, brute_force_sum, clipped_sum, engine, take
from tests.test_leaves import messages
from tests.test_private_training import KEY, films

SMALL = ("method=miram", "backbone.img_size=32", "backbone.patch_size=4", "backbone.depth=1",
         "method.decoder_dim=16", "method.decoder_depth=1", "method.landmarks=8")  # fmt: skip
FILMS = [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]  # patients of one to four images
NAMES = pytest.mark.parametrize("attention", list(ATTENTIONS))


def method_of(*words):
    return build_method(compose([*SMALL, *words]))


@pytest.fixture
def own_masks(monkeypatch):
    """What is hidden depends on the image alone, so that a row has it in any batch."""

    def by_content(images, patches, count, generator):
        return tokens.top_k(images.flatten(1)[:, :patches], count)

    monkeypatch.setattr(miram, "draw_visible", by_content)


@NAMES
def test_rows_are_those_of_autograd(attention):
    for share in (1.0, 0.25):
        m = method_of(f"method.attention={attention}", f"method.high_share={share}")
        made = RowGradients(m)
        found = made.verify(partial(noise_batch, m, 3))
        made.cleanup()
        assert {n for n, _ in m.named_parameters()} - found == {"backbone.coarse"}


def test_every_layer_sees_an_image_once():
    m, calls = method_of(), {}
    for name, layer in m.named_modules():
        if not list(layer.children()) and list(layer.parameters()):
            layer.register_forward_hook(
                lambda _, given, out, n=name: calls.setdefault(n, []).append(len(out))
            )
    m(noise_batch(m, 3))
    assert {n.split(".")[0] for n in calls} == {"backbone", "low_decoder", "high_decoder"}
    assert all(seen == [3] for seen in calls.values())


@NAMES
def test_the_sum_is_that_of_a_loop_over_patients(attention, own_masks):
    m = method_of(f"method.attention={attention}").double()
    batch = batch_of(m, FILMS[:6], dtype=torch.float64)
    for clip, within in ((0.05, 2e-6), (1e4, 1e-9)):  # the margin of clipping is 1e-6
        made = engine(m, clip=clip)
        wanted = brute_force_sum(m, batch, clip)
        assert (clipped_sum(made, batch) - wanted).norm() <= within * wanted.norm()
        made.close()


@pytest.mark.parametrize("data", ["random", "alike"])
def test_removing_a_patient_changes_the_sum_by_at_most_the_clip(data, own_masks):
    m = method_of()
    made = engine(m, clip=0.01)
    batch = batch_of(m, [*FILMS, 4], data)
    whole, changes = clipped_sum(made, batch), []
    for patient in batch.patients.unique():
        rest = take(batch, (batch.patients != patient).nonzero()[:, 0])
        changes.append(float((whole - clipped_sum(made, rest)).double().norm()) / 0.01)
    assert 0.99 < max(changes) <= 1 + 1e-6


def test_the_view_that_is_not_taken_changes_nothing(own_masks):
    """An image counts once: what stands in the second view of a batch has no gradient."""
    m = method_of()
    made = engine(m, clip=0.01)
    batch, other = batch_of(m, [0, 1]), batch_of(m, [0, 1])
    other.second.fill_(torch.nan)
    assert torch.equal(clipped_sum(made, batch), clipped_sum(made, other))


def test_bf16_rows_are_close_and_summed_in_float32(own_masks):
    m = method_of("method.attention=softmax")
    batch = batch_of(m, [0, 1, 2])
    exact, rough = (clipped_sum(engine(m, clip=1e4, bf16=b), batch) for b in (False, True))
    assert rough.dtype == torch.float32 and torch.isfinite(rough).all()
    assert (exact - rough).norm() < 0.05 * exact.norm()


def test_a_private_round_moves_all_that_trains_and_tells_what_no_image_decides(tmp_path):
    words = [
        "privacy=dp_sgd",
        "privacy.planned_rounds=2",
        "privacy.steps_per_round=3",
        "privacy.sample_rate=0.3",
    ]
    config = compose([*SMALL, *words, "train.batch_size=8"])
    m = build_method(config)
    base = {n: p.detach().clone() for n, p in m.named_parameters()}
    account = open_account(config, tmp_path, "run", [f"p{code}" for code in films()[1]], KEY)
    result = PrivateTrainer(m, config, "a", account).run(*films(), 1, 2)
    assert set(result.metrics) == {"epsilon", "delta", "noise_multiplier", "noise_to_signal", "keep"}
    assert result.metrics["keep"] == m.metrics()["keep"]
    still = {n for n, p in m.named_parameters() if torch.equal(p, base[n])}
    assert still == {"backbone.coarse"}


def test_private_hospitals_federate_and_no_loss_leaves(tmp_path):
    nodes = []
    for name in ("north", "south"):
        index = write_images(tmp_path / name / "images", {name: 6}, prefix=f"{name}-")
        own = [assign("data.index", index), "data.min_images=2", "privacy=dp_sgd", "privacy.sample_rate=0.5",
               "privacy.steps_per_round=2", "privacy.planned_rounds=1"]  # fmt: skip
        told = {"name": name, "state_dir": str(tmp_path / name / "state"), "overrides": own}
        (tmp_path / name / "site.yaml").write_text(yaml.safe_dump(told))
        nodes.append({"site-config": str(tmp_path / name / "site.yaml")})
    base = without([*MODEL, *FEDERATION], ["method.projection_hidden", "method.projection_dim"])
    base += [assign("data.index", tmp_path / "nothing.csv"), assign("output_dir", tmp_path / "run")]
    grid = serve(nodes, [*SMALL, *base, "federation.sites=2", "federation.rounds=1"])
    told = [r for r in rows(tmp_path / "run") if r["site"]]
    assert [r["status"] for r in told] == ["ok", "ok"] and all(0 < r["epsilon"] <= 8 for r in told)
    assert not any({"loss", "low_resolution", "high_resolution"} & set(r) for r in told)
    last = checkpoint.read_round(tmp_path / "run", 1).tensors
    assert all(n.startswith("backbone.") for n in last)
    for message in messages(grid.sent):
        assert "loss" not in message.content.metric_records.get("metrics", {})
