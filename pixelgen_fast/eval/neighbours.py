"""What features tell without any training on top of them: nearest neighbours, and how many dimensions they use.

    votes(c) = sum over the k nearest of the bank that have class c of exp(cos(query, neighbour) / T)

as DINO judges features (arXiv 2104.14294; k = 20, T = 0.07). The effective rank is exp(entropy of the singular values
of the centred features, scaled to sum 1): 1 when all lie on a line, D when every direction counts alike (Roy and
Vetterli 2007).

Shapes: N features of the bank, Q queries, D their width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """The class with most votes, int64 [Q]. bank: [N, D], labels: int64 [N] from 0 on, queries: [Q, D].

    Raises ValueError for shapes that do not fit and for k outside of 1 to N.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1] or labels.shape != bank.shape[:1]:
        shapes = f"{list(bank.shape)}, {list(labels.shape)}, {list(queries.shape)}"
        raise ValueError(f"need bank [N, D], labels [N], queries [Q, D], got {shapes}")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k} and the bank holds {len(bank)} features; it must lie from 1 to {len(bank)}")
    similar = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    nearest, index = similar.topk(k, dim=1)
    # One weight for all votes of a query cancels: taking off the largest keeps exp in range.
    weight = torch.exp((nearest - nearest[:, :1]) / temperature)
    votes = weight.new_zeros(len(queries), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[index], weight).argmax(dim=1)


def knn_accuracy(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    truth: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of queries whose predicted class is the true one, int64 [Q]. Raises what `knn_predict` raises."""
    return (knn_predict(bank, labels, queries, k=k, temperature=temperature) == truth).double().mean().item()


def effective_rank(features: Tensor) -> float:
    """Effective rank of [N, D] about their mean; 0 when they are all the same."""
    values = torch.linalg.svdvals((features - features.mean(0)).double())
    if not values.sum() > 0:
        return 0.0
    p = values / values.sum()
    return torch.exp(torch.special.entr(p).sum()).item()
