"""Pictures of what a method that reconstructs fills in: image, what the network sees, coarse, fine.

They need decoders, and decoders never leave a site: pictures are drawn where a site's state lies, of a
simulation on this machine or of the site itself.

Under ``method.normalise`` a decoder says the pattern within a token's pixels, not how bright they are. The
truth would give that away, and with it most of a picture; so brightness and contrast of a hidden token are
means over the visible ones, weighted by their distance. What a picture shows is known from visible pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sparsecontrast.checkpoint import read_meta, read_tensors
from sparsecontrast.config import anchored
from sparsecontrast.data.transforms import evaluation_view
from sparsecontrast.errors import CheckpointError
from sparsecontrast.methods.miram import FLAT, Miram, draw_visible
from sparsecontrast.models import tokens
from sparsecontrast.overlays import choose_rows, data_uri, enlarged, findings_of
from sparsecontrast.runs import Run

if TYPE_CHECKING:
    from sparsecontrast.data.cache import Dataset

HEADS = ("image", "what the network sees", "filled in, coarse", "filled in, fine")
NO_DECODERS = "The decoders, which draw such pictures, stay at the hospitals; none is on this machine."
REACH = 0.7  # of a visible token's brightness, in patches
HIDDEN = 0.35  # grey of what the network does not see
Decoders = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Reconstruction:
    """One image in three or four panels, as data URIs, and what may be said of it without naming anybody."""

    panels: tuple[str, ...]
    site: str
    findings: str
    decoder: str


def local_decoders(run: Run, number: int) -> Decoders:
    """Read what each site on this machine kept of its method, newest first up to a round, by site.

    Sites whose files are gone or torn are left out; in a real federation the server finds none.
    """
    config, key = run.config, read_meta(run.folder, number)["run_key"]
    bases = [run.folder / "sites"] + ([anchored(config.site.state_dir)] if config.site.state_dir else [])
    found: dict[str, Mapping[str, Tensor]] = {}
    for folder in (one for base in bases for one in sorted(base.glob("*")) if one.name not in found):
        for file in sorted(_states(folder / "state", key), reverse=True):
            if int(file.stem.removeprefix("round_")) <= number and (kept := _local(file)):
                found[folder.name] = kept
                break
    return found


def reconstructions(
    method: Miram, decoders: Decoders, dataset: "Dataset", count: int, seed: int
) -> list[Reconstruction]:
    """Draw ``count`` held-out images, each with its hospital's decoders, or with the first where it has none.

    Args:
        method: in evaluation mode, with the shared weights; its decoders are overwritten.
        decoders: at least one site's.
        dataset: of the run.
        count: how many.
        seed: of the choice of images and of what is hidden.
    """
    sites = dataset.frame["site"].astype(str).tolist()
    drawn = []
    for row in choose_rows(dataset, count, seed):
        whose = sites[row] if sites[row] in decoders else next(iter(decoders))
        method.load_state_dict(dict(decoders[whose]), strict=False)
        panels = _panels(method, dataset.images[row], torch.Generator().manual_seed(seed + row))
        drawn.append(Reconstruction(panels, sites[row], findings_of(dataset, row), whose))
    return drawn


@torch.no_grad()
def filled_in(method: Miram, images: Tensor, visible: Tensor) -> tuple[Tensor, Tensor | None]:
    """Complete images [B, 1, H, W] of which patches ``visible`` [B, K] are seen.

    Returns:
        The image shrunk by ``method.upsample`` [B, 1, h, w] and the image itself [B, 1, H, W], hidden patches
        as the decoders have them and visible ones as they are; None for a decoder that is not there.
    """
    factor = method.config.upsample
    filled, side = method.fill(images, visible), method.patch_size // factor
    coarse = tokens.cell_patches(tokens.shrink(images, factor), side, 1)
    low = _completed(method, coarse, filled.low[0], visible, 1)
    if filled.high is None:
        return low, None
    fine = tokens.cell_patches(images, side, factor)
    return low, _completed(method, fine, filled.high[0], visible, factor)


def seen_alone(method: Miram, images: Tensor, visible: Tensor, grey: float) -> Tensor:
    """Paint everything of images [B, 1, H, W] grey but patches ``visible`` [B, K]."""
    patches = tokens.cell_patches(images, method.patch_size, 1)
    shown = torch.full_like(patches, grey)
    shown = shown.scatter(1, _wide(visible, patches), tokens.gather(patches, visible))
    return tokens.join_cells(shown, method.backbone.vit.patch_embed.grid_size, method.patch_size, 1)


def _completed(method: Miram, true: Tensor, predicted: Tensor, visible: Tensor, cell: int) -> Tensor:
    """Put predictions [B, M * cell^2, pixels] into the true tokens [B, L, cell^2, pixels] of an image."""
    hidden = tokens.complement(visible, true.shape[1])
    said = predicted.float().unflatten(1, (-1, cell**2))
    grid = method.backbone.vit.patch_embed.grid_size
    if method.config.normalise:
        mean, deviation = _carried(true, visible, hidden, grid, cell)
        said = said * deviation + mean
    whole = true.scatter(1, _wide(hidden, true), said)
    return tokens.join_cells(whole, grid, method.patch_size // method.config.upsample, cell)


def _carried(
    true: Tensor, visible: Tensor, hidden: Tensor, grid: tuple[int, int], cell: int
) -> tuple[Tensor, Tensor]:
    """Mean and deviation of hidden tokens [B, M, cell^2, 1], as those of the visible ones around them."""
    place = _places(grid, cell).to(true.device)  # [L, cell^2, 2]
    known = tokens.gather(true, visible)
    variance, mean = torch.var_mean(known, dim=-1)
    stated = torch.stack([mean, (variance + FLAT).sqrt()], -1).flatten(1, 2)
    apart = torch.cdist(place[hidden].flatten(1, 2), place[visible].flatten(1, 2))
    near = (-0.5 * (apart / REACH).square()).softmax(-1)
    found = (near @ stated).unflatten(1, (-1, cell**2))
    return found[..., :1], found[..., 1:]


def _places(grid: tuple[int, int], cell: int) -> Tensor:
    """Centres of all tokens, in patches: [L, cell^2, 2]."""
    columns = grid[1] * cell
    order = tokens.cell_positions((grid[0] * cell, columns), cell)
    return (torch.stack([order // columns, order % columns], -1) + 0.5) / cell


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[:, :, None, None].expand(-1, -1, *like.shape[2:])


def _panels(method: Miram, image: np.ndarray, generator: torch.Generator) -> tuple[str, ...]:
    view = evaluation_view(torch.from_numpy(np.ascontiguousarray(image[None])), method.backbone.img_size)
    visible = draw_visible(view, method.num_patches, method.visible, generator)
    low, high = filled_in(method, view, visible)
    start, span = float(view.min()), float(view.max() - view.min()) or 1.0
    dark, bright = float(image.min()) / 255, float(image.max()) / 255
    shown = [seen_alone(method, view, visible, start + span * HIDDEN), low, *([] if high is None else [high])]
    pixels = [(dark + (x[0, 0] - start) / span * (bright - dark)).numpy() for x in shown]
    return tuple(data_uri(enlarged(p)) for p in (image.astype(np.float32) / 255, *pixels))


def _states(folder: Path, key: str) -> list[Path]:
    """Files of a site's state: a federation keeps them by run, a pretraining at one place does not."""
    return [file for place in (folder, folder / key) for file in place.glob("round_[0-9]*.safetensors")]


def _local(file: Path) -> dict[str, Tensor]:
    try:
        saved = read_tensors(file)
    except CheckpointError:
        return {}
    return {n.removeprefix("local."): t for n, t in saved.items() if n.startswith("local.")}
