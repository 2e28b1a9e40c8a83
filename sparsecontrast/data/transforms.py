"""Random and fixed views of cached images; boxes and points move with the pixels.

Everything works on whole batches, draws from one explicit generator, and treats each image on its
own (no statistic of the batch), so a view is admissible under per-sample privacy.

What is varied, and why it is sane for a chest radiograph: where the beam was centred and how far it
was collimated (crop), how the patient leaned (a small rotation), and how the detector and its
software rendered the exposure (window, gamma, sharpness, quantum noise). A view is never mirrored
unless asked for: a heart on the right is a finding (situs inversus), and so is a side marker. Nothing
is erased: a lesion may be that small. Black stays black under every photometric change, because
padding and collimation must stay recognisable.

Pixel coordinates are continuous: pixel i covers [i, i + 1). Every view is standardised by its own
mean and deviation: exposure differs more between two renderings of one film than anatomy does
between two patients, and under fixed constants an untrained network sees little else.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

FLAT = 1e-3  # added to the deviation: a view of one grey value stays finite


@dataclass(frozen=True)
class Augmentation:
    """Ranges (low, high) of the random changes; each image of each view draws its own.

    Attributes:
        area: share of the image's area that the crop keeps.
        aspect: width / height of the crop, log-uniform.
        degrees: largest rotation to either side.
        flip: probability of mirroring left and right; keep 0 for chests.
        black: grey value that becomes black.
        white: grey value that becomes white.
        gamma: exponent after windowing, log-uniform.
        blur: weight of a 3x3 mean.
        noise: standard deviation relative to the pixel (bright = few photons = noisy).
    """

    area: tuple[float, float] = (0.5, 1.0)
    aspect: tuple[float, float] = (0.85, 1.18)
    degrees: float = 10.0
    flip: float = 0.0
    black: tuple[float, float] = (0.0, 0.12)
    white: tuple[float, float] = (0.8, 1.1)
    gamma: tuple[float, float] = (0.7, 1.4)
    blur: tuple[float, float] = (0.0, 0.8)
    noise: tuple[float, float] = (0.0, 0.05)


DEFAULT = Augmentation()


@dataclass(frozen=True)
class Geometry:
    """Where each view lies in its image.

    Attributes:
        matrix: float64 [B, 2, 3]; image point = matrix @ (x, y, 1) of the view point.
        image_size: (height, width) of the image, in its pixels.
        size: side of the square view, in its pixels.
    """

    matrix: Tensor
    image_size: tuple[int, int]
    size: int

    def to_image(self, points: Tensor) -> Tensor:
        """Map points (x, y) [B, n, 2] from view pixels to image pixels."""
        points = points.to(self.matrix)
        return points @ self.matrix[:, :, :2].mT + self.matrix[:, None, :, 2]

    def to_view(self, points: Tensor) -> Tensor:
        """Map points (x, y) [B, n, 2] from image pixels to view pixels; the inverse of ``to_image``."""
        points = points.to(self.matrix) - self.matrix[:, None, :, 2]
        return points @ torch.linalg.inv(self.matrix[:, :, :2]).mT


@dataclass(frozen=True)
class TwoViews:
    """Two views of each image: float32 [B, 1, size, size], normalised, and where they lie."""

    first: Tensor
    second: Tensor
    first_geometry: Geometry
    second_geometry: Geometry


def two_views(
    images: Tensor, generator: Generator, size: int, augmentation: Augmentation = DEFAULT
) -> TwoViews:
    """Draw two independent random views of each image.

    Args:
        images: uint8 [B, H, W].
        generator: source of every draw; the same state gives the same bits.
        size: side of the views in pixels.
        augmentation: ranges of the changes.
    """
    first, first_geometry = random_view(images, generator, size, augmentation)
    second, second_geometry = random_view(images, generator, size, augmentation)
    return TwoViews(first, second, first_geometry, second_geometry)


def shifted_views(
    images: Tensor, generator: Generator, size: int, cell: int, augmentation: Augmentation = DEFAULT
) -> tuple[TwoViews, Tensor]:
    """Draw two views of each image that lie whole cells apart: what is where is known exactly.

    One geometry is drawn for a canvas that is one cell larger than a view, and two renderings of it;
    each view is a corner of its own of that canvas, so that no position in a view tells the place.

    Args:
        images: uint8 [B, H, W].
        generator: source of every draw; the same state gives the same bits.
        size: side of the views in pixels.
        cell: side of a cell in pixels; divides ``size``.
        augmentation: ranges of the changes; ``area`` is the share that a view keeps, where it fits.

    Returns:
        The views, and the shift [B, 2] long, each of -1, 0, 1: cell (r, c) of the first view shows the
        same place as cell (r, c) + shift of the second.
    """
    canvas = size + cell
    low, high = (min(1.0, share * (canvas / size) ** 2) for share in augmentation.area)
    wide = dataclasses.replace(augmentation, area=(low, high))
    geometry = random_geometry(images, generator, canvas, wide)
    pixels = warp(images, geometry)
    corners = torch.randint(0, 2, (2, len(images), 2), generator=generator, device=generator.device)
    corners = corners.to(images.device)
    first, second = (
        normalise(_corner(rendered(pixels.clone(), generator, augmentation), corner * cell, size))
        for corner in corners
    )
    places = [_moved(geometry, corner * cell, size) for corner in corners]
    return TwoViews(first, second, places[0], places[1]), corners[0] - corners[1]


def random_view(
    images: Tensor, generator: Generator, size: int, augmentation: Augmentation = DEFAULT
) -> tuple[Tensor, Geometry]:
    """Draw one random view, float32 [B, 1, size, size], of images uint8 [B, H, W]."""
    geometry = random_geometry(images, generator, size, augmentation)
    return normalise(rendered(warp(images, geometry), generator, augmentation)), geometry


def mae_view(
    images: Tensor, generator: Generator, size: int, augmentation: Augmentation = DEFAULT
) -> tuple[Tensor, Geometry]:
    """Draw one view that only moves pixels: a masked autoencoder must reconstruct true grey values."""
    geometry = random_geometry(images, generator, size, augmentation)
    return normalise(warp(images, geometry)), geometry


def evaluation_view(images: Tensor, size: int) -> Tensor:
    """Resize uint8 [B, H, W] (antialiased) and normalise: float32 [B, 1, size, size], deterministic."""
    pixels = _unit(images)
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True).clamp_(0, 1)
    return normalise(pixels)


def normalise(pixels: Tensor) -> Tensor:
    """Standardise each image of [B, 1, H, W] by its own mean and deviation, in place."""
    deviation, mean = torch.std_mean(pixels, (1, 2, 3), keepdim=True)
    return pixels.sub_(mean).div_(deviation + FLAT)


def random_geometry(images: Tensor, generator: Generator, size: int, augmentation: Augmentation) -> Geometry:
    """Draw a crop that lies inside the image, then turn it about its own centre; [B] geometries.

    A turned corner may look past the edge; what it sees there is black, like collimation.
    """
    count, (height, width) = len(images), images.shape[-2:]
    draws = torch.rand(6, count, generator=generator, device=generator.device, dtype=torch.float64)
    area, aspect, across, down, angle, mirror = draws.to(images.device)
    area = _between(area, augmentation.area)
    aspect = _between(aspect, augmentation.aspect, log=True)
    crop_w = (area * aspect).sqrt().clamp(max=1) * width
    crop_h = (area / aspect).sqrt().clamp(max=1) * height
    centre_x = crop_w / 2 + across * (width - crop_w)
    centre_y = crop_h / 2 + down * (height - crop_h)
    turn = (2 * angle - 1) * math.radians(augmentation.degrees)
    sx = torch.where(mirror < augmentation.flip, -1.0, 1.0) * crop_w / size
    sy = crop_h / size
    linear = torch.stack([turn.cos() * sx, -turn.sin() * sy, turn.sin() * sx, turn.cos() * sy], -1)
    linear = linear.view(count, 2, 2)
    centre = torch.stack([centre_x, centre_y], -1)
    offset = centre - linear.sum(-1) * (size / 2)  # the view's centre (size/2, size/2) meets the crop's
    return Geometry(torch.cat([linear, offset[..., None]], -1), (height, width), size)


def warp(images: Tensor, geometry: Geometry) -> Tensor:
    """Sample uint8 [B, H, W] bilinearly along ``geometry``: float32 [B, 1, size, size] in [0, 1].

    Crop, rotation and flip are one interpolation. An image at least twice as large as the view is
    first reduced by area, so that no pixel is skipped.
    """
    pixels, (height, width), size = _unit(images), geometry.image_size, geometry.size
    factor = min(height, width) // size
    if factor > 1:
        pixels = F.interpolate(pixels, (height // factor, width // factor), mode="area")
    # affine_grid speaks of coordinates that run from -1 to 1 over both the view and the image.
    to_unit = 2 / torch.tensor([[width], [height]], dtype=torch.float64, device=images.device)
    linear = geometry.matrix[..., :2] * (size / 2)
    offset = geometry.matrix[..., 2:] + linear.sum(-1, keepdim=True)
    theta = (torch.cat([linear, offset], -1) * to_unit).float()
    theta[..., 2] -= 1
    grid = F.affine_grid(theta, [len(images), 1, size, size], align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def rendered(pixels: Tensor, generator: Generator, augmentation: Augmentation = DEFAULT) -> Tensor:
    """Show float32 [B, 1, S, S] in [0, 1] as another detector would; may overwrite its input.

    blur, then ((x - black) / (white - black)) clamped to [0, 1] ** gamma, then x (1 + noise n).
    """
    draws = torch.rand(5, len(pixels), 1, 1, 1, generator=generator, device=generator.device)
    black, white, gamma, blur, noise = draws.to(pixels.device)
    black, white = _between(black, augmentation.black), _between(white, augmentation.white)
    if augmentation.blur[1] > 0:
        mean = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
        pixels = pixels.lerp_(mean, _between(blur, augmentation.blur))
    pixels = pixels.sub_(black).div_(white - black).clamp_(0, 1)
    pixels = pixels.pow_(_between(gamma, augmentation.gamma, log=True))
    if augmentation.noise[1] > 0:
        grain = torch.randn(pixels.shape, generator=generator, device=generator.device).to(pixels.device)
        pixels = pixels.mul_(grain.mul_(_between(noise, augmentation.noise)).add_(1)).clamp_(0, 1)
    return pixels


def move_boxes(boxes: Sequence[Tensor], geometry: Geometry) -> list[Tensor]:
    """Move each image's boxes into its view.

    Args:
        boxes: one [n, 4] an image, (x, y, w, h) in image pixels.
        geometry: of the view.

    Returns:
        One float32 [n, 4] an image in view pixels, same rows: the upright hull of the moved box, cut
        at the view's edges. A box that lies outside has width and height 0.
    """
    moved = []
    for row, box in enumerate(boxes):
        box = torch.as_tensor(box, dtype=torch.float64, device=geometry.matrix.device).reshape(-1, 4)
        corners = box[:, None, :2] + box[:, None, 2:] * box.new_tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
        one = Geometry(geometry.matrix[row : row + 1], geometry.image_size, geometry.size)
        corners = one.to_view(corners.view(1, -1, 2)).view(-1, 4, 2).clamp(0, geometry.size)
        low, high = corners.amin(1), corners.amax(1)
        moved.append(torch.cat([low, high - low], 1).float())
    return moved


def _corner(pixels: Tensor, offset: Tensor, size: int) -> Tensor:
    """Cut [B, 1, size, size] out of pixels [B, 1, S, S] at offset (down, across) [B, 2]."""
    steps = torch.arange(size, device=pixels.device)
    rows, columns = (offset[:, axis, None] + steps for axis in (0, 1))
    sample = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return pixels[:, 0][sample, rows[:, :, None], columns[:, None, :]][:, None]


def _moved(geometry: Geometry, offset: Tensor, size: int) -> Geometry:
    """Return where a part of a view lies that starts at offset (down, across) [B, 2]."""
    linear, start = geometry.matrix[..., :2], geometry.matrix[..., 2:]
    across_down = offset.flip(1).to(linear)[..., None]
    return Geometry(torch.cat([linear, start + linear @ across_down], -1), geometry.image_size, size)


def _unit(images: Tensor) -> Tensor:
    """Map uint8 [B, H, W] to float32 [B, 1, H, W] in [0, 1]."""
    assert images.dtype == torch.uint8 and images.dim() == 3, "cached images are uint8 [B, H, W]"
    return images[:, None].float().mul_(1 / 255)


def _between(draw: Tensor, bounds: tuple[float, float], log: bool = False) -> Tensor:
    low, high = (math.log(b) for b in bounds) if log else bounds
    value = low + draw * (high - low)
    return value.exp() if log else value
