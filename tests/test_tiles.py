import torch

from sparsecontrast.models import tiles


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_windows_lie_inside_the_image_around_their_tiles_on_whole_strides():
    assert tiles.window_starts(256, 4, 64, 0).tolist() == [0, 64, 128, 192]
    assert tiles.window_starts(224, 7, 96, 32).tolist() == [0, 0, 32, 64, 96, 128, 128]
    for size, count, halo in ((256, 4, 0), (224, 7, 32), (96, 3, 64), (640, 10, 96)):
        window, tile = tiles.window_size(size, count, halo), size // count
        starts = tiles.window_starts(size, count, window, halo)
        first = torch.arange(count) * tile
        assert window % 32 == 0 and (starts % 32 == 0).all()
        assert (starts >= 0).all() and (starts + window <= size).all()
        assert (starts <= (first - halo).clamp_min(0)).all()
        assert (starts + window >= (first + tile + halo).clamp_max(size)).all()
        close(tiles.window_weights(size, starts, window, window // 32).sum(1), torch.ones(count**2))


def test_pooling_weighs_by_area():
    # 4 cells over 3 positions: a cell's 3/4 of a position lie in one or two of them
    close(tiles.span_weights(0, 24, 96, 3), torch.tensor([1.0, 0.0, 0.0]))
    close(tiles.span_weights(24, 48, 96, 3), torch.tensor([1 / 3, 2 / 3, 0.0]))
    grid = torch.rand(1, 7, 7, generator=torch.Generator().manual_seed(0))
    pooled = tiles.whole_weights(224, 4, 7) @ grid.flatten()
    close(pooled.mean(), grid.mean())  # the cells' mean is timm's global average
