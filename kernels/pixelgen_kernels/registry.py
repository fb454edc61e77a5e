"""Every operator in one table: how to make its inputs, its definition, its public function, what it starts.

Tests, benchmarks and reports read this table and nothing else. FLOPs, bytes and launches are not kept by hand: FLOPs
are counted by PyTorch's FlopCounterMode over the definition on the meta device, launches are recorded there from the
public function and its gradient (launch.py), ideal bytes are the tensors:

    forward bytes  = inputs + outputs                     each tensor once, views of an input not again
    backward bytes = inputs + output gradients + input gradients

Shape legend: B images, L patches, P pixels per patch, D width, H heads, d head size, F hidden width, C pixel channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pixelgen_kernels.adamw_ema import CONFIGS as ADAMW_EMA_CONFIGS
from pixelgen_kernels.adamw_ema import adamw_ema
from pixelgen_kernels.adamw_ema import reference as adamw_ema_reference
from pixelgen_kernels.attention import attention, attention_reference
from pixelgen_kernels.bodies import forced
from pixelgen_kernels.flow_loss import CONFIGS as FLOW_LOSS_CONFIGS
from pixelgen_kernels.flow_loss import flow_loss, flow_loss_reference
from pixelgen_kernels.launch import Started, recording
from pixelgen_kernels.norm_modulate import CONFIGS as NORM_MODULATE_CONFIGS
from pixelgen_kernels.norm_modulate import norm_modulate, norm_modulate_reference
from pixelgen_kernels.patch_projection import CONFIGS as PATCH_PROJECTION_CONFIGS
from pixelgen_kernels.patch_projection import noised_patch_projection, noised_patch_projection_reference
from pixelgen_kernels.philox import CONFIGS as RANDOM_WORDS_CONFIGS
from pixelgen_kernels.philox import NOISE, words, words_reference
from pixelgen_kernels.pixel_attention import PixelAttentionWeights, pixel_attention, pixel_attention_reference
from pixelgen_kernels.pixel_mlp import CONFIGS as PIXEL_MLP_CONFIGS
from pixelgen_kernels.pixel_mlp import pixel_mlp, pixel_mlp_reference
from pixelgen_kernels.pixel_modulate import CONFIGS as PIXEL_MODULATE_CONFIGS
from pixelgen_kernels.pixel_modulate import pixel_modulate, pixel_modulate_reference
from pixelgen_kernels.qk_norm_rope import CONFIGS as QK_NORM_ROPE_CONFIGS
from pixelgen_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from pixelgen_kernels.shapes import ModelShape
from pixelgen_kernels.swiglu import CONFIGS as SWIGLU_CONFIGS
from pixelgen_kernels.swiglu import swiglu, swiglu_reference
from pixelgen_kernels.swiglu_linear import swiglu_linear
from pixelgen_kernels.tuning import using

Inputs = dict[str, Any]


class Maker:
    """Random inputs on one device: normal numbers from a generator of its own, or nothing at all on "meta"."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = None
        if self.device.type != "meta":
            self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return out.normal_(mean, scale, generator=self.generator)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device).random_(0, high, generator=self.generator)


@dataclass(frozen=True)
class Variant:
    """Another way in which a model calls an operator, where that starts other kernels.

    change: arguments that differ. flowing: the outputs, by number, whose gradient there is (default: of all).
    """

    change: Mapping[str, Any] = field(default_factory=dict)
    flowing: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Operator:
    """One operator.

    inputs(shape, maker): keyword arguments of both functions at a model's sizes. function: the public one. definition:
    the plain-PyTorch body. configs: tuning configurations, the shipped one first; none for an operator without kernels
    of its own. constant: names of the tensors that get no gradient. in_place: it returns nothing and changes all
    tensors that are not constant. variants: by suffix; an operator's name and a suffix are a case.
    """

    name: str
    inputs: Callable[[ModelShape, Maker], Inputs]
    function: Callable[..., Any]
    definition: Callable[..., Any] | None = None
    configs: tuple[Any, ...] = ()
    constant: tuple[str, ...] = ()
    in_place: bool = False
    variants: Mapping[str, Variant] = field(default_factory=dict)

    def cases(self) -> dict[str, Variant]:
        """The plain call and all variants, by case."""
        return {self.name: Variant(), **{self.name + suffix: variant for suffix, variant in self.variants.items()}}

    def launches(
        self, shape: ModelShape, case: str = "", config: Any = None, dtype: torch.dtype = torch.bfloat16
    ) -> list[Started]:
        """What forward and backward of a case start at a shape, on a GPU, with the shipped configuration or another."""
        variant = self.cases()[case or self.name]
        tuned = nullcontext() if config is None else using(self.name, config)
        with forced("triton"), tuned, recording() as started:
            inputs = self.inputs(shape, Maker(dtype, "meta")) | variant.change
            if self.in_place:
                self.function(**inputs)
                return started
            wanted = list(leaves(self, inputs).values())
            out = outputs(self.function(**inputs))
            flowing = differentiable(out if variant.flowing is None else [out[i] for i in variant.flowing])
            if not flowing:
                return started
            torch.autograd.grad(flowing, wanted, [torch.empty_like(x) for x in flowing], allow_unused=True)
        return started


def tensors(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors among an operator's inputs by name; those inside a tuple are named "argument.field"."""
    found = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, tuple | list):
            fields = getattr(value, "_fields", range(len(value)))
            found |= {f"{name}.{k}": x for k, x in zip(fields, value, strict=True) if isinstance(x, Tensor)}
    return found


def leaves(operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
    """The inputs that get a gradient, marked so."""
    wanted = {
        name: x
        for name, x in tensors(inputs).items()
        if x.is_floating_point() and name not in operator.constant and not operator.in_place
    }
    for x in wanted.values():
        x.requires_grad_()
    return wanted


def outputs(result: Any) -> list[Tensor]:
    """The tensors that an operator returned."""
    return [result] if isinstance(result, Tensor) else [x for x in result or () if isinstance(x, Tensor)]


def differentiable(result: Any) -> list[Tensor]:
    """Those that a gradient flows back from."""
    return [x for x in outputs(result) if x.requires_grad]


@dataclass(frozen=True)
class Work:
    """FLOPs of the matrix products (2 x multiply-adds) and ideal bytes of one call."""

    forward_flops: int
    backward_flops: int
    forward_bytes: int
    backward_bytes: int


def work(operator: Operator, shape: ModelShape, dtype: torch.dtype = torch.bfloat16) -> Work:
    """Count an operator's work on the meta device, from its definition."""
    inputs = operator.inputs(shape, Maker(dtype, "meta"))
    given = tensors(inputs)
    wanted = leaves(operator, inputs)
    with FlopCounterMode(display=False) as forward:
        result = outputs(operator.definition(**inputs))
    seen = {x.untyped_storage()._cdata for x in given.values()}
    fresh = [x for x in result if x.untyped_storage()._cdata not in seen]
    read, written = _bytes(given.values()), _bytes(fresh)
    if operator.in_place:
        changed = [x for name, x in given.items() if name not in operator.constant]
        return Work(forward.get_total_flops(), 0, read + _bytes(changed), 0)
    flowing = differentiable(result)
    if not flowing:
        return Work(forward.get_total_flops(), 0, read + written, 0)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(flowing, list(wanted.values()), [torch.empty_like(x) for x in flowing], allow_unused=True)
    gradients = _bytes(flowing) + _bytes(wanted.values())
    return Work(forward.get_total_flops(), backward.get_total_flops(), read + written, read + gradients)


def _bytes(some: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in some)


def _token_stream(s: ModelShape, m: Maker) -> Inputs:
    # The six modulations of a block are slices of one projection, so their rows are 6 D apart.
    shift, scale, gate = m.normal(s.batch, 6 * s.width, scale=0.3).chunk(6, dim=-1)[:3]
    x, branch = (m.normal(s.batch, s.tokens, s.width) for _ in range(2))
    weight = m.normal(s.width, scale=0.1, mean=1.0)
    return {
        "x_BLD": x, "norm_weight_D": weight, "shift_BD": shift, "scale_BD": scale,
        "branch_BLD": branch, "gate_BD": gate, "eps": 1e-6,
    }  # fmt: skip


def _rotary(s: ModelShape, m: Maker) -> tuple[Tensor, Tensor]:
    angle = m.normal(s.tokens, s.head_dim // 2, scale=3.0, dtype=torch.float32)
    return angle.cos(), angle.sin()


def _qk_norm_rope(s: ModelShape, m: Maker) -> Inputs:
    cos, sin = _rotary(s, m)
    return {
        "qkv": m.normal(s.batch, s.tokens, 3 * s.width),
        "q_norm_weight": m.normal(s.head_dim, scale=0.1, mean=1.0),
        "k_norm_weight": m.normal(s.head_dim, scale=0.1, mean=1.0),
        "cos": cos, "sin": sin, "heads": s.heads, "eps": 1e-6,
    }  # fmt: skip


def _swiglu(s: ModelShape, m: Maker) -> Inputs:
    return {"packed": m.normal(s.batch, s.tokens, 2 * s.ffn)}


def _swiglu_linear(s: ModelShape, m: Maker) -> Inputs:
    return _swiglu(s, m) | {"weight": m.normal(s.width, s.ffn, scale=s.ffn**-0.5)}


def _attention(s: ModelShape, m: Maker) -> Inputs:
    return {name: m.normal(s.batch, s.tokens, s.heads, s.head_dim) for name in ("q_BLHd", "k_BLHd", "v_BLHd")}


def _pixels(s: ModelShape, m: Maker, slots: int) -> Inputs:
    N = s.batch * s.tokens
    return {
        "x_NPC": m.normal(N, s.pixels, s.channels),
        "norm_weight_C": m.normal(s.channels, scale=0.1, mean=1.0),
        "modulation": m.normal(N, s.pixels, slots * s.channels, scale=0.3),
        "eps": 1e-6,
    }


def _pixel_mlp(s: ModelShape, m: Maker) -> Inputs:
    C, F = s.channels, s.pixel_hidden
    return _pixels(s, m, 4) | {
        "e_NPC": m.normal(s.batch * s.tokens, s.pixels, C),
        "w1": m.normal(F, C, scale=C**-0.5), "b1": m.normal(F, scale=0.1),
        "w2": m.normal(C, F, scale=F**-0.5), "b2": m.normal(C, scale=0.1),
        "post": False, "gelu": "none",
    }  # fmt: skip


def _random_words(s: ModelShape, m: Maker) -> Inputs:
    return {"seed": 1, "numbers": m.integers(1 << 40, s.batch), "stream": NOISE, "count": 3 * s.image**2}


def _patch_projection(s: ModelShape, m: Maker) -> Inputs:
    features = 3 * s.patch**2
    return {
        "image": m.integers(256, s.batch, s.image, s.image, 3, dtype=torch.uint8),
        "numbers": m.integers(1 << 40, s.batch),
        "t": m.normal(s.batch, dtype=torch.float32).sigmoid(),
        "weight": m.normal(s.width, features, scale=features**-0.5), "bias": m.normal(s.width, scale=0.1),
        "patch": s.patch, "seed": 1, "noise_scale": 1.0,
    }  # fmt: skip


def _flow_loss(s: ModelShape, m: Maker) -> Inputs:
    N, C = s.batch * s.tokens, s.channels
    return {
        "x_NPC": m.normal(N, s.pixels, C), "norm_weight_C": m.normal(C, scale=0.1, mean=1.0),
        "w_3C": m.normal(3, C, scale=C**-0.5), "b_3": m.normal(3, scale=0.1),
        "target_NP3": m.normal(N, s.pixels, 3, dtype=torch.float32),
        "weight_B": m.normal(s.batch, scale=0.1, mean=1.0, dtype=torch.float32), "eps": 1e-6,
    }  # fmt: skip


def _pixel_attention(s: ModelShape, m: Maker) -> Inputs:
    D, S = s.width, s.pixels * s.channels
    pixels, (cos, sin) = _pixels(s, m, 2), _rotary(s, m)

    def linear(out: int, inner: int) -> tuple[Tensor, Tensor]:
        return m.normal(out, inner, scale=inner**-0.5), m.normal(out, scale=0.1)

    weights = PixelAttentionWeights(
        pixels["norm_weight_C"], *linear(D, S), m.normal(3 * D, D, scale=D**-0.5),
        m.normal(s.head_dim, scale=0.1, mean=1.0), m.normal(s.head_dim, scale=0.1, mean=1.0),
        *linear(D, D), *linear(S, D),
    )  # fmt: skip
    return {
        "x_NPC": pixels["x_NPC"], "modulation": pixels["modulation"], "w": weights,
        "cos": cos, "sin": sin, "heads": s.heads, "eps": 1e-6,
    }  # fmt: skip


def _adamw_ema(s: ModelShape, m: Maker) -> Inputs:
    n = s.parameters // 4  # a shard over four ranks
    param, grad, exp_avg, ema = (m.normal(n, scale=0.02, dtype=torch.float32) for _ in range(4))
    return {
        "param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": grad * grad, "emas": (ema,),
        "step": 10, "ema_decays": (0.999,),
        "lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0,
    }  # fmt: skip


def _table(*operators: Operator) -> dict[str, Operator]:
    return {operator.name: operator for operator in operators}


OPERATORS = _table(
    Operator("random_words", _random_words, words, words_reference, RANDOM_WORDS_CONFIGS),
    Operator(
        "noised_patch_projection",
        _patch_projection,
        noised_patch_projection,
        noised_patch_projection_reference,
        PATCH_PROJECTION_CONFIGS,
        constant=("image", "numbers", "t"),
    ),
    Operator(
        "norm_modulate",
        _token_stream,
        norm_modulate,
        norm_modulate_reference,
        NORM_MODULATE_CONFIGS,
        # the first norm of a stack has no branch before it, the last one no reader of its x'
        variants={"_first": Variant({"branch_BLD": None, "gate_BD": None}), "_last": Variant(flowing=(0,))},
    ),
    Operator(
        "qk_norm_rope",
        _qk_norm_rope,
        qk_norm_rope,
        qk_norm_rope_reference,
        QK_NORM_ROPE_CONFIGS,
        constant=("cos", "sin"),
    ),
    Operator("swiglu", _swiglu, swiglu, swiglu_reference, SWIGLU_CONFIGS),
    Operator(
        "swiglu_linear",
        _swiglu_linear,
        swiglu_linear,
        lambda packed, weight: F.linear(swiglu_reference(packed), weight),
    ),
    Operator("attention", _attention, attention, attention_reference),
    Operator(
        "pixel_modulate",
        lambda s, m: _pixels(s, m, 2),
        pixel_modulate,
        pixel_modulate_reference,
        PIXEL_MODULATE_CONFIGS,
        variants={"_plain": Variant({"modulation": None})},
    ),
    Operator(
        "pixel_mlp",
        _pixel_mlp,
        pixel_mlp,
        pixel_mlp_reference,
        PIXEL_MLP_CONFIGS,
        variants={
            "_post": Variant({"post": True}),
            "_tanh": Variant({"gelu": "tanh"}),
            "_post_tanh": Variant({"post": True, "gelu": "tanh"}),
        },
    ),
    Operator(
        "pixel_attention", _pixel_attention, pixel_attention, pixel_attention_reference, constant=("cos", "sin")
    ),
    Operator(
        "flow_loss",
        _flow_loss,
        flow_loss,
        flow_loss_reference,
        FLOW_LOSS_CONFIGS,
        constant=("target_NP3", "weight_B"),
    ),
    Operator(
        "adamw_ema", _adamw_ema, adamw_ema, adamw_ema_reference, ADAMW_EMA_CONFIGS, constant=("grad",),
        in_place=True,
    ),
)  # fmt: skip


def launches(
    shape: ModelShape, config_of: Callable[[Operator], Any] = lambda operator: None, dtype: torch.dtype = torch.bfloat16
) -> dict[str, list[Started]]:
    """What a step of a named model starts, by case, as the shape's `cases` say."""
    return {
        case: operator.launches(shape, case, config_of(operator), dtype)
        for operator in OPERATORS.values()
        for case in operator.cases()
        if case in shape.cases
    }
