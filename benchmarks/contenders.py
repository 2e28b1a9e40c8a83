"""What is timed against each other: SparseContrast, timm's dense model, and the rivals, ready to step.

Configurations are read from ``configs/`` with PyYAML alone, so that a machine with torch and timm and
little else can run this. Weights are those of a fresh start: no figure depends on them.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

import timm
import torch
import yaml
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.rivals.blocks import layers, quarters
from benchmarks.rivals.dynamic_vit import DynamicViT
from benchmarks.rivals.evit import evit, stage_rate
from benchmarks.rivals.low_resolution import all_coarse, at_size, equal_cost_size, low_resolution
from benchmarks.rivals.masked import masked
from benchmarks.rivals.random_drop import random_drop, random_patches
from benchmarks.rivals.tome import merged_per_block, tome
from sparsecontrast import losses
from sparsecontrast.config import CONFIG_DIR
from sparsecontrast.levels import STRIDE
from sparsecontrast.methods import build_method
from sparsecontrast.methods.method import Batch
from sparsecontrast.methods.sparse_contrast import SparseContrast
from sparsecontrast.models.sparse_cnn import timm_arguments
from sparsecontrast.models.sparse_vit import SparseViT, build_sparse_vit
from sparsecontrast.precision import Precision, prepare
from sparsecontrast.settings import BackboneConfig, Config, MethodConfig
from sparsecontrast.structure import build

OURS = "sparse_contrast"


@dataclass(frozen=True)
class Model:
    """A backbone of ``configs/backbone`` at one image size; ``changes`` are (dotted key, value) pairs."""

    backbone: str
    size: int
    changes: tuple[tuple[str, Any], ...] = ()

    def configs(self, method: str = OURS) -> tuple[BackboneConfig, MethodConfig]:
        """Read what builds it, with a method of ``configs/method``.

        Raises:
            FileNotFoundError: there is no such backbone.
        """
        told = {"selection": "surprise", "backbone.img_size": self.size, **dict(self.changes)}
        return (
            build(BackboneConfig, _group("backbone", self.backbone, told), "backbone."),
            build(MethodConfig, _group("method", method, told), "method."),
        )


@dataclass(frozen=True)
class Contender:
    """One way to run a model: ``keep`` is the share of tokens that is left at the end."""

    method: str
    keep: float = 1.0
    precision: Precision = "fp32"
    attention: str = "fused"
    compiled: bool = False


@dataclass
class Workload:
    """A contender that can train and infer.

    Attributes:
        module: gives the loss of each row of a ``Batch``.
        network: name of the part of ``module`` that embeds.
        encode: module and images [B, 1, H, W] -> embedding [B, D], with everything that selection needs.
        after_step: what follows an optimizer step.
        cycle: steps from one teacher pass to the next; 1 where all steps are equal.
        precision: fp32; bf16 by autocast; int8, for inference alone.
        device: where it lives.
        optimizer: AdamW over everything that trains.
    """

    module: nn.Module
    network: str
    encode: Callable[[Any, Tensor], Tensor]
    after_step: Callable[[], None]
    cycle: int
    precision: Precision
    device: torch.device
    optimizer: torch.optim.Optimizer = field(init=False)
    frozen: nn.Module | None = field(init=False, default=None)

    def __post_init__(self):
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.05)

    def step(self, batch: Batch) -> None:
        """Train one step as ``trainer.LocalTrainer`` does: forward, loss, backward, AdamW, EMA."""
        self.update(self.loss(batch))

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch, with its graph."""
        with self._autocast():
            return self.module.train()(batch).mean()

    def update(self, loss: Tensor) -> None:
        """What follows the forward pass of a step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.after_step()

    def infer(self, images: Tensor) -> Tensor:
        """Embed images as inference does: with weights that were cast once, not at each call."""
        if self.frozen is None:
            self.frozen = self.freeze(self.precision)
        with torch.no_grad():
            return self.encode(self.frozen, images)

    def freeze(self, precision: Precision) -> nn.Module:
        """Return the module for inference, its network in ``precision``, its weights those of now."""
        self.module.eval()
        if precision == "fp32":
            return self.module
        frozen = copy.copy(self.module)
        frozen._modules = dict(self.module._modules)
        network = prepare(getattr(self.module, self.network), precision, self.device.type)
        if getattr(self.module, self.network)._compiled_call_impl is not None:  # the copy is not compiled
            network.compile(dynamic=False)
        setattr(frozen, self.network, network)
        return frozen

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        enabled = self.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            yield


class Contrast(nn.Module):
    """SimCLR-like training of an encoder: the projector and InfoNCE of SparseContrast, no scorer, no EMA.

    Both views go through the encoder as one batch, which is a little faster than one after the other.
    """

    def __init__(self, encoder: nn.Module, dim: int, config: MethodConfig):
        super().__init__()
        self.encoder, self.temperature = encoder, config.temperature
        self.projector = nn.Sequential(
            nn.Linear(dim, config.projection_hidden),
            nn.LayerNorm(config.projection_hidden),
            nn.GELU(),
            nn.Linear(config.projection_hidden, config.projection_dim),
        )

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of each row [B]."""
        first, second = self.projector(self.encoder(torch.cat([batch.first, batch.second]))).float().chunk(2)
        with torch.autocast(first.device.type, enabled=False):
            return losses.info_nce(first, second, self.temperature, batch.patients)


class Encoder(nn.Module):
    """A network and the function that runs it on images."""

    def __init__(self, network: nn.Module, run: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.network, self.run = network, run

    def forward(self, images: Tensor) -> Tensor:
        """Embed images [B, 1, H, W] -> [B, D]."""
        return self.run(self.network, images)


def build_workload(contender: Contender, model: Model, device: torch.device, seed: int = 0) -> Workload:
    """Build a contender on a device; the same seed gives the same weights.

    Raises:
        FileNotFoundError: the backbone is not among the configs.
        MethodError: the method knows no such ``keep`` on this backbone, told here or in the first step.
    """
    backbone, method = model.configs()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make = _ours if contender.method == OURS else _rival
        work = make(contender, backbone, method, device, seed)
    for part in work.module.modules():
        if hasattr(part, "fused_attn"):  # a flag of timm's attention
            setattr(part, "fused_attn", contender.attention == "fused")  # noqa: B010
    if contender.compiled:
        torch._dynamo.config.recompile_limit = 1000  # one compilation a contender, not one shape for all
        for name in ("backbone", "saliency", "encoder", "projector"):
            if hasattr(work.module, name):
                getattr(work.module, name).compile(dynamic=False)
    return work


def is_vit(model: Model) -> bool:
    """Tell whether the token methods apply to a backbone."""
    return model.configs()[0].name.startswith("vit_")


def stock(model: Model) -> Contender:
    """Timm's network as it comes: the dense one, but for a ResNet whose BatchNorm ours cannot have."""
    batch_norm = not is_vit(model) and _has_batch_norm(model.configs()[0].name)
    return Contender("stock" if batch_norm else "dense")


def random_batch(size: int, images: int, device: torch.device, step: int) -> Batch:
    """Two views of noise: every shape is static, so no figure depends on what the images show."""
    generator = torch.Generator().manual_seed(step)
    first, second = (torch.randn(images, 1, size, size, generator=generator).to(device) for _ in range(2))
    return Batch(first, second, torch.arange(images).to(device), generator, step)


def _ours(
    contender: Contender, backbone: BackboneConfig, method: MethodConfig, device: torch.device, seed: int
) -> Workload:
    # build_method reads these of a run's configuration and nothing else
    privacy = SimpleNamespace(name="none")
    run = cast(Config, SimpleNamespace(seed=seed, backbone=backbone, method=method, privacy=privacy))
    module = cast(SparseContrast, build_method(run)).to(device)
    module.keep = contender.keep
    return Workload(
        module, "backbone", lambda m, images: m.encode(images, contender.keep), module.after_step,
        1 if module.teacher is None else method.distill_every, contender.precision, device,
    )  # fmt: skip


def _rival(
    contender: Contender, backbone: BackboneConfig, method: MethodConfig, device: torch.device, seed: int
) -> Workload:
    if backbone.name.startswith("vit_"):
        sparse = build_sparse_vit(backbone, method.cell)
        encoder, dim = _vit_encoder(contender, sparse, seed), sparse.embed_dim
    else:
        # the network inside ours, and timm's own norms for stock alone
        plain = {"model_name": backbone.name, "in_chans": 1, "num_classes": 0}
        network: Any = timm.create_model(
            **(plain if contender.method == "stock" else timm_arguments(backbone))
        )
        size = backbone.img_size
        if contender.method == "low_resolution":
            size = equal_cost_size(size, STRIDE, contender.keep)
        encoder, dim = Encoder(network, lambda net, x: low_resolution(net, x, size)), network.num_features
    module = Contrast(encoder, dim, method).to(device)
    return Workload(
        module, "encoder", lambda m, images: m.encoder(images), _nothing, 1, contender.precision, device
    )


def _vit_encoder(contender: Contender, sparse: SparseViT, seed: int) -> Encoder:
    vit, keep, generator = sparse.vit, contender.keep, torch.Generator().manual_seed(seed)
    patches, (size, _) = vit.patch_embed.num_patches, vit.patch_embed.img_size
    small = equal_cost_size(size, vit.patch_embed.patch_size[0], keep)
    stages = quarters(len(layers(vit)))
    rate = stage_rate(keep, len(stages))

    def draw(x: Tensor) -> Tensor:
        return random_patches(len(x), patches, keep, generator).to(x.device)

    makers: dict[str, Callable[[], Encoder]] = {
        "dense": lambda: Encoder(vit, lambda net, x: net(x)),
        "evit": lambda: Encoder(vit, lambda net, x: evit(net, x, rate)),
        "evit_one_stage": lambda: Encoder(vit, lambda net, x: evit(net, x, keep, stages[:1])),
        "dynamic_vit": lambda: Encoder(DynamicViT(vit, rate), lambda net, x: net(x, generator)),
        "tome": lambda: Encoder(vit, lambda net, x: tome(net, x, merged_per_block(net, keep))),
        "random_drop": lambda: Encoder(vit, lambda net, x: random_drop(net, x, draw(x))),
        "masked": lambda: Encoder(vit, lambda net, x: masked(net, x, draw(x))),
        "low_resolution": lambda: Encoder(at_size(vit, small), lambda net, x: low_resolution(net, x, small)),
        "all_coarse": lambda: Encoder(sparse, all_coarse),
    }  # fmt: skip
    return makers[contender.method]()


@lru_cache
def _has_batch_norm(name: str) -> bool:
    with torch.device("meta"):
        return any(isinstance(part, _BatchNorm) for part in timm.create_model(name).modules())


def _group(group: str, name: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Read one YAML file of a config group as Hydra would: its defaults, itself, then what is told."""
    file = CONFIG_DIR / group / f"{name}.yaml"
    values = yaml.safe_load(file.read_text())
    bases = [base for base in values.pop("defaults", []) if base != "_self_"]
    below = {k: v for base in bases for k, v in _group(group, base, {}).items()}
    values = {**below, **values}
    values = {
        k: told[v[2:-1]] if isinstance(v, str) and v.startswith("${") and told else v
        for k, v in values.items()
    }
    return {**values, **{k.split(".", 1)[1]: v for k, v in told.items() if k.startswith(f"{group}.")}}


def _nothing() -> None:
    """Nothing follows a step of a rival."""
