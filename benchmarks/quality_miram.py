"""The arms of ``benchmarks.quality --method miram``: two resolutions against one, and against contrast.

- ``mae``: a masked autoencoder, one decoder over the encoder's patches, held to all of their pixels.
- ``mae_low``: the same, held to an image shrunk by half: what MIRAM's first decoder does alone.
- ``miram_some``: a sixteenth of the hidden patches at high resolution a step, by softmax attention.
- ``miram``, and the same with each other attention in the second decoder; ``softmax`` is what they stand for.
- ``moco_v3``: contrast over the batch with a momentum encoder (``rivals/moco_v3.py``).

All start from the same encoder and see the same films in the same order, each in the views of its method.
The arms at equal time take as many steps as fit into the CPU time of ``mae``.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import quality_arms as qa
from benchmarks.contenders import Workload
from benchmarks.rivals.moco_v3 import TEMPERATURE, MocoV3
from sparsecontrast.config import compose
from sparsecontrast.data.transforms import Augmentation, mae_view, two_views
from sparsecontrast.methods import build_method
from sparsecontrast.methods.method import Batch
from sparsecontrast.methods.miram import Miram
from sparsecontrast.models.sparse_vit import build_sparse_vit
from sparsecontrast.settings import Config
from sparsecontrast.trainer import derive_seed, explicit_attention

VIEW = Augmentation(area=(0.6, 1.0), degrees=7.0)


@dataclass(frozen=True)
class Protocol(qa.Protocol):
    """The budget that all arms share; ``keep`` and ``temperature`` mean nothing here.

    Attributes:
        mask_ratio: of what is hidden.
        decoder: width of the decoders.
        decoder_depth: blocks of each.
        landmarks: of the linear attentions.
    """

    steps: int = 600
    mask_ratio: float = 0.75
    decoder: int = 96
    decoder_depth: int = 2
    landmarks: int = 64


@dataclass(frozen=True)
class Arm:
    """One way to spend the budget: MIRAM with changes to its keys, or MoCo v3; see ``quality_arms.Arm``."""

    changes: tuple[str, ...] = ()
    contrast: bool = False
    same_time_as: str | None = None


PROTOCOLS = {
    "cpu": Protocol(),
    "gpu": Protocol(
        "vit_tiny", size=224, patch=16, depth=None, steps=8000, batch=128, lr=5e-4, decoder=192,
        decoder_depth=4,
    ),
}  # fmt: skip
QUICK = Protocol(
    size=32, patch=4, depth=1, steps=2, batch=8, decoder=16, decoder_depth=1, landmarks=8
)  # fmt: skip


def arms(protocol: Protocol) -> dict[str, Arm]:
    """Name all arms."""
    plain = ("method.high_weight=0",)
    linear = ("linformer", "performer", "softmax")
    return {
        "mae": Arm((*plain, "method.upsample=1")),
        "mae_low": Arm(plain),
        "miram": Arm(),
        "miram_some": Arm(("method.high_share=0.0625", "method.attention=softmax")),
        **{f"miram_{name}": Arm((f"method.attention={name}",)) for name in linear},
        "moco_v3": Arm(contrast=True),
        "miram_some_at_equal_time": Arm(
            ("method.high_share=0.0625", "method.attention=softmax"), same_time_as="miram_some"
        ),
        "miram_at_equal_time": Arm(same_time_as="miram"),
        "moco_v3_at_equal_time": Arm(contrast=True, same_time_as="moco_v3"),
    }


def train_arm(
    arm: Arm, protocol: Protocol, images: np.ndarray, rows: np.ndarray, seed: int, total: int
) -> qa.Trained:
    """Train one arm on ``images[rows]`` and embed all images; see ``quality_arms.train_arm``."""
    work = build_arm(arm, protocol, seed, total)
    facts = qa.fit(work, lambda step: _batch(arm, images, rows, protocol, seed, step), protocol, total)
    if arm.contrast:  # a blind guess costs 2 tau ln(batch), in each direction
        facts["chance_loss"] = 4 * TEMPERATURE * math.log(min(protocol.batch, len(rows)))
    return qa.Trained({"own": _encode(work, images, protocol)}, facts, qa.told(arm, protocol))


def untrained(protocol: Protocol, seed: int, images: np.ndarray) -> np.ndarray:
    """Embed images by the encoder that all arms of a seed start from."""
    return _encode(build_arm(Arm(), protocol, seed, 1), images, protocol)


def build_arm(arm: Arm, protocol: Protocol, seed: int, total: int) -> Workload:
    """Build an arm's network; equal seeds start from equal encoders."""
    config = _config(arm, protocol, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module: Any = _contrast(config, total) if arm.contrast else build_method(config)
    module.to(device)
    if device.type == "cpu":
        explicit_attention(module)
    encode = _embed
    return Workload(module, "backbone", encode, module.after_step, 1, "bf16", device)


def _embed(module: Miram | MocoV3, images: torch.Tensor) -> torch.Tensor:
    return module.encode(images)


def _config(arm: Arm, protocol: Protocol, seed: int) -> Config:
    p = protocol
    told = [
        "method=miram", f"backbone={p.backbone}", f"backbone.img_size={p.size}",
        f"backbone.patch_size={p.patch}", f"backbone.depth={'null' if p.depth is None else p.depth}",
        f"method.mask_ratio={p.mask_ratio}", f"method.decoder_dim={p.decoder}",
        f"method.decoder_depth={p.decoder_depth}", f"method.landmarks={p.landmarks}", f"seed={seed}",
    ]  # fmt: skip
    return compose([*told, *arm.changes])


def _contrast(config: Config, total: int) -> MocoV3:
    """Draw the encoder first, as ``build_method`` does, so that it is the other arms'."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return MocoV3(build_sparse_vit(config.backbone, config.method.cell), total)


def _batch(arm: Arm, images: np.ndarray, rows: np.ndarray, protocol: Protocol, seed: int, step: int) -> Batch:
    """Draw the films of a step, the same for all arms, then an arm's own views and masks."""
    size = min(protocol.batch, len(rows))
    films = torch.Generator().manual_seed(derive_seed(seed, "films", step))
    drawn = np.sort(rows[torch.randperm(len(rows), generator=films)[:size].numpy()])
    pixels, own = torch.from_numpy(np.array(images[drawn])), torch.Generator()
    own.manual_seed(derive_seed(seed, "views", step))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codes = torch.arange(size).to(device)
    if arm.contrast:
        views = two_views(pixels, own, protocol.size, VIEW)
        return Batch(views.first.to(device), views.second.to(device), codes, own, step)
    only = mae_view(pixels, own, protocol.size, VIEW)[0].to(device)
    return Batch(only, only, codes, own, step)


def _encode(work: Workload, images: np.ndarray, protocol: Protocol) -> np.ndarray:
    frozen = work.freeze("bf16")
    return qa.embed(lambda x: work.encode(frozen, x), images, protocol.size, work.device)
