"""Membership inference: do released weights tell which patients they were trained on?

The attacker has what a federation releases in the end, backbone and scorer, the weights that it started
from, and some patient's films. A patient whose films have a low loss was probably trained on (Yeom et al.,
arXiv 1709.01604); films that are easy for everybody have a low loss too, so the loss under the start
weights is taken off (Watson et al., arXiv 2111.08440, equation 3):

    loss(p)       = - mean of L(x; w_T) over the films of p and over fixed random views
    calibrated(p) = mean of L(x; w_0) - mean of L(x; w_T)

L is the method's own loss of one image. Its projection head, or MIRAM's decoders, never leave a site; the
attacker takes the untrained ones that the seed gives (which leaves little of MIRAM's loss to go by). An AUROC
of 0.5 means that the score tells nothing. A better attack may tell more, and one that watches every round has
more to go by: this is a lower bound, never a proof of safety.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsecontrast import probes
from sparsecontrast.auditing import audit, ceiling
from sparsecontrast.batches import Views
from sparsecontrast.checkpoint import Round, read_round
from sparsecontrast.data.dataset import CANARY, HELD_OUT, held_out
from sparsecontrast.features import BATCH, load_method
from sparsecontrast.item_scores import Found, Question, item_names
from sparsecontrast.policy import default_delta
from sparsecontrast.probes import Scored
from sparsecontrast.runs import Run
from sparsecontrast.settings import Config
from sparsecontrast.trainer import derive_seed

if TYPE_CHECKING:
    from sparsecontrast.data.cache import Dataset

MEMBERSHIP = "membership"
SPLIT, CANARIES = "test split", "canaries"  # with whom the patients trained on are compared
SCORES = ("loss", "calibrated")
CONFIDENCE = 0.95
Told = dict[str, Any]


def membership(run: Run, last: Round, dataset: "Dataset", sites: list[str] | None) -> tuple[Told, Found]:
    """Score the patients who were trained on, and who were not, under a run's newest round.

    Args:
        run: its ``audit.views`` and ``evaluation.bootstrap``.
        last: the newest round.
        dataset: of the run.
        sites: where each image lay in training; None for the index's own.

    Returns:
        For ``evaluation.json``: ``rows`` of AUROC of each score with its interval over patients, pairs of one
        site only; what the ``canaries`` prove (``audited``) at the ``delta`` that was promised, or that would
        suit the smallest site. And the patients' scores behind them.
    """
    config = run.config
    compared = _comparisons(dataset)
    asked = np.asarray(np.isfinite([np.full(len(dataset), np.nan), *compared.values()]).any(axis=0))
    scores = _scores(config, read_round(run.folder, 0).tensors, last.tensors, dataset.images, asked)
    found: Found = {}
    for against, included in compared.items():
        for name, values in scores.items():
            one = _patients(dataset, sites, values, included, config)
            found[Question(MEMBERSHIP, against, name)] = one
    delta = _delta(run, dataset)
    told = {"rows": [_row(question, one, config) for question, (_, one) in found.items()], "delta": delta}
    return told | {"canaries": audited({q: one for q, (_, one) in found.items()}, delta)}, found


def audited(scored: Mapping[Question, Scored], delta: float, confidence: float = CONFIDENCE) -> Told | None:
    """Bound from below the epsilon of what one run released, by all scores of its canaries.

    Returns:
        ``auditing.Audit`` as a mapping, with the most that so many canaries could have proved; None where
        nobody tossed a coin.
    """
    found = [one for question, one in scored.items() if question[:2] == (MEMBERSHIP, CANARIES)]
    if not found:
        return None
    scores, included = np.concatenate([one.scores for one in found]), found[0].labels == 1
    most = ceiling(len(included), delta, confidence, attacks=len(scores))
    told = dataclasses.asdict(audit(scores, included, delta, confidence))
    return {**told, "delta": delta, "confidence": confidence, "ceiling": most}


@torch.no_grad()
def image_losses(config: Config, tensors: Mapping[str, Tensor], images: np.ndarray) -> np.ndarray:
    """Mean loss [N] of images [N, S, S] under shared weights, over ``audit.views`` draws of two views.

    The draws depend on ``seed`` and on the place in ``images``, not on the weights.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = load_method(config, tensors).to(device)
    method.start_round(config.federation.rounds, config.federation.rounds)
    views, owners = Views(method, config, device), np.arange(len(images))
    total = np.zeros(len(images))
    for view in range(config.audit.views):
        for start in range(0, len(images), BATCH):
            rows = owners[start : start + BATCH]
            generator = torch.Generator().manual_seed(derive_seed(config.seed, MEMBERSHIP, view, start))
            batch = views.batch(images, owners, rows, rows, generator, view)
            total[rows] += method(batch).double().cpu().numpy()
    return total / max(config.audit.views, 1)


def _scores(
    config: Config, start: Mapping[str, Tensor], last: Mapping[str, Tensor], images: np.ndarray,
    asked: np.ndarray,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Both scores of each image [N]; NaN where it is not asked for."""
    losses = np.full((2, len(images)), np.nan)
    for row, weights in zip(losses, (start, last), strict=True):
        row[asked] = image_losses(config, weights, images[asked])
    before, after = losses
    return {"loss": -after, "calibrated": before - after}


def _comparisons(dataset: "Dataset") -> dict[str, np.ndarray]:
    """Who is compared: of each image 1 (trained on), 0 (not), or NaN (takes no part), [N]."""
    split, out = dataset.frame["split"].to_numpy(dtype=str), held_out(dataset.frame)
    nobody = np.full(len(split), np.nan)
    trained = np.where((split == "train") & ~out, 1.0, nobody)
    found = {SPLIT: np.where(split == "test", 0.0, trained)}
    if CANARY in dataset.frame:
        coin = dataset.frame[CANARY].to_numpy(dtype=str)
        found[CANARIES] = np.where(coin == "in", 1.0, np.where(coin == HELD_OUT, 0.0, nobody))
    return {name: of for name, of in found.items() if {0.0, 1.0} <= set(of.tolist())}


def _patients(
    dataset: "Dataset", sites: list[str] | None, values: np.ndarray, included: np.ndarray, config: Config
) -> tuple[np.ndarray, Scored]:
    """Mean score of each patient who takes part, with whether they were trained on."""
    rows = np.flatnonzero(np.isfinite(included))
    names = item_names(dataset.frame, config.data)[1][rows]
    places = dataset.frame["site"].to_numpy(dtype=str) if sites is None else np.array(sites, dtype=str)
    patients, first, owner = np.unique(names, return_index=True, return_inverse=True)
    mean = np.bincount(owner, values[rows]) / np.bincount(owner)
    scored = Scored(mean[None], included[rows][first], patients, places[rows][first], np.ones(1))
    return patients, scored


def _row(question: Question, one: Scored, config: Config) -> Told:
    found = probes.bootstrap([one], config.evaluation.bootstrap, config.seed)
    return {
        "against": question.label, "score": question.features, **dataclasses.asdict(found),
        "value": found.value if np.isfinite(found.value) else None,  # no site has patients of both kinds
        "members": int((one.labels == 1).sum()), "others": int((one.labels == 0).sum()),
    }  # fmt: skip


def _delta(run: Run, dataset: "Dataset") -> float:
    """The delta that the sites told, else ``audit.delta``, else what would suit the smallest site."""
    told = [float(row["delta"]) for row in run.sites if row.get("delta") is not None]
    train = dataset.frame[dataset.frame["split"] == "train"]
    smallest = train.groupby("site")["patient_id"].nunique().min()
    return max(told) if told else run.config.audit.delta or default_delta(int(smallest))
