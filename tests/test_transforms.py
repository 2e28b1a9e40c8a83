import dataclasses

import pytest
import torch

from sparsecontrast.data import transforms
from sparsecontrast.data.transforms import Augmentation, Geometry

STILL = Augmentation(
    area=(1, 1), aspect=(1, 1), degrees=0, black=(0, 0), white=(1, 1), gamma=(1, 1), blur=(0, 0), noise=(0, 0)
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, height, width), generator=seeded(seed), dtype=torch.uint8)


def painted(boxes: torch.Tensor, size: int) -> torch.Tensor:
    """One white rectangle [n, 4] (integers) an image, on black."""
    images = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for image, (x, y, w, h) in zip(images, boxes.long().tolist(), strict=True):
        image[y : y + h, x : x + w] = 255
    return images


def bright_box(view: torch.Tensor) -> torch.Tensor:
    """Hull (x, y, w, h) of the pixels brighter than half, [h, w] -> [4]; zeros when there are none."""
    rows, columns = (view > 0.5).nonzero(as_tuple=True)
    if len(rows) == 0:
        return torch.zeros(4)
    low, high = (torch.stack([f(columns), f(rows)]).float() for f in (torch.amin, torch.amax))
    return torch.cat([low, high + 1 - low])


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[:2] + a[2:], b[:2] + b[2:])
    shared = (high - low).clamp(min=0).prod()
    return float(shared / (a[2:].prod() + b[2:].prod() - shared))


def random_boxes(count: int, size: int, seed: int) -> torch.Tensor:
    corner = torch.randint(0, size // 2, (count, 2), generator=seeded(seed))
    extent = torch.randint(size // 5, size // 2, (count, 2), generator=seeded(seed + 1))
    return torch.cat([corner, extent], 1).float()


def moved_rectangles(
    size: int, view: int, augmentation: Augmentation
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    boxes = random_boxes(64, size, 3)
    images = painted(boxes, size)
    geometry = transforms.random_geometry(images, seeded(7), view, augmentation)
    moved = transforms.move_boxes([b[None] for b in boxes], geometry)
    views = transforms.warp(images, geometry)[:, 0]
    return [(bright_box(v), m[0]) for v, m in zip(views, moved, strict=True)]


@pytest.mark.parametrize(("size", "view"), [(160, 160), (160, 96), (320, 128), (96, 160)])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_upright_box_lands_on_the_pixels_even_when_cut(size, view, flip):
    pairs = moved_rectangles(size, view, Augmentation(degrees=0, flip=flip))
    scores = [overlap(seen, box) for seen, box in pairs if box[2:].min() > 12]
    assert len(scores) > 40 and min(scores) > 0.9


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_turned_box_lands_on_the_pixels(flip):
    pairs = moved_rectangles(192, 192, Augmentation(flip=flip))
    whole = [(s, b) for s, b in pairs if b[:2].min() > 0 and (b[:2] + b[2:]).max() < 192]
    assert len(whole) > 15 and min(overlap(*pair) for pair in whole) > 0.9
    for seen, box in pairs:  # a cut box may be larger than what is seen, never smaller
        low, high = box[:2] - 1, box[:2] + box[2:] + 1
        assert (seen[2:] == 0).all() or ((seen[:2] >= low).all() and (seen[:2] + seen[2:] <= high).all())


def test_box_outside_the_view_keeps_its_row_and_has_no_area():
    geometry = Geometry(torch.tensor([[[0.5, 0, 60], [0, 0.5, 0]]], dtype=torch.float64), (128, 128), 128)
    moved = transforms.move_boxes([torch.tensor([[0.0, 10, 20, 20], [80, 10, 20, 20]])], geometry)[0]
    assert moved.tolist() == [[0, 20, 0, 40], [40, 20, 40, 40]]
    assert transforms.move_boxes([torch.zeros(0, 4)], geometry)[0].shape == (0, 4)


def test_points_round_trip_and_land_where_the_pixels_do():
    images = noise_images(16, 200, 120)
    geometry = transforms.random_geometry(images, seeded(1), 96, Augmentation(flip=0.5))
    points = torch.rand(16, 9, 2, generator=seeded(2)) * 96
    back = geometry.to_view(geometry.to_image(points))
    assert (back - points).abs().max() < 1e-4
    assert (geometry.to_image(geometry.to_view(points)) - points).abs().max() < 1e-4
    # A smooth ramp says at every view pixel which image point it shows.
    ramp = torch.linspace(0, 255, 120).round().to(torch.uint8).expand(16, 200, 120).contiguous()
    seen = transforms.warp(ramp, geometry)[:, 0]
    centres = torch.stack(torch.meshgrid(*[torch.arange(96) + 0.5] * 2, indexing="xy"), -1).view(1, -1, 2)
    shown = geometry.to_image(centres.expand(16, -1, -1)).view(16, 96, 96, 2)
    inside = (shown > 1).all(-1) & (shown[..., 0] < 119) & (shown[..., 1] < 199)
    error = (seen - (shown[..., 0] - 0.5) / 119).abs()[inside]
    assert inside.float().mean() > 0.9 and error.max() < 0.01


def test_still_geometry_is_the_image_itself():
    images = noise_images(3, 64, 64)
    views = transforms.two_views(images, seeded(0), 64, STILL)
    for view in (views.first, views.second):
        assert torch.allclose(view, transforms.evaluation_view(images, 64), atol=2e-5)


def test_same_generator_state_same_bits_and_the_state_moves_on():
    images = noise_images(8, 96, 96)
    generator = seeded(5)
    first = transforms.two_views(images, generator, 64)
    again = transforms.two_views(images, seeded(5), 64)
    later = transforms.two_views(images, generator, 64)
    for name in ("first", "second"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(later, name))
        assert torch.equal(
            getattr(first, f"{name}_geometry").matrix, getattr(again, f"{name}_geometry").matrix
        )


def test_global_generators_are_neither_read_nor_moved():
    images = noise_images(4, 64, 64)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = transforms.two_views(images, seeded(5), 64)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first.first, transforms.two_views(images, seeded(5), 64).first)


def test_the_two_views_and_the_images_of_a_batch_draw_independently():
    image = noise_images(1, 64, 64).expand(64, 64, 64).contiguous()
    views = transforms.two_views(image, seeded(0), 64)
    matrices = torch.cat([views.first_geometry.matrix, views.second_geometry.matrix]).flatten(1)
    assert len(matrices.unique(dim=0)) == 128
    gap = (views.first - views.second).abs().mean((1, 2, 3))
    assert gap.min() > 0
    draws = torch.stack([m[:, 0, 2] for m in (views.first_geometry.matrix, views.second_geometry.matrix)])
    assert torch.corrcoef(draws)[0, 1].abs() < 0.3


def test_a_view_depends_on_its_own_image_alone():
    images = noise_images(6, 64, 64)
    changed = images.clone()
    changed[1:] = noise_images(5, 64, 64, seed=9)
    a, b = (transforms.two_views(i, seeded(3), 48) for i in (images, changed))
    assert torch.equal(a.first[0], b.first[0]) and torch.equal(a.second[0], b.second[0])
    assert not torch.equal(a.first[1], b.first[1])


def test_crops_keep_to_their_ranges():
    images = torch.zeros(2000, 1, 1, dtype=torch.uint8).expand(2000, 100, 100)
    geometry = transforms.random_geometry(images, seeded(0), 50, transforms.DEFAULT)
    linear = geometry.matrix[..., :2]
    area = torch.linalg.det(linear) * 50**2 / 100**2
    scale = linear.norm(dim=1)
    turn = torch.atan2(linear[:, 1, 0], linear[:, 0, 0]).rad2deg()
    assert area.min() > 0.42 and area.max() <= 1 + 1e-9  # a side is cut at the image's
    assert (scale[:, 0] / scale[:, 1]).min() > 0.84 and (scale[:, 0] / scale[:, 1]).max() < 1.19
    assert turn.abs().max() <= 10 and turn.abs().max() > 9.9 and turn.mean().abs() < 0.5
    centre = geometry.to_image(torch.full((2000, 1, 2), 25.0))[:, 0]
    half = scale * 25
    assert (centre - half).min() > -1e-9 and (centre + half).max() < 100 + 1e-9


def test_chests_are_not_mirrored_by_default_and_are_when_asked():
    images = torch.zeros(500, 32, 32, dtype=torch.uint8)
    for flip, low, high in ((0.0, 0, 0), (0.5, 0.4, 0.6), (1.0, 1, 1)):
        augmentation = dataclasses.replace(transforms.DEFAULT, flip=flip)
        matrix = transforms.random_geometry(images, seeded(0), 32, augmentation).matrix
        share = (torch.linalg.det(matrix[..., :2]) < 0).float().mean()
        assert low <= share <= high


def test_black_stays_black_and_values_stay_in_range():
    images = noise_images(16, 64, 64)
    images[:, :, :20] = 0
    pixels = transforms.rendered(images[:, None].float() / 255, seeded(0))
    assert pixels.min() >= 0 and pixels.max() <= 1
    assert (pixels[..., :19] == 0).all()
    assert pixels[..., 22:].std((1, 2, 3)).unique().numel() == 16


def test_mae_view_only_moves_pixels():
    images = noise_images(4, 64, 64)
    view, geometry = transforms.mae_view(images, seeded(0), 32)
    pixels = transforms.warp(images, geometry)
    deviation, mean = torch.std_mean(pixels, (1, 2, 3), keepdim=True)
    assert torch.allclose(view * (deviation + transforms.FLAT) + mean, pixels, atol=1e-5)
    assert geometry.size == 32


def test_a_view_is_standardised_by_itself_alone():
    images = noise_images(3, 64, 64)
    darker = (images.float() * 0.5 + 20).to(torch.uint8)
    bright, dark = transforms.evaluation_view(images, 64), transforms.evaluation_view(darker, 64)
    assert torch.allclose(bright, dark, atol=0.05)  # exposure is gone, up to uint8 rounding
    assert torch.equal(transforms.evaluation_view(images[1:2], 64), bright[1:2])
    assert torch.isfinite(transforms.evaluation_view(torch.full_like(images, 7), 64)).all()


@pytest.mark.parametrize("size", [16, 64, 100])
def test_evaluation_view_averages_what_it_shrinks(size):
    checker = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    checker[:, 32:] = 0
    view = transforms.evaluation_view(checker.to(torch.uint8)[None], size)
    assert view.shape == (1, 1, size, size)
    if size == 16:  # four pixels wide: the pattern is gone, its mean remains
        assert view[..., 1:6].std() < 0.05 and view[..., 1:6].mean() > 0.9
    assert torch.equal(view, transforms.evaluation_view(checker.to(torch.uint8)[None], size))


def test_a_view_half_the_image_does_not_alias():
    stripes = (torch.arange(128) % 2 * 255).to(torch.uint8).expand(1, 128, 128).contiguous()
    view = transforms.mae_view(stripes, seeded(0), 64, STILL)[0]
    assert view.abs().max() < 1e-5  # grey, not stripes


def test_shifted_views_show_the_same_place_whole_cells_apart():
    images = noise_images(96, 40, 40)
    still = dataclasses.replace(STILL, area=(0.6, 0.9), degrees=5.0)
    views, shift = transforms.shifted_views(images, seeded(3), 24, 8, still)
    assert {tuple(s) for s in shift.tolist()} == {(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)}
    for i, (down, across) in enumerate((shift * 8).tolist()):
        rows, columns = slice(max(0, -down), 24 - max(0, down)), slice(max(0, -across), 24 - max(0, across))
        one = views.first[i, 0, rows, columns]
        other = views.second[i, 0].roll((-down, -across), (0, 1))[rows, columns]
        # each view is standardised on its own: equal up to scale and offset
        seen = torch.stack([one.flatten(), other.flatten()])
        assert torch.corrcoef(seen)[0, 1] > 1 - 1e-5
    middle = torch.full((96, 1, 2), 12.0)
    there = middle + 8.0 * shift.flip(1)[:, None]
    torch.testing.assert_close(
        views.first_geometry.to_image(middle), views.second_geometry.to_image(there), atol=1e-9, rtol=0
    )


def test_shifted_views_are_rendered_apart_and_repeat_from_the_same_seed():
    images = noise_images(4, 32, 32)
    views, shift = transforms.shifted_views(images, seeded(1), 24, 8)
    again, same = transforms.shifted_views(images, seeded(1), 24, 8)
    assert torch.equal(views.first, again.first) and torch.equal(shift, same)
    assert views.first.shape == (4, 1, 24, 24) and not torch.equal(views.first, views.second)
