"""Pretraining without a federation: one trainer, one run folder, the same files as a federated run.

``site.name=NAME`` trains on the images of one site; without it on those of all sites together.
"""

import dataclasses
import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparsecontrast import checkpoint, overrides
from sparsecontrast.config import anchored, as_dict, shared_state_dir, site_state_dir
from sparsecontrast.data.cache import load_dataset
from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import CheckpointError, ConfigError, TooFewImagesError
from sparsecontrast.methods import build_method
from sparsecontrast.progress import progress
from sparsecontrast.resume import refuse_old_rounds, resolve
from sparsecontrast.runs import CONFIG, METRICS
from sparsecontrast.settings import Config
from sparsecontrast.start import load_start
from sparsecontrast.tensorboard import write_tensorboard
from sparsecontrast.trainer import LocalTrainer, TrainResult
from sparsecontrast.trainers import build_trainer

if TYPE_CHECKING:
    from sparsecontrast.data.dataset import Dataset
    from sparsecontrast.private_trainer import PrivateTrainer

TOGETHER = "all_sites"  # the name of a trainer that sees every site


def pretrain(config: Config, show: bool = True) -> Path:
    """Train ``federation.rounds`` rounds and return the run folder; ``resume=FOLDER`` continues one.

    Args:
        config: of the run; with ``resume`` its overrides go on top of what that run was told.
        show: progress on stderr.

    Raises:
        ConfigError: ``output_dir`` already holds a run, there is none to continue, or an override
            would make it another run.
        TooFewImagesError: fewer training images than ``data.min_images``.
        CheckpointError: nothing whole to continue from.
        MethodError: it cannot be as private as configured.
        PrivacyError: the site's budget does not allow it, or its ledger cannot be trusted.
    """
    if config.resume is not None:
        run, _ = resolve(overrides.merge(config.overrides, [overrides.assign("resume", config.resume)]))
        if not isinstance(run, Config):
            raise ConfigError(f"resume={config.resume}: no pretraining; continue it as it was started")
        config = run
    resumed = config.resume is not None
    folder = anchored(config.output_dir)
    config = dataclasses.replace(config, output_dir=str(folder))
    refuse_old_rounds(config)
    config = dataclasses.replace(config, resume=None)  # no word of it in the record
    method = build_method(config, pretrained=not resumed)  # a round's weights follow
    if not resumed:
        load_start(method, config)
    own, site = _training_set(config, folder, show), config.site.name or TOGETHER
    key = _run_key(folder) if resumed else secrets.token_hex(16)
    trainer = build_trainer(
        method, config, site, site_state_dir(config, site), key, own.frame["patient_id"],
        shared_state_dir(config),
    )  # fmt: skip
    record = _Record(folder, trainer, key)
    images, patients = own.images, own.patient_codes
    done = record.restore() if resumed else record.start()
    rounds = config.federation.rounds
    with progress("Pretraining", rounds - done, show) as tick:
        for number in range(done + 1, rounds + 1):
            result = trainer.run(images, patients, number, rounds)
            record.add(number, result)
            told = result.metrics
            tick(f"round {number}, " + (f"loss {told['loss']:.4f}" if "loss" in told else _spent(told)))
    if config.tensorboard:
        write_tensorboard(folder)
    return folder


def _spent(told: Mapping[str, float]) -> str:
    return f"epsilon {told['epsilon']:.3f} (delta {told['delta']:g})"


def _run_key(folder: Path) -> str:
    number = checkpoint.latest(folder)
    if number is None:
        raise CheckpointError(f"{folder}: no whole round to continue from; start anew elsewhere")
    return checkpoint.read_meta(folder, number)["run_key"]


def _training_set(config: Config, folder: Path, show: bool) -> "Dataset":
    cache = anchored(config.data.cache_dir) if config.data.cache_dir else folder / "cache"
    dataset = load_dataset(config, cache, shared_state_dir(config), progress=show)
    own = dataset.site(config.site.name) if config.site.name else dataset
    own = own.training(config.audit.canaries)
    if config.privacy.name != "none" and (left := len(own) - len(own.named())):
        own = own.named()
        print(f"{left} image(s) that name no patient are left out of private training", file=sys.stderr)
    if len(own) < config.data.min_images:
        name, least = config.site.name or "the data", config.data.min_images
        raise TooFewImagesError(f"{name}: {len(own)} training images, data.min_images={least}")
    return own


@dataclasses.dataclass(frozen=True)
class _Record:
    """The files of a run; a round counts once its checkpoint is whole, as in a federation."""

    folder: Path
    trainer: "LocalTrainer | PrivateTrainer"
    key: str

    def start(self) -> int:
        """Write the configuration and round 0; returns 0."""
        self._configure()
        write_bytes(self.folder / METRICS, b"")
        self._keep(0, [], None)
        return 0

    def restore(self) -> int:
        """Restore weights and local state of the newest whole round; returns its number."""
        number = checkpoint.latest(self.folder)
        if number is None:
            raise CheckpointError(f"{self.folder}: no whole round to continue from; start anew elsewhere")
        found = checkpoint.read_round(self.folder, number)
        self.trainer.module.load_state_dict(found.tensors, strict=False)
        if number:
            self.trainer.local.load(self._state(number))
        rows = [r for n in range(1, number + 1) for r in checkpoint.read_meta(self.folder, n)["rows"]]
        self._configure()  # rounds may be more, and the folder may lie elsewhere
        write_bytes(self.folder / METRICS, _lines(rows).encode())
        return number

    def add(self, number: int, result: TrainResult) -> None:
        """Write a round: first what continuing needs, then the round, then what may be lost."""
        name, loss = self.trainer.site, result.metrics.get("loss")
        site = {
            "round": number, "site": name, "status": "ok", "weight": 1.0, "num_examples": result.examples,
            "steps": result.steps, "images": result.images, "seconds": result.seconds, **result.metrics,
        }  # fmt: skip
        site = {key: value for key, value in site.items() if value is not None}
        whole = {
            "round": number, "site": None, "rounds": self.trainer.config.federation.rounds, "loss": loss,
            "seconds": result.seconds, "contributors": [name], "refused": {}, "silent": [],
        }  # fmt: skip
        before = checkpoint.read_meta(self.folder, number - 1)
        self.trainer.local.save(self._state(number))
        self._keep(number, [site, whole], checkpoint.weights_sha256(before))
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(_lines([site, whole]))
        self._state(number - 1).unlink(missing_ok=True)

    def _configure(self) -> None:
        config = self.trainer.config
        text = yaml.safe_dump({**as_dict(config), "overrides": list(config.overrides)}, sort_keys=False)
        write_bytes(self.folder / CONFIG, text.encode())

    def _keep(self, number: int, rows: list[Mapping[str, Any]], parent: str | None) -> None:
        state, config = self.trainer.module.state_dict(), self.trainer.config
        tensors = {n: state[n].detach().cpu().float() for n in self.trainer.method.shared_parameters()}
        meta = {
            "rows": rows,
            "run_key": self.key,
            "seed": config.seed,
            "parent": parent,
            "config": as_dict(config),
        }
        checkpoint.write_round(self.folder, number, tensors, meta)

    def _state(self, number: int) -> Path:
        return self.folder / "sites" / self.trainer.site / "state" / f"round_{number:04d}.safetensors"


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
