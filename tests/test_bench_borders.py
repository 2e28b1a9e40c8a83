"""Border errors: none where a window is the image, less with a halo, and counted as a brute force counts."""

import json

import pytest
import torch

from benchmarks import borders
from benchmarks.borders import errors, open_network, phantoms, work
from sparsecontrast.settings import BackboneConfig


def config(name="convnext_atto", halo=0, count=4):
    return BackboneConfig(name, 128, False, tiles=count, halo=halo)


@pytest.mark.parametrize("name", borders.NETWORKS[::2])
def test_a_window_as_large_as_the_image_has_no_border(name):
    model = open_network(config(name, 48), 0)
    assert model.window == 128
    assert max(errors(model, phantoms(128, 0))) < 1e-4


@torch.no_grad()
def test_errors_by_brute_force():
    model, images = open_network(config(count=2), 0), phantoms(128, 0)
    error, ratio = [], []
    for image in images[:, None]:
        wanted = model.fine_cells(image)[0]
        found = [model.fine_cells(image, torch.tensor([[cell]]))[0, 0] for cell in range(4)]
        wrong = [float((a - b).norm()) for a, b in zip(found, wanted, strict=True)]
        error += [w / float(b.norm()) for w, b in zip(wrong, wanted, strict=True)]
        deviations = [float((b - wanted.mean(0)).norm()) for b in wanted]
        ratio.append((sum(w**2 for w in wrong) / sum(d**2 for d in deviations)) ** 0.5)
    assert errors(model, images) == pytest.approx((sum(error) / 8, sum(ratio) / 2), rel=1e-3)


def test_a_seed_decides_weights_and_films_and_no_branch_is_closed():
    choices = ((0, 0), (32, 0), (0, 1))  # halo, seed
    one, same, other = (open_network(config("resnet18", halo), seed) for halo, seed in choices)
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and (a.dim() == 1 or not torch.equal(a, c)), name
        assert name.endswith(".bias") or a.abs().max() > 1e-3, name
    assert torch.equal(phantoms(128, 0), phantoms(128, 0))
    assert not torch.equal(phantoms(128, 0), phantoms(128, 1))


def test_work_is_the_share_of_the_pixels_and_the_overview():
    plain, halo = work(open_network(config(), 0)), work(open_network(config(halo=32), 0))
    assert 0.25 < plain < 0.3  # a quarter of the tiles, in windows no larger than they
    assert halo - plain == pytest.approx(2, abs=0.06)  # windows of 96 px in place of 32


def test_the_quick_benchmark_writes_rows_that_a_halo_improves(tmp_path, capsys):
    file = tmp_path / "found.json"
    borders.main(["--quick", "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["command"] == "python -m benchmarks.borders --quick"
    assert [(r["network"], r["halo"]) for r in result["rows"]] == [
        (name, halo) for name in ("convnext_atto", "resnet18") for halo in (0, 32)
    ]
    for row in result["rows"]:
        assert 0 < row["error"] <= row["worst_seed"] < 1 and row["of_spread"] > 0
    for first, last in (result["rows"][:2], result["rows"][2:]):
        assert last["error"] < 0.5 * first["error"] and last["work"] > first["work"]
    assert "Tiles against the dense network" in capsys.readouterr().out
