"""FractalGen drawn slowly, from its formulas and weights under their public names: an independent reference.

One image at a time, one crop at a time, float64, every network run anew on all that is known; nothing is cached. Random
numbers are given: words[l][crop] order the patches of a crop of level l, colors[l][crop] are three uniform numbers, of
its guiding pixel or, behind the last level, of a pixel.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
INSIDE = "next_fractal."


@dataclass
class Slow:
    """sides: of the image, then of the patches of each level. heads: of each level, then of pixels."""

    weights: dict[str, Tensor]
    sides: list[int]
    heads: list[int]
    kind: str
    passes: list[int]
    words: list[np.ndarray]
    colors: list[np.ndarray]
    guidance: float
    temperature: float
    threshold: float

    def __post_init__(self) -> None:
        self.weights = {name: value.detach().double() for name, value in self.weights.items()}
        self.nats = 0.0

    def image(self, label: int) -> np.ndarray:
        """Values [3, S, S]. `nats`: -log of the probability of the colors that were chosen, without guidance."""
        c, u = self.weights["class_emb.weight"][label], self.weights["fake_latent"][0]
        count = 5 if self.kind == "mar" else 1
        return self.crop(0, [c] * count, [u] * count, 0, self.guidance)

    def crop(self, level: int, c: list[Tensor], u: list[Tensor], place: int, scale: float) -> np.ndarray:
        if level == len(self.sides) - 1:
            return self.color(INSIDE * level, self.heads[-1], c[0], u[0], self.colors[level][place], scale)[
                :, None, None
            ]
        side, p = self.sides[level], self.sides[level + 1]
        n = side // p
        name, values, known = f"{INSIDE * level}generator.", np.zeros((3, side, side)), set()
        guide = None
        if f"{name}pix_proj.weight" in self.weights:
            drawn = self.color(f"{name}guiding_pixel_loss.", 4, c[0], u[0], self.colors[level][place], scale)
            guide = torch.tensor((drawn / 255 - MEAN) / STD)
        for turn, share in self.turns(level, place):
            of_class, of_none = (self.outputs(level, name, values, known, cond, guide) for cond in (c, u))
            w = scale if level else 1 + (scale - 1) * share
            for j in turn:
                inner = [self.inner(z, j, n) for z in (of_class, of_none)]
                patch = self.crop(level + 1, *inner, place * n * n + j, w)
                values[:, j // n * p : (j // n + 1) * p, j % n * p : (j % n + 1) * p] = patch
            known |= set(turn)
        return values

    def turns(self, level: int, place: int) -> list[tuple[list[int], float]]:
        """The patches of each pass, and the share of the crop that guidance counts as drawn."""
        L = (self.sides[level] // self.sides[level + 1]) ** 2
        if self.kind == "ar":
            return [([j], (j + 1) / L) for j in range(L)]
        order, count, now, found = np.argsort(self.words[level][place]), min(L, self.passes[level]), L, []
        for s in range(count):
            after = max(1, min(now - 1, math.floor(L * math.cos(math.pi / 2 * (s + 1) / count))))
            last = s == count - 1
            found.append(([int(j) for j in order[0 if last else after : now]], (L - after) / L))
            now = after
        return found

    def inner(self, z: Tensor, j: int, n: int) -> list[Tensor]:
        if self.kind == "ar":
            return [z[j]]
        around = [(j // n + dy, j % n + dx) for dy, dx in ((0, 0), (-1, 0), (0, 1), (1, 0), (0, -1))]
        return [z[y * n + x] if 0 <= y < n and 0 <= x < n else torch.zeros_like(z[0]) for y, x in around]

    def outputs(
        self, level: int, name: str, values: np.ndarray, known: set[int], cond: list[Tensor], guide: Tensor | None
    ) -> Tensor:
        """z of every patch of a crop [L, D], or of those whose predecessors are known."""
        side, p = self.sides[level], self.sides[level + 1]
        n = side // p
        x = (values / 255 - MEAN[:, None, None]) / STD[:, None, None]
        patches = [x[:, i * p : (i + 1) * p, k * p : (k + 1) * p].reshape(-1) for i in range(n) for k in range(n)]
        tokens = [self.linear(f"{name}cond_emb", c) for c in cond[::-1]]
        tokens = ([] if guide is None else [self.linear(f"{name}pix_proj", guide)]) + tokens
        front = len(tokens)
        for j, patch in enumerate(patches):
            if self.kind == "mar" and j not in known:
                tokens.append(self.weights[f"{name}mask_token"][0, 0])
            elif self.kind == "mar" or j in known:
                tokens.append(self.linear(f"{name}patch_emb", torch.tensor(patch)))
        h = torch.stack(tokens)
        h = self.norm(f"{name}patch_emb_ln", h + self.weights[f"{name}pos_embed_learned"][0, : len(h)])
        for i in range(self.depth(f"{name}blocks.")):
            block = f"{name}blocks.{i}."
            h = self.block(block, h, self.heads[level], False) if self.kind == "mar" else self.llama(block, h, level, n)
        h = self.norm(f"{name}norm", h)
        return h[front:] if self.kind == "mar" else h

    def color(self, name: str, heads: int, c: Tensor, u: Tensor, numbers: np.ndarray, scale: float) -> np.ndarray:
        chosen: list[int] = []
        for channel in range(3):
            own, none = (self.temperature * self.logits(name, heads, cond, chosen)[channel] for cond in (c, u))
            if self.guidance != 1:
                for v in np.nonzero((own.softmax(0) < self.threshold).numpy())[0]:
                    none[v] = max(none[v], own[v] - own.max() + none.max())
                own = none + scale * (own - none)
            probabilities, value, total = own.softmax(0).tolist(), 0, 0.0
            while value < 255 and total + probabilities[value] <= numbers[channel]:
                total += probabilities[value]
                value += 1
            chosen.append(value)
            if "guiding" not in name:
                self.nats -= math.log(probabilities[value])
        return np.array(chosen, dtype=float)

    def logits(self, name: str, heads: int, cond: Tensor, chosen: list[int]) -> list[Tensor]:
        tokens = [self.linear(f"{name}cond_proj", cond)]
        tokens += [self.weights[f"{name}{k}_codebook.weight"][v] for k, v in zip("rgb", chosen, strict=False)]
        h = self.norm(f"{name}ln", torch.stack(tokens))
        for i in range(self.depth(f"{name}blocks.")):
            h = self.block(f"{name}blocks.{i}.", h, heads, True)
        h = self.norm(f"{name}norm", h)
        return [
            self.weights[f"{name}{k}_codebook.weight"] @ row + self.weights[f"{name}{k}_mlm.bias"][0]
            for k, row in zip("rgb", h, strict=False)
        ]

    def block(self, name: str, h: Tensor, heads: int, causal: bool) -> Tensor:
        q, k, v = self.linear(f"{name}attn.qkv", self.norm(f"{name}norm1", h)).chunk(3, dim=-1)
        h = h + self.linear(f"{name}attn.proj", attend(q, k, v, heads, causal))
        inside = F.gelu(self.linear(f"{name}mlp.fc1", self.norm(f"{name}norm2", h)))
        return h + self.linear(f"{name}mlp.fc2", inside)

    def llama(self, name: str, h: Tensor, level: int, n: int) -> Tensor:
        W, heads = self.weights, self.heads[level]
        q, k, v = (rms(h, W[f"{name}attention_norm.weight"]) @ W[f"{name}attention.wqkv.weight"].T).chunk(3, dim=-1)
        turns = turned(len(h), n, h.shape[1] // heads).repeat(1, heads)
        q, k = (torch.view_as_real(torch.view_as_complex(x.reshape(len(x), -1, 2).contiguous()) * turns).flatten(1)
                for x in (q, k))  # fmt: skip
        h = h + attend(q, k, v, heads, True) @ W[f"{name}attention.wo.weight"].T
        inside = rms(h, W[f"{name}ffn_norm.weight"])
        a, b = (inside @ W[f"{name}feed_forward.w{i}.weight"].T for i in (1, 3))
        return h + (F.silu(a) * b) @ W[f"{name}feed_forward.w2.weight"].T

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def depth(self, prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in self.weights if key.startswith(prefix)})


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
    rows = []
    for i in range(len(q)):
        seen = slice(0, i + 1 if causal else len(q))
        parts = []
        for qh, kh, vh in zip(q[i].chunk(heads), k[seen].chunk(heads, -1), v[seen].chunk(heads, -1), strict=True):
            parts.append((kh @ qh / math.sqrt(len(qh))).softmax(0) @ vh)
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def turned(count: int, n: int, d: int) -> Tensor:
    """Complex factors [count, d / 2]: zero for the condition, then row and column of patches 0, 1, ..."""
    rows = [torch.zeros(d // 2, dtype=torch.complex128)]
    for j in range(count - 1):
        angles = [place * 1e4 ** (-2 * i / (d // 2)) for place in (j // n, j % n) for i in range(d // 4)]
        rows.append(torch.polar(torch.ones(d // 2).double(), torch.tensor(angles, dtype=torch.float64)))
    return torch.stack(rows)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
