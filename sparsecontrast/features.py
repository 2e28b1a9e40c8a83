"""Frozen features of every image: of the run, and of what it must be compared with.

The baselines, each on the same images and probes:

- ``pixels``: the image area-averaged to 16 x 16. What acquisition and brightness alone give away.
- ``random_init``: the same network, never trained, not even elsewhere.
- ``start``: the weights of round 0; another thing where the run started from given ones.
- ``local_only``: every site trains alone, as many rounds and local epochs as the federation had.
- ``centralised``: one trainer sees all training images, which no federation may; as many rounds,
  and in each round as many images as the sites together presented (a fresh seeded draw of images
  where that is fewer than there are).

Trained baselines are kept under ``<run>/baselines``, so a second evaluation is quick.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecontrast.checkpoint import Round, latest, read_round, read_tensors, write_tensors
from sparsecontrast.config import as_dict
from sparsecontrast.data.transforms import evaluation_view
from sparsecontrast.errors import (
    BackboneMismatchError,
    CheckpointError,
    TooFewImagesError,
    UntrainedError,
)
from sparsecontrast.methods import build_method
from sparsecontrast.precision import prepare
from sparsecontrast.probes import downsampled_pixels
from sparsecontrast.runs import Run
from sparsecontrast.scoring import Features
from sparsecontrast.settings import Config
from sparsecontrast.tasks import Table, Task, labelled_rows
from sparsecontrast.trainer import LocalTrainer, derive_seed

BATCH = 64
Tick = Callable[[str], None]


@dataclass(frozen=True)
class Budget:
    """What a trained feature set has seen: rounds, and image presentations of all sites together."""

    rounds: int
    images: int


def trained_round(run: Run) -> Round:
    """Return the newest whole round of a run.

    Raises:
        UntrainedError: there is none after round 0, or its weights are those of round 0.
        BackboneMismatchError: the weights do not fit the configured backbone.
        CheckpointError: the run started from given weights, and round 0, which holds them, is damaged.
    """
    number = latest(run.folder)
    if not number:
        raise UntrainedError(f"{run.folder}: no round was trained, there is nothing to score")
    found = read_round(run.folder, number)
    fresh = _shared(_started(run))
    _check_fit(found.tensors, fresh, str(run.folder))
    if all(torch.equal(found.tensors[name].float(), fresh[name].float()) for name in fresh):
        raise UntrainedError(
            f"{run.folder}: the weights of round {number} equal the initial ones, nothing was learnt"
        )
    return found


def load_method(config: Config, tensors: Mapping[str, Tensor]):
    """Build the method of ``config`` with shared weights ``tensors``, ready to encode."""
    method = build_method(config, pretrained=False)
    _check_fit(tensors, _shared(method), "the weights")
    method.load_state_dict(dict(tensors), strict=False)
    method.eval()
    return method


def frozen_method(config: Config, tensors: Mapping[str, Tensor] | None) -> tuple[Any, torch.device]:
    """Build a method on the device that is there, its backbone at ``evaluation.precision``.

    Raises:
        ConfigError: int8 where there is a GPU.
    """
    method = (
        build_method(config, pretrained=False).eval() if tensors is None else load_method(config, tensors)
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method.to(device)
    method.backbone = prepare(method.backbone, config.evaluation.precision, device.type)  # type: ignore[assignment]
    return method, device


def encode(
    config: Config, tensors: Mapping[str, Tensor] | None, images: np.ndarray, tick: Tick, name: str
) -> np.ndarray:
    """Embed uint8 images [N, S, S] -> float32 [N, D] at ``evaluation.keep``; no tensors = random init.

    ``evaluation.precision`` is the backbone's; the cells are chosen in fp32 whatever it is. ``auto`` is
    calibrated for trained runs alone (``auto_encode.py``): a baseline is read densely then, which is
    what ``auto`` promises to equal.

    Raises:
        ConfigError: int8 where there is a GPU.
    """
    method, device = frozen_method(config, tensors)
    keep = "dense" if config.evaluation.keep == "auto" else config.evaluation.keep
    rows = []
    for start in range(0, len(images), BATCH):
        batch = torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH]))
        view = evaluation_view(batch, config.backbone.img_size).to(device)
        rows.append(method.encode(view, keep).float().cpu().numpy())
        tick(f"{name}, image {start + len(batch)} of {len(images)}")
    return np.concatenate(rows)


@dataclass(frozen=True)
class Baselines:
    """Makes the features that a run is compared with.

    Attributes:
        run: whose configuration and budget are matched.
        rounds: that the run has trained.
        images: uint8 [N, S, S], all splits.
        table: aligned with the images.
        tasks: that will be asked.
    """

    run: Run
    rounds: int
    images: np.ndarray
    table: Table
    tasks: Sequence[Task]

    def make(self, name: str, tick: Tick) -> tuple[Features, Budget | None]:
        """Make one of ``relations.BASELINES``, training it first where it is not kept yet.

        ``tick`` is called once a trained round and once an encoded batch, ``ticks(name)`` times at most.
        """
        if name == "pixels":
            return Features(name, (downsampled_pixels(self.images),)), None
        if name == "random_init":
            return Features(name, (encode(self.run.config, None, self.images, tick, name),)), None
        if name == "start":
            weights = read_round(self.run.folder, 0).tensors
            return Features(name, (encode(self.run.config, weights, self.images, tick, name),)), None
        models, sites, presented = [], [], 0
        for site in self._models(name):
            try:
                weights, seen = self._trained_alone(site, tick)
            except TooFewImagesError:
                continue  # its cells say that no model was trained there
            models.append(encode(self.run.config, weights, self.images, tick, site or name))
            sites.append(site)
            presented += seen
        found = Features(name, tuple(models), tuple(sites) if name == "local_only" else ())
        return found, Budget(self.rounds, presented)

    def ticks(self, name: str) -> int:
        """Ticks that making a baseline will take at most."""
        batches = -(-len(self.images) // BATCH)
        alone = 0 if name == "pixels" else batches
        trained = name in ("local_only", "centralised")
        return len(self._models(name)) * (batches + self.rounds) if trained else alone

    def _models(self, name: str) -> list[str]:
        """Sites of the models to train: one unnamed one for all, or one for each site that is asked about."""
        if name != "local_only":
            return [""]
        asked = [labelled_rows(task, label, self.table) for task in self.tasks for label in task.labels]
        spoken = set(self.table.sites[np.concatenate(asked)].tolist())
        return sorted(set(self.table.sites[self._training_rows("")].tolist()) & spoken)

    def _training_rows(self, site: str) -> np.ndarray:
        """Training images of one site, or of all sites that gave the run a round."""
        train = (self.table.splits == "train") & ~self.table.held_out
        if site:
            return np.flatnonzero(train & (self.table.sites == site))
        gave = {r["site"] for r in self.run.sites if r.get("status", "ok") == "ok"}
        taken = train & np.isin(self.table.sites, sorted(gave))
        # a run at one place names no site of the data, or one of them; it is set against all
        return np.flatnonzero(taken if len(gave) > 1 and taken.any() else train)

    def _trained_alone(self, site: str, tick: Tick) -> tuple[dict[str, Tensor], int]:
        """Train on one site's images (``site`` empty: on everybody's) or read what was trained before."""
        config, name = self.run.config, site or "centralised"
        rows = self._training_rows(site)
        patients = np.unique(self.table.patients[rows], return_inverse=True)[1]
        quotas = None if site else presented_images(self.run)
        file = f"{_fingerprint(self.run, self.rounds, name, self.table.patients[rows], quotas)}.safetensors"
        path = self.run.folder / "baselines" / file
        try:
            kept = read_tensors(path)
            return {n: t for n, t in kept.items() if n != "images"}, int(kept["images"])
        except CheckpointError:
            pass  # not there yet, or torn by a crash: train it
        # a number of steps is a site's; one trainer for all sees as many images as they did together
        train = config.train if site else dataclasses.replace(config.train, steps=None)
        trainer = LocalTrainer(_started(self.run), dataclasses.replace(config, train=train), name)
        seen = 0
        for number in range(1, self.rounds + 1):
            chosen = _draw(config, len(rows), number, quotas)
            result = trainer.run(
                self.images[rows[chosen]], patients[chosen], number, config.federation.rounds
            )
            seen += result.images or 0
            tick(f"{name}, round {number}, loss {result.metrics['loss']:.3f}")
        weights = {n: t.detach().cpu().clone() for n, t in _shared(trainer.method).items()}
        write_tensors(path, {**weights, "images": torch.tensor(seen)})
        return weights, seen


def presented_images(run: Run) -> dict[int, int]:
    """Image presentations of all sites together, by round, from ``metrics.jsonl``."""
    totals: dict[int, int] = {}
    for row in run.sites:
        totals[int(row["round"])] = totals.get(int(row["round"]), 0) + int(row.get("images") or 0)
    return totals


def _draw(config: Config, total: int, round_number: int, quotas: Mapping[int, int] | None) -> np.ndarray:
    """Rows of one round: all, or a seeded draw of as many as the federation presented per epoch."""
    if quotas is None or round_number not in quotas:
        return np.arange(total)
    per_epoch = quotas[round_number] // config.train.local_epochs
    generator = np.random.Generator(np.random.PCG64(derive_seed(config.seed, "centralised", round_number)))
    return np.sort(generator.permutation(total)[: max(per_epoch, min(total, config.train.batch_size))])


def _fingerprint(
    run: Run, number: int, name: str, patients: np.ndarray, quotas: Mapping[int, int] | None
) -> str:
    """Name a trained baseline by all that decides its weights, so that a stale one is never used."""
    c = run.config
    decides = [as_dict(c.method), as_dict(c.backbone), as_dict(c.train), c.seed, c.federation.rounds,
               number, name, hashlib.sha256("\n".join(patients.tolist()).encode()).hexdigest(),
               as_dict(dataclasses.replace(c.data, root=None, cache_dir=None)), quotas]  # fmt: skip
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _started(run: Run):
    """Build the method as the run started; its start weights lie in round 0, their file may be gone."""
    if not run.config.backbone.pretrained and run.config.init is None:
        return build_method(run.config)
    return load_method(run.config, read_round(run.folder, 0).tensors)


def _shared(method: Any) -> dict[str, Tensor]:
    state = method.state_dict()
    return {name: state[name] for name in method.shared_parameters()}


def _check_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    odd = sorted(set(tensors) ^ set(expected))
    odd += [n for n in expected if n in tensors and tensors[n].shape != expected[n].shape]
    if odd:
        raise BackboneMismatchError(
            f"{where}: {len(odd)} tensors do not fit the configured backbone (first: {odd[0]}); "
            "evaluate with the backbone and method that were trained"
        )
