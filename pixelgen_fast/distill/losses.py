"""The losses of self-distillation, in float32 or wider.

p are the teacher's probabilities of K prototypes: Sinkhorn-Knopp scales exp(logits / T) until every sample sums to 1
and every prototype to N / K. q = softmax(logits / T') are the student's.

    views     - mean over images and pairs of a teacher's view g and a student's view v != g of  sum_k p_g log q_v
    patches   - mean over masked patches of  sum_k p log q
    spread    - mean over images of  log |f - nearest other f| , f = class token / |class token|   (KoLeo)

Shapes: B images, V student views of which the first G are also the teacher's, N samples, M masked patches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_SPREAD_EPS = 1e-8


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Probabilities [N, K] from logits [N, K]: samples sum to 1 exactly, prototypes to N / K as iterations grow."""
    log_p = logits / temperature
    for _ in range(iterations):
        log_p = log_p - log_p.logsumexp(dim=0, keepdim=True)
        log_p = log_p - log_p.logsumexp(dim=1, keepdim=True)
    return log_p.exp()


def view_loss(logits_VBK: Tensor, p_GBK: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of every student view with every teacher view but itself."""
    V, B, _ = logits_VBK.shape
    G = len(p_GBK)
    log_q = F.log_softmax(logits_VBK / temperature, dim=-1)
    cross_GV = -torch.einsum("gbk,vbk->gv", p_GBK, log_q) / B
    return (cross_GV.sum() - cross_GV.diagonal().sum()) / (G * V - G)


def patch_loss(logits_MK: Tensor, p_MK: Tensor, temperature: float) -> Tensor:
    """Cross-entropy at masked patches; 0 where none is masked."""
    log_q = F.log_softmax(logits_MK / temperature, dim=-1)
    return -(p_MK * log_q).sum() / max(len(p_MK), 1)


def spread_loss(features_BD: Tensor) -> Tensor:
    """The lower, the farther every feature lies from its nearest other one on the sphere."""
    f = F.normalize(features_BD, dim=-1)
    with torch.no_grad():
        nearest = (f @ f.T).fill_diagonal_(-1).argmax(dim=1)
    return -torch.log((f - f[nearest]).norm(dim=1) + _SPREAD_EPS).mean()


def momentum(start: float, nimg: int, total: int) -> float:
    """Of the moving average after `nimg` of `total` images: 1 - (1 - start) (1 + cos(pi nimg / total)) / 2."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * nimg / total)) / 2
