"""The arms of ``benchmarks.quality``: what is trained, and the ways in which it is asked afterwards."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.contenders import OURS, Contender, Model, Workload, build_workload
from benchmarks.rivals.random_drop import random_drop
from sparsecontrast.data.transforms import Augmentation, evaluation_view, two_views
from sparsecontrast.methods.method import Batch
from sparsecontrast.settings import TrainConfig
from sparsecontrast.trainer import build_optimizer, derive_seed, explicit_attention, lr_factor

BATCH = 128  # of the encoding
LEAN = 0.3  # the share at which the bars of speed are held
OF_A_CNN = ("dense", OURS, "low_resolution")  # what is no matter of tokens


@dataclass(frozen=True)
class Arm:
    """One way to spend a training budget.

    Attributes:
        contender: method and share of tokens.
        changes: to the method's configuration.
        modes: how the trained network is asked: ``own`` as it was trained, ``dense`` with all tokens,
            ``int8`` as it was trained with linear layers in 8 bits (on a CPU alone); the rest in bf16.
        same_time_as: None to train the protocol's steps; else the arm of the same contender that did, and
            from whose CPU time follows how many steps fit into that of the dense arm.
    """

    contender: Contender
    changes: tuple[tuple[str, Any], ...] = ()
    modes: tuple[str, ...] = ("own",)
    same_time_as: str | None = None


def arms(protocol: "Protocol") -> dict[str, Arm]:
    """Name all arms; the smaller image of the low-resolution rivals has no fewer tokens than ours."""
    keep, side = protocol.keep, protocol.size // protocol.patch
    vit = protocol.backbone.startswith("vit_")
    smaller = (math.ceil(keep**0.5 * side) / side) ** 2
    sparse = Contender(OURS, keep)
    both = ("own", "dense")
    all_modes = both if torch.cuda.is_available() else (*both, "int8")
    plain = ("method.focus", False)
    found = {
        "dense": Arm(Contender("dense")),
        "ours": Arm(sparse, (), all_modes),
        "ours_lean": Arm(Contender(OURS, LEAN)),
        "low_resolution": Arm(Contender("low_resolution", smaller)),
        "random": Arm(sparse, (("selection", "random"), plain), both),
        "all_coarse": Arm(Contender("all_coarse")),
        "patch_dropout": Arm(Contender("random_drop", keep), (), both),
        "ours_at_equal_time": Arm(sparse, (), both, "ours"),
        "low_resolution_at_equal_time": Arm(
            Contender("low_resolution", smaller), same_time_as="low_resolution"
        ),
        "patch_dropout_at_equal_time": Arm(
            Contender("random_drop", keep), (), both, same_time_as="patch_dropout"
        ),
        "ours_without_focus": Arm(sparse, (plain,)),
        "dense_with_focus": Arm(Contender(OURS, 1.0)),
        "centre": Arm(sparse, (("selection", "centre"), plain)),
        "energy": Arm(sparse, (("selection", "energy"), plain)),
        "attention": Arm(sparse, (("selection", "attention"),), both),
        "evit": Arm(Contender("evit", keep)),
        "dynamic_vit": Arm(Contender("dynamic_vit", keep)),
        "tome": Arm(Contender("tome", keep)),
    }
    return {name: arm for name, arm in found.items() if vit or arm.contender.method in OF_A_CNN}


@dataclass(frozen=True)
class Protocol:
    """The budget that all arms of one data set share.

    Attributes:
        backbone: a name of ``configs/backbone``.
        size: of the images in pixels.
        patch: pixels of a patch's side; of a CNN, of a tile's.
        depth: blocks of the network; None for the backbone's own.
        steps: of the optimizer.
        batch: images of a step, two views each.
        lr: the highest learning rate.
        temperature: of the contrast.
        keep: share of tokens of the sparse arms.
    """

    backbone: str = "vit_tiny"
    size: int = 96
    patch: int = 8
    depth: int | None = 4
    steps: int = 300
    batch: int = 32
    lr: float = 1e-3
    temperature: float = 0.15
    keep: float = 0.39

    @property
    def grain(self) -> int:
        """Side in pixels of the patch by which lesions are called small: a CNN's as a ViT's at 224 px."""
        return self.patch if self.backbone.startswith("vit_") else self.size // 14


PROTOCOLS = {
    "cpu": Protocol(),
    "cnn": Protocol("convnext_atto", size=128, patch=32, depth=None, steps=200),
    "gpu": Protocol("vit_tiny", size=224, patch=16, depth=None, steps=6000, batch=128, lr=5e-4, keep=0.3),
    "gpu_small": Protocol(
        "vit_small", size=224, patch=16, depth=None, steps=6000, batch=128, lr=5e-4, keep=0.3
    ),
}


@dataclass(frozen=True)
class Trained:
    """Features by mode [N, D], what the training was like, and what it was told (``told``)."""

    features: dict[str, np.ndarray]
    facts: dict[str, float]
    told: str = ""


def told(arm: Any, protocol: Any) -> str:
    """Say in words what decides a result besides data and seed; a file of other words is not reused.

    EViT's says where its tokens drop: once it was in the last of four blocks alone.
    """
    staged = isinstance(arm, Arm) and arm.contender.method == "evit"
    return f"{protocol} {arm}{' drops at quarters of the depth' if staged else ''}"


def equal_time_steps(dense: Trained, same: Trained) -> int:
    """Steps that fit into the dense arm's CPU time, by that of an arm with as many steps and equal cost."""
    return round(same.facts["steps"] * dense.facts["train_seconds"] / same.facts["train_seconds"])


def train_arm(
    arm: Arm, protocol: Protocol, images: np.ndarray, rows: np.ndarray, seed: int, total: int
) -> Trained:
    """Train one arm on ``images[rows]`` and embed all images.

    Args:
        arm: what to train.
        protocol: the budget.
        images: uint8 [N, S, S].
        rows: of the training images.
        seed: of weights, batches and views: the same for every arm, so that differences are paired.
        total: steps.
    """
    work = build_arm(arm, protocol, seed)
    generator = torch.Generator().manual_seed(derive_seed(seed, "quality"))
    facts = fit(work, lambda step: _batch(images, rows, protocol, generator, step), protocol, total)
    facts["chance_loss"] = math.log(min(protocol.batch, len(rows)))
    features = {mode: encode(arm, work, images, protocol, mode) for mode in arm.modes}
    return Trained(features, facts, told(arm, protocol))


def fit(work: Workload, batch_of: Callable[[int], Batch], protocol: Protocol, total: int) -> dict[str, float]:
    """Train ``total`` steps; returns how many, the CPU seconds they took (of a GPU: seconds), and the loss.

    The seconds are those of steps alone: batches and views are everybody's.
    """
    optimizer = build_optimizer(work.module, _train_config(protocol))
    losses, spent = [], 0.0
    for step in range(total):
        batch = batch_of(step)
        for group in optimizer.param_groups:
            group["lr"] = protocol.lr * lr_factor(step, total, 0.1)
        start = _clock()
        loss = work.loss(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        work.after_step()
        spent += _clock() - start
        metrics = getattr(work.module, "metrics", dict)()
        losses.append(metrics.get("loss", float(loss.detach())))  # the contrast alone
    return {"steps": total, "train_seconds": spent, "loss": float(np.mean(losses[-20:]))}


def untrained(protocol: Protocol, seed: int, images: np.ndarray) -> np.ndarray:
    """Embed images by the dense network before its first step."""
    arm = arms(protocol)["dense"]
    return encode(arm, build_arm(arm, protocol, seed), images, protocol, "own")


def build_arm(arm: Arm, protocol: Protocol, seed: int) -> Workload:
    """Build the network of an arm; equal seeds start from equal backbones."""
    changes: list[tuple[str, Any]] = [("method.temperature", protocol.temperature), *arm.changes]
    if protocol.depth is not None:
        changes.append(("backbone.depth", protocol.depth))
    cnn = not protocol.backbone.startswith("vit_")
    grid = (
        ("backbone.tiles", protocol.size // protocol.patch)
        if cnn
        else ("backbone.patch_size", protocol.patch)
    )
    changes.append(grid)
    model = Model(protocol.backbone, protocol.size, tuple(changes))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = build_workload(_bf16(arm.contender), model, device, seed)
    if device.type == "cpu":
        explicit_attention(work.module)
    return work


@torch.no_grad()
def encode(arm: Arm, work: Workload, images: np.ndarray, protocol: Protocol, mode: str) -> np.ndarray:
    """Embed all images, float32 [N, D]."""
    return embed(_encoder(arm, work, mode), images, protocol.size, work.device)


@torch.no_grad()
def embed(run: Callable[[Tensor], Tensor], images: np.ndarray, size: int, device: torch.device) -> np.ndarray:
    """Embed uint8 images [N, S, S] by ``run``, a batch at a time: float32 [N, D]."""
    found = []
    for start in range(0, len(images), BATCH):
        view = evaluation_view(torch.from_numpy(np.array(images[start : start + BATCH])), size)
        found.append(run(view.to(device)).float().cpu())
    return torch.cat(found).numpy()


def _encoder(arm: Arm, work: Workload, mode: str) -> Callable[[Tensor], Tensor]:
    """The network is frozen as for inference; what chooses the cells stays in fp32, as in evaluation."""
    module: Any = work.freeze("int8" if mode == "int8" else "bf16")
    if mode != "dense":
        return lambda x: work.encode(module, x)
    if arm.contender.method == OURS:
        return lambda x: module.encode(x, "dense")
    module.encoder.run = lambda network, x: random_drop(network, x, None)
    return module.encoder  # type: ignore[no-any-return]


def _batch(
    images: np.ndarray, rows: np.ndarray, protocol: Protocol, generator: torch.Generator, step: int
) -> Batch:
    size = min(protocol.batch, len(rows))
    drawn = np.sort(rows[torch.randperm(len(rows), generator=generator)[:size].numpy()])
    pixels = torch.from_numpy(np.array(images[drawn]))
    views = two_views(pixels, generator, protocol.size, Augmentation(area=(0.6, 1.0), degrees=7.0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # draws of the method's own must not shift the batches and views of the steps to come
    own = torch.Generator().manual_seed(derive_seed(generator.initial_seed(), "method", step))
    return Batch(views.first.to(device), views.second.to(device), torch.arange(size).to(device), own, step)


def _clock() -> float:
    import time

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _bf16(contender: Contender) -> Contender:
    return Contender(contender.method, contender.keep, "bf16", "fused")


def _train_config(protocol: Protocol) -> TrainConfig:
    return TrainConfig(
        batch_size=protocol.batch, local_epochs=1, lr=protocol.lr, weight_decay=0.05, warmup_rounds=0.1,
        crop_area=(0.6, 1.0), rotation=7, precision="bf16", compile=False, threads=1,
    )  # fmt: skip


def save(trained: Trained, path: Path) -> None:
    """Write features and facts, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    facts = np.array(sorted(trained.facts.items()), dtype=[("name", "U32"), ("value", "f8")])
    arrays: dict[str, Any] = {f"mode_{k}": v.astype(np.float16) for k, v in trained.features.items()}
    with part.open("wb") as file:
        np.savez(file, facts=facts, told=np.array(trained.told), **arrays)
    part.replace(path)


def load(path: Path) -> Trained:
    """Read what ``save`` wrote."""
    with np.load(path, allow_pickle=False) as found:
        features = {k[5:]: found[k].astype(np.float32) for k in found.files if k.startswith("mode_")}
        facts = {str(n): float(v) for n, v in found["facts"]}
        return Trained(features, facts, str(found["told"]))
