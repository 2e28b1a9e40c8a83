"""``sparsecontrast denoise``: what it writes, what it says, and what it refuses."""

import json
import re

import numpy as np
import pytest

from sparsecontrast.cli import main
from sparsecontrast.denoising import _noise_picture, denoise_file, only_noise
from sparsecontrast.methods import a2a
from sparsecontrast.methods.a2a import A2AConfig, denoise
from sparsecontrast.scan_figure import TALL, Bar, scan_figure, ticks
from sparsecontrast.ultrasound.beamform import grid
from sparsecontrast.ultrasound.metrics import gcnr, regions
from sparsecontrast.ultrasound.simulate import SMALL, add_noise, inclusion_phantom
from tests.acquisitions import acquisition, field
from tests.test_beamform import meta

FEW = ["method.steps=2", "method.anatomy=[4,4]", "method.noise=[4,4]", "method.phases=1"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("denoise")
    rng = np.random.default_rng(0)
    channels, geometry = inclusion_phantom(SMALL, -30, rng, 300)
    assert geometry.inclusion is not None
    place = dict(zip(("cx", "cz", "r"), geometry.inclusion, strict=True))
    np.savez(folder / "phantom.npz", iq=add_noise(channels, 5, rng), meta=meta(inclusion=None, **place))
    return folder, denoise_file(folder / "phantom.npz", folder / "out", FEW), geometry


def test_the_archive_holds_every_image_and_its_metrics_are_those_told(written):
    folder, metrics, geometry = written
    x, z = grid(geometry)
    with np.load(folder / "out" / "denoised.npz") as found:
        assert set(found.files) == {"image", "anatomy", "coherent", "noise", "compound", "x", "z"}
        np.testing.assert_allclose(found["x"], x)
        inside, outside = regions(x, z, geometry.inclusion)
        for row, name in zip(metrics["regions"], ("compound", "image", "anatomy", "coherent"), strict=True):
            image = np.abs(found[name])
            assert row["gcnr"] == pytest.approx(gcnr(image[inside], image[outside]), abs=0.02)
        assert (np.abs(found["coherent"]) <= np.abs(found["compound"]) * 1.0001).all()
    assert json.loads((folder / "out" / "metrics.json").read_text()) == metrics
    assert (metrics["apertures"], metrics["steps"], metrics["only_noise"]) == (4, 2, False)


def test_the_picture_is_as_large_as_the_image(written):
    from PIL import Image

    folder, metrics, _ = written
    with Image.open(folder / "out" / "denoised.png") as picture:
        assert picture.size == (metrics["width_px"], metrics["height_px"])
        assert len(np.unique(np.asarray(picture))) > 20


def test_the_page_stands_alone_and_tells_the_metrics(written):
    folder, metrics, _ = written
    page = (folder / "out" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "<script" not in page
    assert page.count("data:image/png;base64,") == 5
    assert page.count("<svg") == 8
    assert page.count("lateral, mm") == page.count("depth, mm") == 5
    assert "Research, not a medical device" in page and "may be erased" in page
    assert "2 steps trained, 0." in page and metrics["noise_level_is"] in page
    assert str(folder) not in page
    for row in metrics["regions"]:
        assert f"{row['gcnr']:.3f}" in page


def test_the_page_says_which_step_the_weights_are_of(tmp_path, monkeypatch):
    scores = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(a2a, "_held_out_score", lambda net, kept, held: next(scores))
    np.savez(tmp_path / "a.npz", images=acquisition(count=4)[0])
    some = ["method.steps=3", *FEW[1:], "method.check_every=1"]
    metrics = denoise_file(tmp_path / "a.npz", tmp_path / "out", some)
    assert (metrics["steps"], metrics["weights_of_step"]) == (3, 1)
    assert (
        "3 steps trained, the weights shown are those of step 1"
        in (tmp_path / "out" / "report.html").read_text()
    )


def test_the_noise_map_has_a_scale_in_db_of_the_other_pictures_white():
    noise = np.full((4, 4), 0.01)
    noise[0, 0] = 0.1
    picture, bar = _noise_picture(noise, top=10.0)
    assert (bar.white, bar.black, bar.unit) == (pytest.approx(-40), pytest.approx(-70), "dB")
    assert picture[0, 0] == 255 and picture[1, 1] == round(255 / 3)


@pytest.mark.parametrize(
    ("ends", "expected"), [((0, 40), [0, 10, 20, 30, 40]), ((2.4, -2.4), [-2, -1, 0, 1, 2])]
)
def test_ticks_are_round_and_lie_between_the_ends(ends, expected):
    assert ticks(*ends) == expected


def test_a_depth_stands_where_the_axis_says():
    drawn = scan_figure("data:,", [-10, 10], [10, 50], "mm", "a & b", Bar(-55, 0, "dB"))
    assert "a &amp; b" in drawn and "-50 dB" in drawn
    height = float(re.search(r'y="([\d.]+)" class="tick end" >30<', drawn)[1])
    assert height == pytest.approx(TALL / 2 + 4)


def test_images_without_geometry_have_profiles_in_pixels_and_no_contrast(tmp_path):
    np.savez(tmp_path / "<b>.npz", images=acquisition(count=2)[0])
    metrics = denoise_file(tmp_path / "<b>.npz", tmp_path / "out", FEW)
    page = (tmp_path / "out" / "report.html").read_text()
    assert metrics["regions"] == []
    assert "No inclusion of known place" in page and "pixels" in page
    assert "<b>.npz" not in page and "&lt;b&gt;.npz" in page


def test_noise_alone_is_called_so():
    rng = np.random.default_rng(1)
    noise = np.stack([field(rng, (64, 64), 0.6) for _ in range(4)]).astype(np.complex64)
    config = A2AConfig(steps=1, anatomy=(4, 4), noise=(4, 4), crop=32, phases=1)
    assert only_noise(denoise(noise, config), noise)
    echoes, _ = acquisition(count=4, sigma=1.0)
    assert not only_noise(denoise(echoes, config), echoes)


def test_the_command_prints_what_it_wrote_and_refuses_in_one_line(written, tmp_path, capsys):
    folder, _, _ = written
    out = str(tmp_path / "out")
    assert main(["denoise", str(folder / "phantom.npz"), "--out", out, *FEW]) == 0
    assert "report.html: 2 steps" in capsys.readouterr().out
    for words, code, told in (
        (["none.npz"], "data_missing", "no such file"),
        ([str(folder / "phantom.npz"), "method.step=3"], "config", "step"),
        ([str(folder / "phantom.npz"), "method.speckle=3"], "config", r"method.speckle=3.0: must be in"),
    ):
        assert main(["denoise", *words, "--out", out]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error [{code}]") and told in said and said.count("\n") == 1
