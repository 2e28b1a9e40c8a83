"""A lab's side of a federated ``classify``: its pictures, and one round on them.

Everything random derives from (seed, lab, round), as in ``sparsecontrast.trainer``. What a lab keeps between
rounds is its optimizer's moments; the weights of its classes are its own and stay with it.
"""

import math
import time

import numpy as np
import torch
from torch import Tensor

from sparsecontrast.classify.augment import augment, normalise
from sparsecontrast.classify.cells import class_weights
from sparsecontrast.classify.federation import CellsRun, as_classify
from sparsecontrast.classify.fit import build_optimizer, set_rate, train_step
from sparsecontrast.errors import MethodError, PrivacyError
from sparsecontrast.local_state import LocalState
from sparsecontrast.methods.sparse_attn_net import Labelled, SparseAttnNet
from sparsecontrast.part_round import PartRound, Told, identity_of
from sparsecontrast.trainer import TrainResult, derive_seed, shared_anchor

TELLS = ("distillation",)  # of the network's scalars, beside the loss


def refuse_privacy(config: CellsRun) -> None:
    """Refuse a run, or a lab, that asks for privacy.

    Raises:
        PrivacyError: says what to do.
    """
    told = [
        f"privacy.{key}={v}" for key, v in vars(config.privacy).items() if key != "name" and v is not None
    ]
    if config.privacy.name != "none" or told:
        raise PrivacyError(
            f"privacy={config.privacy.name} {' '.join(told)}: private training is not built for "
            "method=sparse_attn_net, so nothing is trained where it is asked for; use privacy=none only if "
            "weights that may leak the pictures are acceptable"
        )


def build_network(config: CellsRun) -> SparseAttnNet:
    """Build the network of a run; the same seed gives the same weights, torch's own generator stays.

    Raises:
        PrivacyError: see ``refuse_privacy``.
        MethodError: the picture does not divide into words.
    """
    refuse_privacy(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return SparseAttnNet(
            config.method, len(config.classes), config.train.image_size,
            label_smoothing=config.train.label_smoothing,
        )  # fmt: skip


class LabTrainer:
    """Train the classifier at one lab, a round at a time, on the CPU.

    Args:
        network: holds the global weights of the round to come.
        config: of the run.
        lab: the site's name; part of every derived seed.
        labels: of all pictures that it trains on [N].

    Raises:
        PrivacyError: see ``refuse_privacy``.
    """

    def __init__(self, network: SparseAttnNet, config: CellsRun, lab: str, labels: Tensor):
        refuse_privacy(config)
        self.network, self.config, self.lab = network, config, lab
        self.fit = as_classify(config).train
        network.class_weights = class_weights(labels, len(config.classes), config.train.balance)
        self.optimizer = build_optimizer(network, self.fit)
        self.local = LocalState(network, self.optimizer)

    def run(
        self, images: Tensor, labels: Tensor, number: int, rounds: int, proximal_mu: float = 0.0,
        part: PartRound | None = None,
    ) -> TrainResult:  # fmt: skip
        """Train ``local_epochs`` passes over the lab's pictures.

        Args:
            images: uint8 [N, 3, S, S].
            labels: classes [N].
            number: 1-based server round.
            rounds: of the whole run, over which the learning rate falls.
            proximal_mu: FedProx's weight of the distance to the global weights.
            part: file of the round until it is over.

        Raises:
            MethodError: the loss is no longer finite.
        """
        started = time.perf_counter()
        self.local.begin()
        self.network.train()
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, self.lab, number))
        batches = [
            chosen
            for _ in range(self.config.train.local_epochs)
            for chosen in torch.randperm(len(labels), generator=generator).split(self.fit.batch_size)
        ]
        anchor = shared_anchor(self.network) if proximal_mu > 0 else []
        told: Told = {}
        if part is not None:
            told = part.restore(self._identity(batches, number, rounds, proximal_mu), self.local, generator)
        done = len(told.get("loss", ()))
        for at, chosen in enumerate(batches[done:], done):
            set_rate(self.optimizer, self.fit, (number - 1) * len(batches) + at, rounds * len(batches))
            pictures = normalise(augment(images[chosen], self.fit.colour, generator))
            batch = Labelled(pictures, labels[chosen], generator)
            for key, value in self._step(batch, anchor, proximal_mu).items():
                told.setdefault(key, []).append(value)
            if part is not None:
                part.keep(told, self.local, generator)
        means = {key: float(np.mean(values)) for key, values in told.items()}
        seconds = time.perf_counter() - started
        means["keep"] = self.network.pixel_share()
        return TrainResult(len(labels), len(batches), sum(map(len, batches)), seconds, means)

    def _step(self, batch: Labelled, anchor: list[tuple[Tensor, Tensor]], mu: float) -> dict[str, float]:
        loss = train_step(self.network, self.optimizer, batch, anchor, mu)
        if not math.isfinite(loss):
            raise MethodError(f"lab {self.lab}: the loss is {loss}; lower train.lr")
        found = self.network.metrics()
        return {"loss": loss} | {name: found[name] for name in TELLS}

    def _identity(self, batches: list[Tensor], number: int, rounds: int, mu: float) -> str:
        c = self.config
        words = (c.seed, c.train, c.method, c.classes, self.lab, number, rounds, mu)
        return identity_of(words, [[chosen.numpy()] for chosen in batches], self.network.state_dict())
