"""What one step sees: rows drawn from a site's images, made into the views that the method asks for."""

from dataclasses import dataclass

import numpy as np
import torch

from sparsecontrast.data.transforms import Augmentation, mae_view, shifted_views, two_views
from sparsecontrast.methods.method import Batch, Method
from sparsecontrast.settings import Config, MethodConfig


@dataclass(frozen=True)
class Views:
    """Makes batches of one method.

    Attributes:
        method: says which views it needs.
        config: ``backbone.img_size`` and ``train``.
        device: where the method lives.
    """

    method: Method
    config: Config
    device: torch.device

    def batch(
        self, images: np.ndarray, patients: np.ndarray, rows: np.ndarray, partners: np.ndarray,
        generator: torch.Generator, step: int,
    ) -> Batch:  # fmt: skip
        """Make the views of each row; a second one is of its partner where that is another image.

        Args:
            images: uint8 [N, S, S]; may be memory-mapped.
            patients: integer codes [N].
            rows: of the batch [B].
            partners: a row each [B].
            generator: of everything random in the step.
            step: 0-based.
        """
        size, (low, high) = self.config.backbone.img_size, self.config.train.crop_area
        augmentation = Augmentation(area=(low, high), degrees=self.config.train.rotation)
        pixels, shift = torch.from_numpy(np.asarray(images[rows])), None
        codes = torch.from_numpy(np.asarray(patients[rows], dtype=np.int64)).to(self.device)
        if self.method.views == "one":
            only = mae_view(pixels, generator, size, augmentation)[0].to(self.device)
            return Batch(only, only, codes, generator, step)
        if self.method.views == "shifted":
            views, shift = shifted_views(pixels, generator, size, self.method.cell_size, augmentation)
            shift = shift.to(self.device)
        else:
            views = two_views(pixels, generator, size, augmentation)
        second = views.second
        if not np.array_equal(rows, partners):
            other = torch.from_numpy(np.asarray(images[partners]))
            second = two_views(other, generator, size, augmentation).second
        return Batch(views.first.to(self.device), second.to(self.device), codes, generator, step, shift)


def epoch_batches(
    patients: np.ndarray, config: Config, generator: torch.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Shuffle ``local_epochs`` passes into batches of (rows, partner rows), or as many as ``steps`` takes.

    A partner is the row itself, or with ``method.same_patient`` a random image of the same patient
    (MedAug, Vu et al. 2021). A last short batch is dropped unless it is the only one.
    """
    n, method = len(patients), config.method
    pairs = isinstance(method, MethodConfig) and method.same_patient
    size = min(config.train.batch_size, n)
    batches: list[tuple[np.ndarray, np.ndarray]] = []
    passes, steps = config.train.local_epochs, config.train.steps
    for _ in range(passes if steps is None else -(-steps // (n // size))):
        order = torch.randperm(n, generator=generator).numpy()
        for start in range(0, n - size + 1, size):
            rows = np.sort(order[start : start + size])  # ascending rows read a memory map in order
            partners = _partners(rows, patients, generator) if pairs else rows
            batches.append((rows, partners))
    return batches[:steps]


def _partners(rows: np.ndarray, patients: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """A random image of the same patient for each row."""
    order = np.argsort(patients, kind="stable")
    first = np.searchsorted(patients[order], patients[rows], side="left")
    last = np.searchsorted(patients[order], patients[rows], side="right")
    draws = torch.rand(len(rows), generator=generator).numpy()
    return order[first + np.floor(draws * (last - first)).astype(np.int64)]
