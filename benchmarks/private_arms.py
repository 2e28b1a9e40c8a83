"""The steps that ``benchmarks.privacy`` times: private and not, of SparseContrast, of raw timm, of Opacus.

All compute the same loss, InfoNCE between the tokens of an image's two views, behind the same projector.
Raw timm reaches a share of the tokens by dropping patches, the same ones of all rows and both views, which
is the cheapest way there is. timm's own ``PatchDropout`` draws them inside the network, where functorch,
which runs the network a second time, refuses to (and would draw others, for another loss's gradients).
"""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.contenders import Model, is_vit
from benchmarks.rivals.plain_opacus import freeze_tokens, opacus_step
from sparsecontrast import losses
from sparsecontrast.coupling import noise_batch
from sparsecontrast.methods import build_method
from sparsecontrast.methods.looking import build_projector
from sparsecontrast.methods.method import Batch
from sparsecontrast.methods.patch_contrast import PatchContrast
from sparsecontrast.models.sparse_vit import build_sparse_vit
from sparsecontrast.noise import SecureStream
from sparsecontrast.privacy import Mechanism, PatientSGD
from sparsecontrast.settings import Config
from sparsecontrast.trainer import explicit_attention

OURS, TIMM = "patch_contrast", "timm"
STAGES = ("forward_backward", "clip", "noise", "optimizer")
CLIP, SIGMA = 1.0, 1.0
MECHANISM = Mechanism(sample_rate=0.01, noise_multiplier=SIGMA, max_grad_norm=CLIP, patients=1600)


@dataclass(frozen=True)
class Arm:
    """One way to take a step.

    Attributes:
        method: ``OURS``, ``TIMM``, or a way of ``plain_opacus`` with ``opacus_`` before it.
        keep: share of the tokens.
        private: clipped and noised; Opacus is always.
        precision: fp32 or bf16.
        films: images of each patient.
        pieces: virtual steps that the batch is cut into.
    """

    method: str
    keep: float = 1.0
    private: bool = False
    precision: str = "fp32"
    films: int = 1
    pieces: int = 1


class Step:
    """A step that notes the CPU seconds of its stages; what is not watched is forward and backward.

    Args:
        run: the step.
        module: what it trains.
    """

    def __init__(self, run: Callable[[], object], module: nn.Module):
        self.run, self.module = run, module
        self.spent: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self._now: dict[str, float] = {}

    def __call__(self) -> None:
        """Take one step."""
        self._now = {}
        started = time.process_time()
        self.run()
        self._now[STAGES[0]] = time.process_time() - started - sum(self._now.values())
        for stage, seconds in self.spent.items():
            seconds.append(self._now.get(stage, 0.0))

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Count what a method of ``owner`` takes as this stage."""
        method = getattr(owner, name)

        def timed(*args: Any, **named: Any) -> Any:
            started = time.process_time()
            try:
                return method(*args, **named)
            finally:
                self._now[stage] = self._now.get(stage, 0.0) + time.process_time() - started

        setattr(owner, name, timed)


class Tokens(VisionTransformer):
    """A timm ViT that gives its patches' tokens; views [B, V, 1, H, W] of a row become [B, V K, D]."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Describe the patches of all views."""
        found = self.fc_norm(self.forward_features(images.flatten(0, 1)))[:, self.num_prefix_tokens :]
        return found.reshape(len(images), -1, found.shape[2])


class FixedDrop(nn.Module):
    """Keep patches ``kept`` [K], of every row the same, and the prefix tokens."""

    def __init__(self, prefix: int, kept: Tensor):
        super().__init__()
        self.prefix, self.kept = prefix, kept  # no buffer: Opacus refuses layers that have one

    def forward(self, x: Tensor) -> Tensor:
        """Drop tokens of [B, prefix + L, D]."""
        return torch.cat([x[:, : self.prefix], x[:, self.prefix + self.kept]], dim=1)


class Raw(nn.Module):
    """Patch contrast on timm's own network: no scorer, no coarse tokens.

    Args:
        network: gives tokens [B, V K, D] of views [B, V, 1, H, W].
        projector: as ours.
        temperature: of the loss.
        stacked: one pass for both views, which is the faster; else one after the other, as hooks need it
            that sit on layers inside the network: they would take a view for a row.
    """

    def __init__(self, network: nn.Module, projector: nn.Module, temperature: float, stacked: bool):
        super().__init__()
        self.network, self.projector = network, projector
        self.temperature, self.stacked = temperature, stacked

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of each row [B]."""
        views = torch.stack([batch.first, batch.second], 1)
        parts = [views] if self.stacked else views.split(1, 1)
        first, second = torch.cat([self.projector(self.network(part)) for part in parts], 1).chunk(2, 1)
        with torch.autocast(first.device.type, enabled=False):
            return losses.patch_info_nce(first, second, self.temperature)


class Maps(nn.Module):
    """A timm CNN whose last map's positions are its tokens."""

    def __init__(self, cnn: nn.Module):
        super().__init__()
        self.cnn = cnn

    def forward(self, images: Tensor) -> Tensor:
        """Describe the positions of all views [B, V, 1, H, W]: [B, V h w, D]."""
        maps = self.cnn.forward_features(images.flatten(0, 1)).flatten(2).mT  # type: ignore[operator]
        return maps.reshape(len(images), -1, maps.shape[2])


def build_step(arm: Arm, model: Model, images: int) -> Step:
    """Build an arm on a batch of noise; the weights of a method are the same for all its arms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _ours(arm, model) if arm.method == OURS else _raw(arm, model)
    module.train()
    if arm.precision == "bf16":
        explicit_attention(module)
    make = _private if arm.method == OURS and arm.private else _opacus if arm.private else _plain
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.05)
    batch = noise_batch(_Sized(module, model.size), images)
    batch = replace(batch, patients=torch.arange(images) // arm.films)
    return make(arm, module, optimizer, batch)


class _Sized:
    """What ``noise_batch`` asks of a method: the images' size, and its parameters' type."""

    def __init__(self, module: nn.Module, size: int):
        self.backbone, self.parameters = SimpleNamespace(img_size=size), module.parameters


def _ours(arm: Arm, model: Model) -> nn.Module:
    backbone, method = model.configs(OURS)
    told = {"seed": 0, "backbone": backbone, "method": method, "privacy": SimpleNamespace(name="dp_sgd")}
    module = cast(PatchContrast, build_method(cast(Config, SimpleNamespace(**told))))
    module.keep = arm.keep
    return module


def _raw(arm: Arm, model: Model) -> nn.Module:
    backbone, method = model.configs(OURS)
    if is_vit(model):
        network: Any = build_sparse_vit(backbone, method.cell).vit
        width, patches = network.embed_dim, network.patch_embed.num_patches
        network.__class__ = Tokens
        if arm.keep < 1:
            kept = torch.randperm(patches)[: round(arm.keep * patches)].sort().values
            network.patch_drop = FixedDrop(network.num_prefix_tokens, kept)
        if arm.method == "opacus_frozen":
            freeze_tokens(network)
    else:
        cnn: Any = timm.create_model(backbone.name, in_chans=1, num_classes=0)
        network, width = Maps(cnn), cnn.num_features
    return Raw(network, build_projector(width, method), method.temperature, arm.method != "opacus_frozen")


def _plain(arm: Arm, module: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Step:
    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=arm.precision == "bf16"):
            loss = module(batch).mean()
        loss.backward()
        optimizer.step()
        if arm.method == OURS:
            module.after_step()  # type: ignore[operator]

    step = Step(run, module)
    step.watch(optimizer, "step", "optimizer")
    return step


def _private(arm: Arm, module: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Step:
    engine = PatientSGD(
        cast(Any, module), optimizer, MECHANISM, _booked, SecureStream(), bf16=arm.precision == "bf16"
    )
    engine.start_round()
    pieces = list(_cut(batch, arm.pieces))
    step = Step(lambda: engine.step(pieces), module)
    step.watch(engine.optimizer, "clip_and_accumulate", "clip")
    step.watch(engine.optimizer, "add_noise", "noise")
    step.watch(optimizer, "step", "optimizer")
    return step


def _booked(told: Mechanism) -> None:
    """Book nothing: what the ledger costs, ``benchmarks.ledger_cost`` measures."""


def _opacus(arm: Arm, module: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Step:
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # the images have no gradient
    warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
    way = arm.method.removeprefix("opacus_")
    run, private = opacus_step(way, module, optimizer, len(batch.first), CLIP, SIGMA)

    def losses_of(hooked: Callable[[Batch], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=arm.precision == "bf16"):
            return hooked(batch)

    step = Step(lambda: run(losses_of), module)
    step.watch(private, "clip_and_accumulate", "clip")
    step.watch(private, "add_noise", "noise")
    step.watch(optimizer, "step", "optimizer")
    return step


def _cut(batch: Batch, pieces: int) -> Iterator[Batch]:
    """Cut a batch between patients; shares of equal size."""
    assert batch.shift is not None
    size = len(batch.patients) // pieces
    for start in range(0, len(batch.patients), size):
        rows = slice(start, start + size)
        yield replace(
            batch, first=batch.first[rows], second=batch.second[rows], patients=batch.patients[rows],
            shift=batch.shift[rows],
        )  # fmt: skip
