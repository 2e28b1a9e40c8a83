"""The local loop of one site and one round under patient-level differential privacy.

Patients are drawn by Poisson sampling instead of shuffled epochs, a step is ``PatientSGD``'s, and the whole
round is reserved in the site's ledger before its first draw. Noise, patients, views and explored cells come
from the operating system's randomness: a private round cannot be run again with the same bits, unless
``privacy.insecure_seed`` says that it protects nobody. See ``privacy.py`` for the mechanism.

What a round tells besides weights stands in ``disclosure.py``. Loss, image counts and durations are withheld.
How long the answer took shows on the wire, and is not covered.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sparsecontrast.account import Account
from sparsecontrast.batches import Views
from sparsecontrast.disclosure import disclosure
from sparsecontrast.ledger import Receipt
from sparsecontrast.local_state import LocalState
from sparsecontrast.methods.method import Batch, Method, refuse_coupled
from sparsecontrast.noise import SecureStream
from sparsecontrast.part_round import PartRound
from sparsecontrast.privacy import PatientSGD
from sparsecontrast.sampling import PatientSampler, chunks
from sparsecontrast.settings import Config
from sparsecontrast.trainer import TrainResult, build_optimizer, prepare, set_lr, shared_anchor


class PrivateTrainer:
    """Train one method at one site privately, a round at a time; used as ``LocalTrainer`` is.

    Args:
        method: an ``nn.Module`` that holds the global weights of the round to come.
        config: the run's configuration, with ``privacy=dp_sgd``.
        site: the site's name.
        account: of the site's patients in this run.

    Raises:
        MethodError: the method couples images.
    """

    def __init__(self, method: Method, config: Config, site: str, account: Account):
        refuse_coupled(method)
        self.method, self.config, self.site, self.account = method, config, site, account
        self.module, self.device = prepare(method, config)
        self.views = Views(method, config, self.device)
        self.optimizer = build_optimizer(self.module, config.train)
        self.local = LocalState(method, self.optimizer)

    def run(
        self, images: np.ndarray, patients: np.ndarray, round_number: int, rounds: int,
        proximal_mu: float = 0.0, part: PartRound | None = None,
    ) -> TrainResult:  # fmt: skip
        """Take ``privacy.steps_per_round`` noisy steps.

        Args:
            images: uint8 [N, S, S]; may be memory-mapped.
            patients: integer codes [N], of the account's patients.
            round_number: 1-based server round.
            rounds: of the whole run; the schedules need it.
            proximal_mu: FedProx's weight of the distance to the global weights; its gradient is a function
                of released weights and needs no noise.
            part: never written: what was drawn must not lie on a disk, and steps taken again cost again.

        Raises:
            BudgetSpentError: the round would exceed a patient's epsilon; nothing was drawn.
            MethodError: the model's per-sample gradients are not right.
            TooFewImagesError: there is no image.
        """
        self.local.begin()
        self.method.start_round(round_number, rounds)
        self.module.train()
        draws, noise, views = (self._stream(word, round_number) for word in ("patients", "noise", "views"))
        p, told = self.config.privacy, self.account.mechanism
        sampler = PatientSampler(patients, told.sample_rate, p.images_per_patient or 1, draws)
        bf16 = self.config.train.precision == "bf16"
        engine = PatientSGD(self.method, self.optimizer, told, self.account.book, noise, bf16)
        try:
            engine.start_round()  # a model that cannot be trained privately is found before a charge
            receipt = self.account.reserve(round_number)
            if proximal_mu > 0:
                anchor = shared_anchor(self.method)
                engine.optimizer.attach_step_hook(lambda _: _pull(anchor, proximal_mu))
            steps, generator = receipt.charge.steps, views.generator()
            for step in range(steps):
                set_lr(self.optimizer, self.config.train, round_number - 1 + step / steps, rounds)
                engine.step(self._batches(sampler, images, patients, generator, step))
        finally:
            engine.close()
        return TrainResult(told.patients, steps, None, None, self._told(receipt, round_number, rounds))

    def _batches(
        self, sampler: PatientSampler, images: np.ndarray, patients: np.ndarray,
        generator: torch.Generator, step: int,
    ) -> Iterator[Batch]:  # fmt: skip
        """Make the batches of one draw, each of at most ``train.batch_size`` images; maybe none."""
        batch = partial(self.views.batch, images, patients)
        for rows in chunks(sampler.draw(), self.config.train.batch_size):
            yield batch(rows, rows, generator, step)

    def _stream(self, word: str, round_number: int) -> SecureStream:
        return SecureStream(self.config.privacy.insecure_seed, f"{word} {self.site} {round_number}")

    def _told(self, receipt: Receipt, round_number: int, rounds: int) -> dict[str, float]:
        state, public = self.module.state_dict(), self.account.mechanism.patients
        weights = sum(state[name].numel() for name in self.method.shared_parameters())
        delta = receipt.policy.delta or 0.0
        return disclosure(
            self.config, receipt.charge, receipt.epsilon, delta, public, weights, round_number, rounds
        )


@torch.no_grad()
def _pull(anchor: list[tuple[Tensor, Tensor]], mu: float) -> None:
    """Add FedProx's gradient to what was noised (Li et al. 2020, eq. 2)."""
    for parameter, start in anchor:
        if parameter.grad is not None:
            parameter.grad.add_(parameter - start, alpha=mu)
