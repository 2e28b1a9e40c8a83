"""The local loop of one site and one round; it sees only the Method protocol.

Everything random derives from (seed, site, round), so a round can be run again, in another process
or after a crash, and gives the same bits. What the site keeps between rounds (projection head, EMA
teacher, optimizer) is one safetensors file.
"""

import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sparsecontrast.checkpoint import read_tensors, write_tensors
from sparsecontrast.config import Config, TrainConfig, refuse_private_training
from sparsecontrast.data.transforms import Augmentation, shifted_views, two_views
from sparsecontrast.errors import MethodError, TooFewImagesError
from sparsecontrast.methods.method import Batch, Method

MIN_BATCH = 2  # contrast needs a negative


@dataclass(frozen=True)
class TrainResult:
    """What one local round did; every field may leave the site.

    Attributes:
        steps: optimizer steps.
        images: image presentations (steps x batch).
        seconds: wall time.
        metrics: means over the steps, ``loss`` among them.
    """

    steps: int
    images: int
    seconds: float
    metrics: dict[str, float]


def derive_seed(seed: int, *words: object) -> int:
    """Derive an independent 63-bit seed from a run's seed and a name, such as ("site", "a", 3)."""
    digest = hashlib.sha256(repr((seed, *words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class LocalTrainer:
    """Train one method at one site, a round at a time.

    Args:
        method: an ``nn.Module`` that holds the global weights of the round to come.
        config: the run's configuration.
        site: the site's name; part of every derived seed.

    Raises:
        PrivacyError: training would not be as private as configured.
    """

    def __init__(self, method: Method, config: Config, site: str):
        refuse_private_training(config)
        self.method, self.config, self.site = method, config, site
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module: nn.Module = method.to(self.device)  # type: ignore[attr-defined]
        if config.train.precision == "bf16" and self.device.type == "cpu":
            explicit_attention(self.module)
        if config.train.compile:
            # one compilation for each token count of the schedule; past torch's limit of 8 it runs eagerly
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
            method.backbone.compile(dynamic=False)
        self.optimizer = build_optimizer(self.module, config.train)
        low, high = config.train.crop_area
        self.augmentation = Augmentation(area=(low, high), degrees=config.train.rotation)
        self._restored = False

    def load(self, path: Path) -> None:
        """Restore local tensors and optimizer moments; shared weights stay as they are.

        Raises:
            CheckpointError: the file is missing, torn, or of another model.
        """
        saved = read_tensors(path)
        local = {n.removeprefix("local."): t for n, t in saved.items() if n.startswith("local.")}
        self.module.load_state_dict(local, strict=False)
        for name, parameter in self._trained():
            moments = {k: saved[f"optimizer.{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")
                       if f"optimizer.{k}.{name}" in saved}  # fmt: skip
            if moments:
                device = parameter.device
                self.optimizer.state[parameter] = {
                    k: v.clone() if k == "step" else v.to(device) for k, v in moments.items()
                }
        self._restored = True

    def save(self, path: Path) -> None:
        """Write local tensors and optimizer moments to ``path``, atomically."""
        shared = set(self.method.shared_parameters())
        tensors = {f"local.{n}": t for n, t in self.module.state_dict().items() if n not in shared}
        for name, parameter in self._trained():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        write_tensors(path, {n: t.detach().cpu().contiguous() for n, t in tensors.items()})

    def run(
        self,
        images: np.ndarray,
        patients: np.ndarray,
        round_number: int,
        rounds: int,
        proximal_mu: float = 0.0,
    ) -> TrainResult:
        """Train ``local_epochs`` passes over the site's images.

        Args:
            images: uint8 [N, S, S]; may be memory-mapped.
            patients: integer codes [N].
            round_number: 1-based server round.
            rounds: of the whole run; the schedules need it.
            proximal_mu: FedProx's weight of the distance to the global weights (Li et al. 2020, eq. 2).

        Raises:
            TooFewImagesError: fewer than two patients' images.
            MethodError: the loss is no longer finite.
        """
        if len(np.unique(patients)) < MIN_BATCH:
            raise TooFewImagesError(
                f"site {self.site}: {len(images)} image(s) of {len(np.unique(patients))} patient(s); "
                f"contrast needs at least {MIN_BATCH} patients"
            )
        started = time.perf_counter()
        if not self._restored:
            self.method.reset_local()
        self._restored = True
        self.method.start_round(round_number, rounds)
        self.module.train()
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, self.site, round_number))
        batches = epoch_batches(patients, self.config, generator)
        anchor = self._anchor() if proximal_mu > 0 else []
        sums: dict[str, list[float]] = {}
        seen = 0
        for step, (rows, partners) in enumerate(batches):
            self._set_lr(round_number - 1 + step / len(batches), rounds)
            loss = self._step(images, patients, rows, partners, generator, step, anchor, proximal_mu)
            seen += len(rows)
            for key, value in {"loss": loss, **self.method.metrics()}.items():
                sums.setdefault(key, []).append(value)
        means = {key: float(np.mean(values)) for key, values in sums.items()}
        return TrainResult(len(batches), seen, time.perf_counter() - started, means)

    def _step(
        self, images: np.ndarray, patients: np.ndarray, rows: np.ndarray, partners: np.ndarray,
        generator: torch.Generator, step: int, anchor: list[tuple[Tensor, Tensor]], mu: float,
    ) -> float:  # fmt: skip
        batch = self._batch(images, patients, rows, partners, generator, step)
        bf16 = self.config.train.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = self.module(batch).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise MethodError(f"site {self.site}: loss is {value} at step {step}; lower train.lr")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter, start in anchor:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=mu)
        self.optimizer.step()
        self.method.after_step()
        return value

    def _batch(
        self, images: np.ndarray, patients: np.ndarray, rows: np.ndarray, partners: np.ndarray,
        generator: torch.Generator, step: int,
    ) -> Batch:  # fmt: skip
        size = self.config.backbone.img_size
        pixels, shift = torch.from_numpy(np.asarray(images[rows])), None
        if self.method.shifts_views:
            views, shift = shifted_views(pixels, generator, size, self.method.cell_size, self.augmentation)
            shift = shift.to(self.device)
        else:
            views = two_views(pixels, generator, size, self.augmentation)
        second = views.second
        if not np.array_equal(rows, partners):
            other = torch.from_numpy(np.asarray(images[partners]))
            second = two_views(other, generator, size, self.augmentation).second
        codes = torch.from_numpy(np.asarray(patients[rows], dtype=np.int64))
        return Batch(
            views.first.to(self.device), second.to(self.device), codes.to(self.device), generator, step, shift
        )

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]

    def _anchor(self) -> list[tuple[Tensor, Tensor]]:
        shared = set(self.method.shared_parameters())
        return [(p, p.detach().clone()) for n, p in self._trained() if n in shared]

    def _set_lr(self, position: float, rounds: int) -> None:
        lr = self.config.train.lr * lr_factor(position, rounds, self.config.train.warmup_rounds)
        for group in self.optimizer.param_groups:
            group["lr"] = lr


def lr_factor(position: float, rounds: int, warmup: float) -> float:
    """Linear warm-up then cosine to zero; ``position`` in [0, rounds] is the progress in rounds."""
    ramp = warmup * rounds
    if position < ramp:
        return (position + 1e-2) / (ramp + 1e-2)
    return 0.5 * (1 + math.cos(math.pi * (position - ramp) / max(rounds - ramp, 1e-9)))


def epoch_batches(
    patients: np.ndarray, config: Config, generator: torch.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Shuffle ``local_epochs`` passes into batches of (rows, partner rows).

    A partner is the row itself, or with ``method.same_patient`` a random image of the same patient
    (MedAug, Vu et al. 2021). A last short batch is dropped unless it is the only one.
    """
    n = len(patients)
    size = min(config.train.batch_size, n)
    batches = []
    for _ in range(config.train.local_epochs):
        order = torch.randperm(n, generator=generator).numpy()
        for start in range(0, n - size + 1, size):
            rows = np.sort(order[start : start + size])  # ascending rows read a memory map in order
            partners = _partners(rows, patients, generator) if config.method.same_patient else rows
            batches.append((rows, partners))
    return batches


def _partners(rows: np.ndarray, patients: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """A random image of the same patient for each row."""
    order = np.argsort(patients, kind="stable")
    first = np.searchsorted(patients[order], patients[rows], side="left")
    last = np.searchsorted(patients[order], patients[rows], side="right")
    draws = torch.rand(len(rows), generator=generator).numpy()
    return order[first + np.floor(draws * (last - first)).astype(np.int64)]


def explicit_attention(module: nn.Module) -> None:
    """Write attention as matrix products: on a CPU the fused kernel's bf16 backward is the slower one."""
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            setattr(part, "fused_attn", False)  # noqa: B010  a flag of timm's, unknown to the type checker


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; biases, norms and single vectors do not decay, nor does the vector of each level of cells."""
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    decays = {n for n, p in trained if p.squeeze().dim() >= 2 and not n.endswith(".coarse")}
    groups = [
        {"params": [p for n, p in trained if n in decays], "weight_decay": config.weight_decay},
        {"params": [p for n, p in trained if n not in decays], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))
