"""One function per loss; each returns one value a row, never averaged."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(first: Tensor, second: Tensor, temperature: float, patients: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE with in-batch negatives (van den Oord et al. 2018, eq. 4).

    Row i's positive is the other view's row i; its negatives are the other view's other rows. Rows of
    the same patient are no negatives of each other. ``chance_level`` says what a blind guess costs.
    Row i's loss depends on every row: never use it under per-sample privacy.

    Args:
        first: embeddings of the first views [B, D], any norm.
        second: embeddings of the second views [B, D].
        temperature: positive.
        patients: integer codes [B]; None when every row is another patient.

    Returns:
        Loss [B], >= 0.
    """
    a, b = F.normalize(first.float(), dim=1), F.normalize(second.float(), dim=1)
    logits = a @ b.T / temperature
    if patients is not None:
        logits = logits.masked_fill(_spared(patients), -torch.inf)
    target = torch.arange(len(a), device=a.device)
    forward = F.cross_entropy(logits, target, reduction="none")
    return 0.5 * (forward + F.cross_entropy(logits.T, target, reduction="none"))


def patch_info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE within each image: its own other tokens are the negatives.

    Token t of one view is to be told from the T - 1 other tokens of the other view of the same image
    (Wang et al. 2021, DenseCL, arXiv 2011.09157, eq. 2, negatives from the image itself). Row i's loss
    depends on row i alone, which per-sample privacy demands; a blind guess costs ln(T).

    Args:
        first: token embeddings of the first views [B, T, D], any norm.
        second: of the second views, token t showing the same place [B, T, D].
        temperature: positive.

    Returns:
        Loss [B], >= 0, the mean over tokens and directions.
    """
    exact = torch.promote_types(first.dtype, torch.float32)
    a, b = F.normalize(first.to(exact), dim=2), F.normalize(second.to(exact), dim=2)
    logits = a @ b.mT / temperature
    positive = logits.diagonal(dim1=1, dim2=2)
    return (0.5 * (logits.logsumexp(2) + logits.logsumexp(1)) - positive).mean(1)


def reconstruction(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of what was hidden (He et al., arXiv 2111.06377, section 3): [B], >= 0.

    Args:
        predicted: pixels of hidden tokens [B, T, pixels].
        target: of the same shape.
    """
    return (predicted.float() - target.float()).square().mean(dim=(1, 2))


def chance_level(patients: Tensor) -> Tensor:
    """Mean of ``info_nce`` where all embeddings are one: of ln(1 + negatives) over the rows of [B] patients.

    ``ln(B)`` when all patients differ, less where rows share a patient.
    """
    return (~_spared(patients)).sum(1).log().mean()


def _spared(patients: Tensor) -> Tensor:
    """Pairs of rows that are no negatives of each other, [B, B]: other rows of the same patient."""
    return (patients[:, None] == patients[None, :]).fill_diagonal_(False)


def distillation(scores: Tensor, attention: Tensor) -> Tensor:
    """KL(attention || softmax(scores)) per row: the scorer learns the teacher's attention.

    Args:
        scores: raw cell scores [B, N].
        attention: the target distribution [B, N], rows sum to 1; no gradient flows to it.

    Returns:
        Loss [B], >= 0.
    """
    return F.kl_div(scores.log_softmax(1), attention.detach(), reduction="none").sum(1)


def entropy_shortfall(scores: Tensor, floor: float) -> Tensor:
    """How far the entropy of softmax(scores) [B, N] falls below ``floor * ln(N)``: [B], in nats."""
    log_p = scores.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return F.relu(floor * math.log(scores.shape[1]) - entropy)


def sparsity_budget(scores: Tensor, fraction: float) -> Tensor:
    """Squared distance of the mean keep probability, sigmoid(scores) [B, N], from ``fraction``: [B]."""
    return (scores.sigmoid().mean(1) - fraction).square()
