"""A2A: test-time denoising of one synthetic-aperture acquisition, trained on nothing but itself.

Aperture-to-aperture learning (PSCL, arXiv 2605.12567; its abstract is all that is public): sub-aperture
images share the anatomy and differ in speckle and noise; an anatomy encoder, a noise encoder and a decoder
are trained, on the one acquisition, to swap shuffled sub-apertures; the output is D(mean a, 0).

Ours, and why:

- What is swapped are quadratures of shuffled aperture groups (``ultrasound/looks.py``). Neighbouring
  apertures share most of their speckle, so a network that foretells one from the other keeps it; a
  quadrature at a right angle shares the anatomy alone, even where there are but two apertures.
- The decoder gives a power v, and a look t of another group is scored by how likely it is, t ~ N(0, v / 2):
  log v + 2 t^2 / v. The mean of v is then right, where an L1 of log-images would be biased by speckle.
- D(mean a, 0) is itself trained to foretell the whole compound, from a quadrature that it did not see:
  it is the output, and otherwise it would be reached only by extrapolation.
- The noise floor, what apertures do not share (side lobes too, so it may be too high), is taken off the
  power. So pure noise gives a flat image, not a texture; and dark tissue may be lost.
- The anatomy is the prior of a Wiener filter of the compound, which keeps its resolution and its speckle.
  The image shown lies between the two (``speckle``).

    L = nll(D(a_i, 0), t_j) + nll(D(mean a, 0), t) + align sum_l [1 - cos(a_i, a_j)]
        + noise { |log D(a_i, n_j) - log 2 t_j^2| + decorrelate sum_l cos^2(n_i, n_j) }

Same seed, same bits, on the same machine and thread count.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sparsecontrast.errors import ConfigError, MethodError
from sparsecontrast.models.twin_pyramid import TwinPyramid, build_twin_pyramid
from sparsecontrast.ultrasound.denoised import IMAGES, Denoised, in_unit
from sparsecontrast.ultrasound.looks import (
    Complex,
    as_apertures,
    noise_map,
    noise_power,
    to_baseband,
    to_safe_range,
)

SCALES = (1.0, 2.0, 4.0, 8.0)  # pixels: Gaussian windows of the looks' power that the encoders see
BASE = 1  # index in SCALES of the power that the decoder corrects
TINY = 1e-4  # of the coarsest power: below it a logarithm says nothing


@dataclass(frozen=True)
class A2AConfig:
    """How A2A trains; ``configs/method/a2a.yaml`` explains every field."""

    steps: int = 160
    lr: float = 5e-3
    anatomy: tuple[int, ...] = (12, 16, 24, 32)
    noise: tuple[int, ...] = (16, 24, 32, 48)
    crop: int = 128
    align: float = 0.05
    noise_weight: float = 0.1
    decorrelate: float = 0.1
    noise_every: int = 4
    check_every: int = 20
    patience: int = 4
    speckle: float = 0.7
    floor_db: float = -10.0
    phases: int = 4
    seed: int = 0

    def __post_init__(self):
        counts = ("steps", "crop", "noise_every", "check_every", "patience", "phases")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least 1")
        if (
            len(self.anatomy) != len(self.noise)
            or len(self.anatomy) < 2
            or min(*self.anatomy, *self.noise) < 1
        ):
            raise ConfigError("method.anatomy, method.noise: need the same number of levels, at least 2")
        if not 0 < self.lr < math.inf or min(self.align, self.noise_weight, self.decorrelate) < 0:
            raise ConfigError("method.lr must be above 0, and no weight of a loss below 0")
        if not 0 <= self.speckle <= 1:
            raise ConfigError(f"method.speckle={self.speckle}: must be in [0, 1]")
        if not -200 <= self.floor_db <= 100:
            raise ConfigError(f"method.floor_db={self.floor_db}: must be in [-200, 100]")
        if self.crop < 2 ** len(self.anatomy):
            raise ConfigError(f"method.crop={self.crop}: too small for {len(self.anatomy)} levels")


def denoise(
    images: NDArray, config: A2AConfig | None = None, tell: Callable[[int, int], None] | None = None
) -> Denoised:
    """Denoise one acquisition.

    Args:
        images: [M, H, W], complex or RF, M >= 2 sub-aperture images in the order of their positions.
        config: of the training.
        tell: called with (steps done, steps at most) at every check.

    Raises:
        DataError: what is not such an acquisition.
        MethodError: the training met a loss, or ended in an image, that is not finite.
    """
    images, unit = to_safe_range(images)
    found = _denoise(as_apertures(images), config or A2AConfig(), tell)
    for name in IMAGES:
        if not np.isfinite(getattr(found, name)).all():
            raise MethodError(f"a2a: {name} is not finite; lower method.lr, or look at the file's amplitudes")
    return in_unit(found, unit)


def _denoise(apertures: Complex, config: A2AConfig, tell: Callable[[int, int], None] | None) -> Denoised:
    compound = apertures.mean(0)
    unit = float(np.sqrt((np.abs(compound) ** 2).mean()))
    looks = torch.from_numpy(to_baseband(apertures) / np.float32(unit))
    trained = _train(looks, config, tell)
    power = anatomy_power(trained.network, looks, config.phases).numpy().astype(np.float64) * unit**2
    sigma2 = noise_power(apertures) / len(apertures)
    least = sigma2 * 10 ** (config.floor_db / 10) + np.finfo(np.float32).tiny
    power *= float((np.abs(compound) ** 2 / power).mean())  # the factor that makes the compound likeliest
    signal = np.maximum(power - sigma2, least)
    coherent = (compound * (signal / (signal + sigma2))).astype(np.complex64)
    # |coherent|^2 is exponential in developed speckle, where a power s of it has the mean gamma(1 + s)
    strength = np.abs(coherent) ** config.speckle / math.sqrt(math.gamma(1 + config.speckle))
    return Denoised(
        image=strength * np.sqrt(signal) ** (1 - config.speckle),
        anatomy=np.sqrt(signal),
        coherent=coherent,
        noise=noise_map(apertures),
        compound=compound,
        noise_level=math.sqrt(sigma2),
        floor=math.sqrt(least),
        steps=trained.steps,
        history=trained.history,
        kept_step=trained.kept_step,
    )


@torch.no_grad()
def anatomy_power(network: TwinPyramid, looks: Tensor, phases: int) -> Tensor:
    """Decode the mean anatomy code of all looks of the compound: D(mean a, 0).

    Args:
        network: trained.
        looks: complex [M, H, W] at baseband.
        phases: quadratures, spread evenly over half a turn.

    Returns:
        float32 [H, W]: the power, noise included.
    """
    turns = torch.polar(torch.ones(phases), torch.arange(phases) * (math.pi / phases))
    features, base = look_features((looks.mean(0) * turns[:, None, None]).real)
    codes = [code.mean(0, keepdim=True) for code in network.anatomy(features)]
    return torch.exp(base.mean(0) + network.decode(codes)[0])


def look_features(look: Tensor) -> tuple[Tensor, Tensor]:
    """Describe quadratures by the logarithm of their local power at growing scales.

    Args:
        look: [B, H, W] real.

    Returns:
        Features [B, 1 + len(SCALES), H, W], free of scale, and the log-power [B, H, W] to correct.
    """
    return power_features(2 * look**2)


def power_features(power: Tensor) -> tuple[Tensor, Tensor]:
    """Describe powers [B, H, W] as ``look_features`` does quadratures."""
    power = power[:, None]
    smooth = [power, *(_blur(power, scale) for scale in SCALES)]
    tiny = TINY * smooth[-1] + 1e-20
    logs = torch.cat([torch.log(p + tiny) for p in smooth], 1)
    coarse = logs[:, -1:]
    base = logs[:, 1 + BASE]
    steps = torch.cat([logs[:, :-1] - coarse, coarse - coarse.mean((2, 3), keepdim=True)], 1)
    return steps / 2, base


def swap_loss(
    network: TwinPyramid, seen: Tensor, hidden: Tensor, config: A2AConfig, with_noise: bool
) -> Tensor:
    """Compute the loss of one swap.

    Args:
        network: to train.
        seen: [3, H, W]: one quadrature of group i, of group j, and of the compound of both.
        hidden: [3, H, W]: the quadrature at a right angle of the same.
        config: weights.
        with_noise: add the noise encoder's part.
    """
    features, base = look_features(seen)
    codes = network.anatomy(features)
    mean = [(code[0] + code[1])[None] / 2 for code in codes]
    decoded = network.decode(
        [torch.cat([code[:2], m, code[2:]]) for code, m in zip(codes, mean, strict=True)]
    )
    ends = torch.stack([base[0], base[1], (base[0] + base[1]) / 2, base[2]])
    target = torch.stack([hidden[1], hidden[0], hidden[2], hidden[2]])  # the first two are swapped
    loss = look_likelihood(ends + decoded, target)
    loss = loss + config.align * sum((1 - _cosine(code[0], code[1])) for code in codes)
    if with_noise and config.noise_weight:
        other, _ = look_features(hidden[:2])
        noise = network.noise(other)
        swapped = network.decode([code[:2].detach() for code in codes], [code.flip(0) for code in noise])
        logs = torch.log(2 * hidden[:2].flip(0) ** 2 + 1e-6 * torch.exp(base[:2]))
        strange = (base[:2] + swapped - logs).abs().mean()
        strange = strange + config.decorrelate * sum(_cosine(code[0], code[1]) ** 2 for code in noise)
        loss = loss + config.noise_weight * strange
    return loss


def look_likelihood(log_power: Tensor, look: Tensor) -> Tensor:
    """Score looks by the powers foretold for them, -2 log N(look; 0, power / 2) + constant, averaged."""
    return (log_power + 2 * look**2 * torch.exp(-log_power)).mean()


@dataclass(frozen=True)
class _Trained:
    network: TwinPyramid
    steps: int
    history: tuple[tuple[int, float, float], ...]
    kept_step: int


def _train(looks: Tensor, config: A2AConfig, tell: Callable[[int, int], None] | None) -> _Trained:
    """Train until the steps are done, or until the held-out aperture has not gained for some checks."""
    generator = torch.Generator().manual_seed(config.seed)
    network = build_twin_pyramid(1 + len(SCALES), config.anatomy, config.noise, generator)
    optimiser = torch.optim.Adam(network.parameters(), config.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / config.steps))
    )
    kept, held = _hold_out(looks)
    best, best_state, since, history, running = math.inf, None, 0, [], 0.0
    step = kept_step = 0
    for step in range(1, config.steps + 1):
        seen, hidden = _draw_swap(kept, config.crop, generator)
        loss = swap_loss(network, seen, hidden, config, step % config.noise_every == 0)
        if not torch.isfinite(loss):
            raise MethodError(f"a2a: the loss is {float(loss.detach())} in step {step}; lower method.lr")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        running += float(loss.detach())
        if step % config.check_every == 0 or step == config.steps:
            score = math.nan if held is None else _held_out_score(network, kept, held)
            history.append((step, running / ((step - 1) % config.check_every + 1), score))
            running = 0.0
            if tell is not None:
                tell(step, config.steps)
            if held is not None:
                if score < best:
                    best, since, kept_step = score, 0, step
                    best_state = {name: value.clone() for name, value in network.state_dict().items()}
                else:
                    since += 1
                if since >= config.patience:
                    break
    if best_state is not None:
        network.load_state_dict(best_state)
    return _Trained(network, step, tuple(history), kept_step if best_state is not None else step)


def _hold_out(looks: Tensor) -> tuple[Tensor, Tensor | None]:
    """Set the middle aperture aside; with fewer than four all are needed."""
    if len(looks) < 4:
        return looks, None
    middle = len(looks) // 2
    return torch.cat([looks[:middle], looks[middle + 1 :]]), looks[middle]


@torch.no_grad()
def _held_out_score(network: TwinPyramid, kept: Tensor, held: Tensor) -> float:
    """Score the held-out aperture, both quadratures, by the power foretold of it, up to a factor."""
    power = anatomy_power(network, kept, 2)
    factor = (held.abs() ** 2 / power).mean()  # the factor that makes it likeliest
    log_power = torch.log(power * factor)
    return float((log_power + held.abs() ** 2 / (power * factor)).mean())


def _draw_swap(looks: Tensor, crop: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shuffle the apertures into two groups, turn them by a random phase, cut rows, mirror: a swap."""
    count, height = looks.shape[:2]
    order = torch.randperm(count, generator=generator)
    groups = torch.stack([looks[order[: count // 2]].mean(0), looks[order[count // 2 :]].mean(0)])
    groups = torch.cat([groups, looks.mean(0, keepdim=True)])
    start = int(torch.randint(max(height - crop, 0) + 1, (), generator=generator))
    phase = torch.rand((), generator=generator) * (2 * math.pi)
    turned = groups[:, start : start + crop] * torch.polar(torch.ones(()), phase)
    if torch.rand((), generator=generator) < 0.5:
        turned = turned.flip(2)
    return turned.real.contiguous(), turned.imag.contiguous()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean over pixels of the cosine of two codes [C, H, W]."""
    return F.cosine_similarity(a, b, dim=0, eps=1e-6).mean()


def _blur(image: Tensor, scale: float) -> Tensor:
    """Blur [B, 1, H, W] by a Gaussian of ``scale`` pixels, edges repeated, weights cut at 3 deviations."""
    radius = math.ceil(3 * scale)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / scale) ** 2)
    taps = (taps / taps.sum()).to(image)
    image = F.pad(image, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(image, taps[None, None, None]), taps[None, None, :, None])


def with_changes(config: A2AConfig, changes: Sequence[tuple[str, object]]) -> A2AConfig:
    """Give a config with other values."""
    return replace(config, **dict(changes))  # pyright: ignore[reportArgumentType]
