"""MIRAM in whole runs: a federation that resumes, a report, an export, and what left the sites."""

import json

import pytest
import torch

from sparsecontrast import checkpoint
from sparsecontrast.config import compose
from sparsecontrast.evaluation import evaluate_run
from sparsecontrast.methods import build_method
from sparsecontrast.overrides import assign, without
from sparsecontrast.pretrain import pretrain
from sparsecontrast.report import write_report
from tests.federations import FEDERATION, MODEL, partitions, rows, serve
from tests.test_leaves import messages
from tests.tiny import WORDS

SMALL = ("method=miram", "method.decoder_dim=16", "method.decoder_depth=1", "method.landmarks=8")
OF_CONTRAST = [f"method.{key}" for key in ("projection_hidden", "projection_dim", "distill_every")]


def words(index, folder, *more):
    base = without([*MODEL, *FEDERATION], OF_CONTRAST)
    return [*SMALL, *base, assign("data.index", index), assign("output_dir", folder), *more]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A federation of three sites and two rounds, and every byte that they sent."""
    folder = tmp_path_factory.mktemp("miram") / "run"
    return folder, serve(partitions(3), words(images, folder)).sent


def test_a_federation_trains_and_its_rounds_hold_the_backbone_alone(finished):
    folder, _ = finished
    first, last = (checkpoint.read_round(folder, n).tensors for n in (0, 2))
    assert all(name.startswith("backbone.") for name in last)
    moved = {
        n for n in last if not torch.allclose(first[n], last[n], atol=1e-7)
    }  # a mean of equals is rounded
    assert set(last) - moved == {"backbone.coarse"}
    told = [r for r in rows(folder) if r["site"]]
    assert len(told) == 6 and all(r["keep"] == 0.25 and r["low_resolution"] > 0 for r in told)
    assert all(r["loss"] == pytest.approx(r["low_resolution"] + r["high_resolution"], rel=1e-5) for r in told)


def test_no_decoder_leaves_a_site(finished):
    folder, sent = finished
    trained = [m for m in messages(sent) if m.content.array_records]
    for message in trained:
        assert all(n.startswith("backbone.") for n in message.content.config_records["manifest"]["names"])
    kept = 0
    for path in folder.glob("sites/*/state/*/round_0002.safetensors"):
        for name, tensor in checkpoint.read_tensors(path).items():
            values = tensor.flatten()[:64]
            if name.startswith("local.") and len(values.unique()) > 60:
                kept += 1
                assert not any(values.numpy().tobytes() in data for data in sent), name
    assert kept > 10


def test_a_continued_federation_gives_the_same_bits(finished, images, tmp_path):
    folder, _ = finished
    serve(partitions(3), words(images, tmp_path / "run", "federation.rounds=1"))
    # one round of two is another schedule: the run is told of both before it starts
    serve(partitions(3), words(images, tmp_path / "two"))
    last = checkpoint.round_file(tmp_path / "two", 2)
    before = last.read_bytes()
    for path in (last, last.with_suffix(".json")):
        path.unlink()
    serve(partitions(3), [f"resume={tmp_path / 'two'}"])
    assert last.read_bytes() == before == checkpoint.round_file(folder, 2).read_bytes()


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A run at one place on phantoms, scored, with membership and a report."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    told = [*SMALL, *without(list(WORDS), OF_CONTRAST), f"output_dir={folder}", "audit.views=1"]
    pretrain(compose(told), show=False)
    return folder, evaluate_run(folder, show=False), write_report(folder, show=False).read_text()


def test_features_and_membership_are_scored_and_nothing_is_said_of_regions(scored):
    folder, evaluation, _ = scored
    assert {r["features"] for r in evaluation["rows"]} == {"pretrained", "pixels", "random_init"}
    assert evaluation["selection"] is None and evaluation["keep"] == "dense"
    assert {row["score"] for row in evaluation["membership"]["rows"]} == {"loss", "calibrated"}
    assert json.loads((folder / "evaluation.json").read_text()) == evaluation


def test_the_report_shows_reconstructions_and_no_place_that_it_looks_at(scored):
    _, _, page = scored
    assert "What the model fills in" in page and "Where the model looks" not in page
    assert page.count("data:image/jpeg;base64,") == 3 * 4  # evaluation.overlays films, four panels each
    assert "was shown 25 % of the squares" in page and "never a finding" in page
    assert "score map" not in page and "saliency predictor" not in page
    assert "mask ratio 0.75, x2 by nystromformer, weight 1" in page


def test_a_server_without_decoders_says_where_they_are(finished, tmp_path):
    import shutil

    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("sites"))
    page = write_report(tmp_path / "run", show=False).read_text()
    assert "The decoders, which draw such pictures, stay at the hospitals" in page
    assert "weights of the backbone with a few scalars" in page and "decoder or optimizer state" in page


def test_the_backbone_is_exported(scored, tmp_path):
    from sparsecontrast.export import export_run

    folder, _, _ = scored
    record = export_run(folder, tmp_path / "out", formats=("timm",))
    assert record["keep"]["asked"] == "dense" and record["keep"]["selection"] is None
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["backbone.safetensors", "export.json"]
    method = build_method(compose([*SMALL, *without(list(WORDS), OF_CONTRAST)]))
    assert set(checkpoint.read_tensors(tmp_path / "out" / "backbone.safetensors")) == set(
        method.backbone.vit.state_dict()
    )
