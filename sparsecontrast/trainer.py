"""The local loop of one site and one round; it sees only the Method protocol.

Everything random derives from (seed, site, round), so a round can be run again, in another process
or after a crash, and gives the same bits. What the site keeps between rounds (projection head, EMA
teacher, optimizer) is one safetensors file. ``private_trainer.py`` is the loop under differential privacy.
"""

import hashlib
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sparsecontrast.batches import Views, epoch_batches
from sparsecontrast.errors import MethodError, PrivacyError, TooFewImagesError
from sparsecontrast.local_state import LocalState, trained
from sparsecontrast.methods.method import Batch, Method, Shared
from sparsecontrast.part_round import PartRound, Told, identity_of
from sparsecontrast.settings import Config, TrainConfig

MIN_BATCH = 2  # contrast needs a negative
EXPLICIT_TOKENS = 800
"""Tokens up to which bf16 attention on a CPU is written out: the fused kernel's backward is slow. In the
dense rows of ``benchmarks/results/sparsity-*`` (Intel Xeon with AMX) training is so 1.3 times as fast at 197
tokens and 1.4 at 577, but .74 and .68 at 1025, with 1.7 times the memory: on a log scale they cross at 800.
An AMD EPYC without AMX was faster written out up to 1025 as well; there the memory decides."""


@dataclass(frozen=True)
class TrainResult:
    """What one local round did; every field may leave the site.

    Attributes:
        examples: by how many the server weighs the site.
        steps: optimizer steps.
        images: image presentations (steps x batch); None where a private round withholds it.
        seconds: wall time; None likewise, for it grows with the patients who were drawn.
        metrics: means over the steps, ``loss`` among them unless withheld.
    """

    examples: int
    steps: int
    images: int | None
    seconds: float | None
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
        if config.privacy.name != "none":
            raise PrivacyError(
                f"privacy={config.privacy.name}: this loop neither clips nor adds noise; train with "
                "PrivateTrainer, or with privacy=none if weights that may leak their data are acceptable"
            )
        self.method, self.config, self.site = method, config, site
        self.module, self.device = prepare(method, config)
        self.views = Views(method, config, self.device)
        self.optimizer = build_optimizer(self.module, config.train)
        self.local = LocalState(method, self.optimizer)

    def run(
        self,
        images: np.ndarray,
        patients: np.ndarray,
        round_number: int,
        rounds: int,
        proximal_mu: float = 0.0,
        part: PartRound | None = None,
    ) -> TrainResult:
        """Train ``local_epochs`` passes over the site's images, or ``steps`` batches.

        Args:
            images: uint8 [N, S, S]; may be memory-mapped.
            patients: integer codes [N].
            round_number: 1-based server round.
            rounds: of the whole run; the schedules need it.
            proximal_mu: FedProx's weight of the distance to the global weights (Li et al. 2020, eq. 2).
            part: file of the round until it is over; a killed round goes on from it, with the same bits.

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
        self.local.begin()
        self.method.start_round(round_number, rounds)
        self.module.train()
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, self.site, round_number))
        batches = epoch_batches(patients, self.config, generator)
        anchor = shared_anchor(self.method) if proximal_mu > 0 else []
        told: Told = {}
        if part is not None:
            identity = self._identity(batches, round_number, rounds, proximal_mu)
            told = part.restore(identity, self.local, generator)
        done = len(told.get("loss", ()))
        for step, (rows, partners) in enumerate(batches[done:], done):
            set_lr(self.optimizer, self.config.train, round_number - 1 + step / len(batches), rounds)
            loss = self._step(images, patients, rows, partners, generator, step, anchor, proximal_mu)
            for key, value in {"loss": loss, **self.method.metrics()}.items():
                told.setdefault(key, []).append(value)
            if part is not None:
                part.keep(told, self.local, generator)
        means = {key: float(np.mean(values)) for key, values in told.items()}
        seen = sum(len(rows) for rows, _ in batches)
        return TrainResult(len(images), len(batches), seen, time.perf_counter() - started, means)

    def _identity(
        self, batches: list[tuple[np.ndarray, np.ndarray]], round_number: int, rounds: int, mu: float
    ) -> str:
        c, state = self.config, self.module.state_dict()
        words = (c.seed, c.train, c.method, c.backbone, self.site, round_number, rounds, mu)
        weights = {name: state[name] for name in self.method.shared_parameters()}
        return identity_of(words, batches, weights)

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
        return self.views.batch(images, patients, rows, partners, generator, step)


def prepare(method: Method, config: Config) -> tuple[nn.Module, torch.device]:
    """Move a method to where it trains, and fit it to the configured precision and compilation."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module: nn.Module = method.to(device)  # type: ignore[attr-defined]
    if config.train.precision == "bf16" and device.type == "cpu":
        explicit_attention(module)
    if config.train.compile:
        # one compilation for each token count of the schedule; past torch's limit of 8 it runs eagerly
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
        method.backbone.compile(dynamic=False)
    return module, device


def shared_anchor(method: Shared) -> list[tuple[Tensor, Tensor]]:
    """Shared parameters and copies of what they are now: what FedProx's term pulls them back to."""
    shared = set(method.shared_parameters())
    return [(p, p.detach().clone()) for n, p in trained(method) if n in shared]  # type: ignore[arg-type]


def set_lr(optimizer: torch.optim.Optimizer, config: TrainConfig, position: float, rounds: int) -> None:
    """Set the learning rate of a moment of the run; ``position`` in [0, rounds]."""
    for group in optimizer.param_groups:
        group["lr"] = config.lr * lr_factor(position, rounds, config.warmup_rounds)


def lr_factor(position: float, rounds: int, warmup: float) -> float:
    """Linear warm-up then cosine to zero; ``position`` in [0, rounds] is the progress in rounds."""
    ramp = warmup * rounds
    if position < ramp:
        return (position + 1e-2) / (ramp + 1e-2)
    return 0.5 * (1 + math.cos(math.pi * (position - ramp) / max(rounds - ramp, 1e-9)))


def explicit_attention(module: nn.Module) -> None:
    """Write attention over up to ``EXPLICIT_TOKENS`` as matrix products, for bf16 on a CPU."""
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.register_forward_pre_hook(_written_by_tokens)


def _written_by_tokens(attention: nn.Module, given: tuple[Tensor, ...]) -> None:
    """Choose before each pass: a run's rounds, and the parts of one step, differ in their tokens."""
    fused = given[0].shape[1] > EXPLICIT_TOKENS
    setattr(attention, "fused_attn", fused)  # noqa: B010  a flag of timm's, unknown to the type checker


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; biases, norms and single vectors do not decay, nor does the vector of each level of cells."""
    found = trained(module)
    decays = {n for n, p in found if p.squeeze().dim() >= 2 and not n.endswith(".coarse")}
    groups = [
        {"params": [p for n, p in found if n in decays], "weight_decay": config.weight_decay},
        {"params": [p for n, p in found if n not in decays], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))
