"""What ``benchmarks.cells`` compares: SparseAttnNet, two other choices of its pixels, a small CNN, a ViT.

All are trained by ``sparsecontrast.classify.recipe``: same pictures, augmentation, class weights, label
smoothing, and the last averaged weights of a training on all cells that are not tested. The random and the
threshold choice read 15 % of the pixels, and so does SparseAttnNet in the arm where its k is held. Learning
rates, seed 0, trials of 40 to 120 epochs on splits of their own: SparseAttnNet 1e-3 and 3e-3, the CNN 1e-3
and 2e-3; the better is here.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsecontrast.classify.settings import ClassifyConfig
from sparsecontrast.methods.sparse_attn_net import Labelled, SparseAttnNet


@dataclass(frozen=True)
class Arm:
    """A contender: its learning rate, its epochs (None: as all), and the tasks that it takes part in."""

    lr: float
    selection: str | None = None  # of SparseAttnNet
    k_held: bool = False  # at its ceiling, the 15 %, instead of following the held-out loss
    dropout: float = 0.2
    epochs: int | None = None
    tasks: tuple[str, ...] | None = None  # None: all


ARMS = {
    "sparse_attn_net": Arm(3e-3, "learned"),
    "sparse_attn_net_15": Arm(3e-3, "learned", k_held=True, tasks=("mixed",)),
    "random": Arm(3e-3, "random", k_held=True, tasks=("mixed",)),
    "threshold": Arm(3e-3, "threshold", k_held=True, tasks=("mixed",)),
    "small_cnn": Arm(2e-3),
    # an epoch of it costs six of the others'; it still gets more CPU time than any of them
    "vit_tiny": Arm(5e-4, epochs=40, tasks=("mixed",)),
}


class Dense(nn.Module):
    """A network that reads every pixel, behind the interface that ``fit`` trains.

    Args:
        body: images [B, 3, S, S] -> logits [B, C].
        class_weights: of the cross-entropy [C].
        label_smoothing: in [0, 1).
    """

    def __init__(self, body: nn.Module, class_weights: Tensor, label_smoothing: float):
        super().__init__()
        self.body, self.label_smoothing = body, label_smoothing
        self.weights = nn.Buffer(class_weights, persistent=False)

    def forward(self, batch: Labelled) -> Tensor:
        """Return the loss of each row [B]."""
        return F.cross_entropy(
            self.logits(batch.images).float(), batch.labels, self.weights,
            reduction="none", label_smoothing=self.label_smoothing,
        )  # fmt: skip

    def logits(self, images: Tensor) -> Tensor:
        """Classify images [B, 3, S, S]: [B, C]."""
        return self.body(images)


def small_cnn(classes: int, dropout: float, channels: tuple[int, ...] = (32, 64, 128, 256)) -> nn.Sequential:
    """Four strided 3x3 convolutions with BatchNorm, a global mean, dropout and one linear layer."""
    layers, before = [], 3
    for width in channels:
        convolution = nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(before, classes)
    )


def vit_tiny(classes: int, size: int) -> nn.Module:
    """Timm's ViT-tiny (192 wide, 12 blocks) on 16 x 16 patches of the whole picture, from random weights."""
    return timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=classes, drop_path_rate=0.1)


def build_arm(name: str, config: ClassifyConfig, classes: int, weights: Tensor) -> nn.Module:
    """Build a contender with the weights of ``config.seed``."""
    arm, fit = ARMS[name], config.train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if arm.selection is not None:
            floor = config.method.share if arm.k_held else config.method.share_floor
            method = dataclasses.replace(config.method, selection=arm.selection, share_floor=floor)
            return SparseAttnNet(method, classes, fit.image_size, weights, fit.label_smoothing)
        body = small_cnn(classes, arm.dropout) if name == "small_cnn" else vit_tiny(classes, fit.image_size)
        return Dense(body, weights, fit.label_smoothing)


def facts(network: Any, size: int) -> dict[str, Any]:
    """Parameters, multiply-adds times two of one picture (coarse map and all), share of the pixels read."""
    image = torch.zeros(1, 3, size, size)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network.eval().logits(image)
    share = network.pixel_share() if isinstance(network, SparseAttnNet) else 1.0
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "mflops": round(counter.get_total_flops() / 1e6, 3), "pixels_read": round(share, 4),
    }  # fmt: skip
