"""Tokens drawn one by one with guidance: AliTok's schedule, and SoftCFG (arXiv 2510.00996), which softens it.

    w_s    = 1 + (gamma - 1) (1 - cos(pi (s / N)^k)) / 2              at token s of N
    logits = (u + w_s (c - u)) / temperature                          c with the class, u without

SoftCFG lets the model without a class forget where the one with it was sure. Token s is drawn with confidence q_s: the
probability that softmax(c / temperature) gives it, or gives its best token. From the next token on, the value that the
branch without a class keeps for position j is multiplied, in every layer, by W_j; position 0 is the class, W_0 = 1, and

    step_norm:  W_j = max(0.05, (1 - C_j / (sum_{i >= 1} C_i + 1e-5))^strength)      1 <= j < m, all anew at each token
    else:       W_j = 1 - C_j

where m positions lie behind. The token at position j is id_{j-1}, but published code takes C_j = q_j, the confidence of
the token after it (q_0 is never used); `own` takes C_j = q_{j-1}. Shapes: B images, V words, m positions, s + 1 = m.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pixelgen_fast.models.alitok_transformer import TokenTransformer

Confidence = Literal["sampled", "maximum"]
FLOOR, SMALL = 0.05, 1e-5


def guidance_weight(step: int, count: int, gamma: float, power: float) -> float:
    """w_s of the formula above."""
    return 1 + (gamma - 1) * (1 - math.cos(math.pi * (step / count) ** power)) / 2


@dataclass(frozen=True)
class SoftGuidance:
    """What of SoftCFG can be chosen; the defaults are the published code."""

    confidence: Confidence = "sampled"
    step_norm: bool = True
    strength: float = 1.0
    own: bool = False

    def confidence_of(self, logits_BV: Tensor, ids: Tensor) -> Tensor:
        """q [B] of the tokens ids [B] that were drawn; logits: with the class, divided by the temperature."""
        chances = logits_BV.softmax(-1)
        if self.confidence == "maximum":
            return chances.amax(-1)
        return chances.gather(-1, ids[:, None])[:, 0]

    def worth(self, q_Bm: Tensor) -> Tensor:
        """W [B, m] of the positions behind, from the confidences q_0 .. q_s of all tokens so far."""
        C = q_Bm[:, :-1] if self.own else q_Bm[:, 1:]
        if self.step_norm:
            rest = 1 - C / (C.sum(-1, keepdim=True) + SMALL)
            W = rest.pow(self.strength).clamp_min(FLOOR)
        else:
            W = 1 - C
        return torch.cat([torch.ones_like(q_Bm[:, :1]), W], dim=-1)


@dataclass(frozen=True)
class Guidance:
    """gamma and k of the schedule, the temperature, and SoftCFG, None for plain guidance. gamma 1 is no guidance."""

    gamma: float = 1.0
    power: float = 1.0
    temperature: float = 1.0
    soft: SoftGuidance | None = None


def draw_tokens(
    transformer: TokenTransformer,
    labels: Tensor,
    count: int,
    guidance: Guidance,
    choose: Callable[[int, Tensor, Tensor], Tensor],
    before_pass: Callable[[], object] = lambda: None,
) -> Tensor:
    """Draw `count` tokens for each of the labels int64 [B]: int64 [B, count].

    choose(s, logits, conditional): tokens int64 [B] number s, from guided logits and those with the class, both
    [B, V], divided by the temperature, float32 or better. before_pass: called before each pass through the network.
    """
    g, guided, B = guidance, guidance.gamma != 1, len(labels)
    rows = torch.cat([labels, torch.full_like(labels, transformer.null_class)]) if guided else labels
    past, x = transformer.past(len(rows)), transformer.y_embed(rows)
    ids, q = [], []
    for s in range(count):
        before_pass()
        worth = None
        if q:
            behind = g.soft.worth(torch.stack(q, dim=1))
            ones = torch.ones_like(behind[:, :1])
            worth = torch.cat([ones.expand(B, s + 1), torch.cat([behind, ones], dim=1)])
        scores = transformer.extend(x, past, worth)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / g.temperature
        c, u = scores[:B], scores[-B:]
        logits = u + guidance_weight(s, count, g.gamma, g.power) * (c - u) if guided else c
        ids.append(choose(s, logits, c))
        if guided and g.soft is not None:
            q.append(g.soft.confidence_of(c, ids[-1]))
        x = transformer.token_embed(ids[-1].repeat(2) if guided else ids[-1])
    return torch.stack(ids, dim=1)


def inverse_transform(logits_BV: Tensor, u_B: Tensor) -> Tensor:
    """Tokens int64 [B] by inverse transform: the first whose cumulative probability is above u, uniform in (0, 1)."""
    cumulative = logits_BV.double().softmax(-1).cumsum(-1)
    threshold = u_B.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(logits_BV.shape[-1] - 1)
