"""Private training as the library does it, broken in one known way, with canaries among its patients.

What is the library's stays the library's: method, sampler, clipping, sum, noise, order of steps. A
``Contender`` says what is broken. All streams are seeded, so that a figure can be repeated; that would be
no way to train on patients.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.canaries import AuditedSGD, GradientCanaries, InputCanaries, attacks, weights
from sparsecontrast.config import compose
from sparsecontrast.data.phantom import render
from sparsecontrast.data.transforms import shifted_views
from sparsecontrast.methods import build_method
from sparsecontrast.methods.method import Batch
from sparsecontrast.methods.patch_contrast import PatchContrast
from sparsecontrast.noise import SecureStream
from sparsecontrast.privacy import Mechanism
from sparsecontrast.sampling import PatientSampler, chunks

SIZE = 48  # pixels
NETWORK = ("backbone.name=test_vit", f"backbone.img_size={SIZE}", "backbone.patch_size=8", "backbone.depth=2",
           "method=patch_contrast", "method.keep=0.5", "method.explore=0", "method.projection_hidden=32",
           "method.projection_dim=16")  # fmt: skip
CLIP = 0.05  # below every gradient: every patient counts a whole clip
STRIDE = 1e-3  # what one clip moves the weights by in a step; decides what is learned, not what is private
MAX_ROWS = 64
FILMS = 2  # of a patient who is no canary
HARDLY = 0.1  # clips of noise, for an attack on a mechanism that forgot it


@dataclass(frozen=True)
class Contender:
    """A way to train that claims to be private.

    Attributes:
        name: for the table.
        sound: it does what it claims.
        noise: of the noise that it claims.
        replayed: every step draws the noise of the first.
        by_film: clips films instead of patients.
        everyone: draws all patients into every step, whatever rate it claims.
        films: of a canary.
        sample_rate: q that it claims.
    """

    name: str
    sound: bool = False
    noise: float = 1.0
    replayed: bool = False
    by_film: bool = False
    everyone: bool = False
    films: int = 1
    sample_rate: float = 0.5


@dataclass(frozen=True)
class Seen:
    """One run, as its auditor has it.

    Attributes:
        included: the coins, boolean [m].
        scores: of each attack that sees all weights, float64 [m], higher for "was in".
        learned: by how much each canary's loss fell from the first to the last weights, which is all that a
            black-box attack sees [m]; None for gradient canaries, who have no loss.
    """

    included: np.ndarray
    scores: dict[str, np.ndarray]
    learned: np.ndarray | None = None


class Faint(SecureStream):
    """Noise of a share of the deviation that was asked for."""

    def __init__(self, seed: int, share: float):
        super().__init__(seed, "noise")
        self.share = share

    def gaussian(self, like: Tensor, std: float) -> Tensor:
        """Draw noise of mean 0 and deviation ``share * std``."""
        return super().gaussian(like, self.share * std)


class Patients:
    """Phantoms of real patients' place, two films each; they are the same in every run."""

    def __init__(self, count: int):
        films = [render(0, i % 4, i, j, SIZE).image for i in range(count) for j in range(FILMS)]
        self.images = torch.from_numpy(np.stack(films) * 255).round().to(torch.uint8)
        self.codes = np.repeat(np.arange(count), FILMS)
        self.count = count

    def batches(
        self, drawn: list[np.ndarray], codes: np.ndarray, method: PatchContrast, generator: torch.Generator
    ) -> Iterator[Batch]:
        """Views of the drawn films, in pieces; ``codes`` [films] say whom each film counts for."""
        for rows in chunks(drawn, MAX_ROWS):
            views, shift = shifted_views(
                self.images[torch.from_numpy(rows)], generator, SIZE, method.cell_size
            )
            owner = torch.from_numpy(codes[rows])
            yield Batch(views.first, views.second, owner, generator, 0, shift)


class Run:
    """A private run with canaries.

    Args:
        contender: what is broken.
        patients: that are no canaries.
        included: which canaries take part, boolean [m].
        noise_multiplier: sigma that is claimed.
        seed: of all draws.
    """

    def __init__(
        self,
        contender: Contender,
        patients: Patients,
        included: np.ndarray,
        noise_multiplier: float,
        seed: int,
    ):
        self.contender, self.patients, self.included, self.seed = contender, patients, included, seed
        self.method = build_method(compose([*NETWORK, f"seed={seed}"]))
        assert isinstance(self.method, PatchContrast)
        self.method.start_round(1, 1)
        # N is public: it may not say how many canaries take part
        mechanism = Mechanism(contender.sample_rate, noise_multiplier, CLIP, patients.count + len(included))
        self.unit = STRIDE / CLIP * mechanism.sample_rate * mechanism.patients
        trained = [p for p in self.method.parameters() if p.requires_grad]
        self.engine = AuditedSGD(
            self.method, torch.optim.SGD(trained, lr=self.unit), mechanism, lambda told: None, self._noise()
        )
        self.engine.start_round()
        self.parameters: list[nn.Parameter] = [p for p in trained if p in self.engine.optimizer.reached]
        films = np.repeat(np.flatnonzero(included), contender.films)
        self.who = np.concatenate([patients.codes, patients.count + films])
        rate = 1.0 if contender.everyone else contender.sample_rate
        self.sampler = PatientSampler(
            self.who, rate, max(contender.films, FILMS), SecureStream(seed, "sampling")
        )
        self.views = SecureStream(seed, "views")

    def step(self, canaries: GradientCanaries | InputCanaries) -> Tensor:
        """Take a step; return what it released, in clips, one flat vector over ``parameters``."""
        if self.contender.replayed:
            self.engine.optimizer.stream = self._noise()
        before = weights(self.parameters)
        self.engine.step(self._pieces(canaries))
        return (before - weights(self.parameters)) / STRIDE

    def others(self) -> Tensor:
        """The sum of all patients who are no canaries, flat over ``parameters``; nothing is released."""
        everyone = np.split(np.arange(len(self.patients.codes)), self.patients.count)
        generator = torch.Generator().manual_seed(self.seed)
        self.engine.optimizer.clear()
        for batch in self.patients.batches(everyone, self.patients.codes, self.method, generator):  # type: ignore[arg-type]
            self.engine._accumulate(batch)
        total = torch.cat([p.summed_grad.flatten() for p in self.parameters])  # type: ignore[attr-defined]
        self.engine.optimizer.clear()
        return total

    def close(self) -> None:
        """Take the engine's hooks off."""
        self.engine.close()

    def _pieces(self, canaries: GradientCanaries | InputCanaries) -> Iterator[Batch]:
        drawn, films = self.sampler.draw(), len(self.patients.codes)
        codes = np.arange(len(self.who)) if self.contender.by_film else self.who
        real = [rows for rows in drawn if rows[0] < films]
        yield from self.patients.batches(real, codes, self.method, self.views.generator())  # type: ignore[arg-type]
        rows = [rows for rows in drawn if rows[0] >= films]
        if rows:
            mine = np.concatenate(rows)
            yield from canaries.pieces(self.who[mine] - self.patients.count, codes[mine])

    def _noise(self) -> SecureStream:
        return Faint(self.seed, self.contender.noise)


def gradient_run(
    contender: Contender, patients: Patients, count: int, noise_multiplier: float, steps: int, seed: int
) -> Seen:
    """Train with ``count`` gradient canaries."""
    included = np.random.default_rng([seed, 1]).random(count) < 0.5
    run = Run(contender, patients, included, noise_multiplier, seed)
    canaries = GradientCanaries(run.parameters, count, run.others())
    seen = np.stack([canaries.read(run.step(canaries)) for _ in range(steps)])
    run.close()
    return Seen(included, attacks(seen, contender.sample_rate, noise_multiplier))


def input_run(
    contender: Contender, patients: Patients, count: int, noise_multiplier: float, steps: int, seed: int
) -> Seen:
    """Train with ``count`` input canaries, of one film each."""
    assert contender.films == 1, "an input canary has one film"
    included = np.random.default_rng([seed, 2]).random(count) < 0.5
    run = Run(contender, patients, included, noise_multiplier, seed)
    canaries = InputCanaries(count, SIZE, seed)
    assumed = {"estimate": noise_multiplier, "estimate, hardly any noise": HARDLY}
    scores = {name: np.zeros(count) for name in (*assumed, "inner product")}
    start = canaries.losses(run.engine.module)
    for _ in range(steps):
        gradients = canaries.gradients(run.engine, run.parameters)
        released = run.step(canaries)
        scores["inner product"] += (gradients @ released).double().numpy()
        for name, sigma in assumed.items():
            scores[name] += canaries.estimate(gradients, released, contender.sample_rate, sigma)
    learned = start - canaries.losses(run.engine.module)
    run.close()
    return Seen(included, scores, learned)
