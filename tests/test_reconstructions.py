import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from sparsecontrast import reconstructions as rc
from sparsecontrast.checkpoint import write_round, write_tensors
from sparsecontrast.config import compose
from sparsecontrast.methods import build_method
from sparsecontrast.methods.miram import FLAT, draw_visible
from sparsecontrast.models import tokens
from sparsecontrast.overlays import SIDE
from sparsecontrast.runs import Run

SMALL = ("method=miram", "backbone.img_size=32", "backbone.patch_size=8", "backbone.depth=1", "method.cell=2",
         "method.decoder_dim=16", "method.decoder_depth=1", "method.landmarks=8")  # fmt: skip


def miram(*words):
    return build_method(compose([*SMALL, *words])).eval()


def images(n=2):
    return torch.randn(n, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def visible(m, x):
    return draw_visible(x, m.num_patches, m.visible, torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("patch", "cell"), [(4, 1), (4, 2), (2, 4)])
def test_cells_join_to_the_image_they_were_cut_from(patch, cell):
    x = images()
    grid = (32 // (patch * cell),) * 2
    assert torch.equal(tokens.join_cells(tokens.cell_patches(x, patch, cell), grid, patch, cell), x)


@pytest.mark.parametrize("normalise", ["true", "false"])
def test_visible_pixels_stay_and_hidden_ones_are_the_decoders(normalise):
    m = miram(f"method.normalise={normalise}")
    x = images()
    seen = visible(m, x)
    low, high = rc.filled_in(m, x, seen)
    assert low.shape == (2, 1, 16, 16) and high.shape == x.shape
    shown = torch.zeros(2, 16, dtype=torch.bool).scatter(1, seen, True).view(2, 1, 4, 4)
    for found, true, side in ((low, tokens.shrink(x, 2), 4), (high, x, 8)):
        mask = shown.repeat_interleave(side, 2).repeat_interleave(side, 3)
        assert torch.equal(found[mask], true[mask])
        assert (found[~mask] != true[~mask]).float().mean() > 0.99


def test_a_decoder_that_is_right_about_the_pixels_gives_the_image_back():
    m = miram("method.normalise=false")
    x = images()
    fill = m.fill
    m.fill = lambda *told: type(f := fill(*told))(*((pair[1], pair[1]) for pair in f))
    low, high = rc.filled_in(m, x, visible(m, x))
    torch.testing.assert_close(low, tokens.shrink(x, 2))
    assert torch.equal(high, x)


def test_brightness_and_contrast_come_from_visible_squares_alone():
    """Other hidden pixels, the same picture: nothing of the truth shines through."""
    m = miram()
    x = images()
    seen = visible(m, x)
    cut = tokens.cell_patches(x, 8, 1)
    hidden = tokens.complement(seen, 16)
    other = cut.scatter(1, hidden[:, :, None, None].expand(-1, -1, 1, 64), 40 + 9 * torch.randn(2, 12, 1, 64))
    other = tokens.join_cells(other, (4, 4), 8, 1)
    for one, two in zip(rc.filled_in(m, x, seen), rc.filled_in(m, other, seen), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_a_hidden_square_is_as_bright_as_the_visible_ones_beside_it():
    grid, cell = (1, 4), 1
    true = torch.tensor([0.0, 0.0, 5.0, 5.0])[None, :, None, None] + torch.randn(1, 4, 1, 16) * 1e-3
    mean, deviation = rc._carried(true, torch.tensor([[0, 3]]), torch.tensor([[1, 2]]), grid, cell)
    assert mean.shape == deviation.shape == (1, 2, 1, 1)
    assert mean[0, 0] < 1.2 and mean[0, 1] > 3.8  # each mostly its neighbour's
    assert (deviation < 0.01).all() and (deviation >= FLAT**0.5).all()


def test_what_the_network_sees_is_grey_elsewhere():
    m = miram()
    x = images(1)
    shown = rc.seen_alone(m, x, torch.tensor([[0, 5, 10, 15]]), 0.25)
    cut = tokens.cell_patches(shown, 8, 1)[0, :, 0]
    assert torch.equal(cut[[0, 5, 10, 15]], tokens.cell_patches(x, 8, 1)[0, [0, 5, 10, 15], 0])
    assert (cut[[i for i in range(16) if i not in (0, 5, 10, 15)]] == 0.25).all()


def test_panels_keep_the_brightness_of_the_film():
    m = miram("method.normalise=false", "method.high_weight=0")
    m.fill = lambda *told, fill=m.fill: (f := fill(*told))._replace(low=(f.low[1], f.low[1]))
    film = np.kron(np.array([[40, 200], [80, 120]], np.uint8), np.ones((16, 16), np.uint8))
    panels = rc._panels(m, film, torch.Generator().manual_seed(0))
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(p.split(",")[1]))), int) for p in panels]
    assert len(panels) == 3 and shown[0].shape == (SIDE, SIDE)
    assert abs(shown[0] - shown[2])[20:80, 20:80].max() < 12 and abs(shown[0] - shown[2]).mean() < 6


def local(m, value):
    return {f"local.{n}": torch.full_like(t, value) for n, t in m.state_dict().items() if "decoder" in n}


def test_decoders_are_found_where_sites_keep_them(tmp_path):
    m = miram()
    config = compose([*SMALL, f"output_dir={tmp_path}"])
    write_round(tmp_path, 3, {"backbone.x": torch.zeros(1)}, {"run_key": "ab12", "parent": None, "rows": []})
    run = Run(tmp_path, config, (), ())
    assert rc.local_decoders(run, 3) == {}
    state = tmp_path / "sites" / "north" / "state"
    write_tensors(state / "ab12" / "round_0002.safetensors", local(m, 2.0))
    write_tensors(state / "ab12" / "round_0003.safetensors", local(m, 3.0))
    write_tensors(state / "ab12" / "round_0004.safetensors", local(m, 4.0))  # after the newest whole round
    write_tensors(state / "cd34" / "round_0003.safetensors", local(m, 9.0))  # another run's
    write_tensors(tmp_path / "sites" / "south" / "state" / "round_0003.safetensors", local(m, 5.0))
    found = rc.local_decoders(run, 3)
    assert {site: float(t["low_decoder.mask_token"].mean()) for site, t in found.items()} == {
        "north": 3.0,
        "south": 5.0,
    }
    (state / "ab12" / "round_0003.safetensors").write_bytes(b"torn")
    assert float(rc.local_decoders(run, 3)["north"]["low_decoder.mask_token"].mean()) == 2.0
