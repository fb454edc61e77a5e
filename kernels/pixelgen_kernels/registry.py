"""Every operator in one table: how to make its inputs, its definition, its public function, its kernels.

Tests, benchmarks and reports read this table and nothing else. FLOPs and bytes are not kept by hand: FLOPs are
counted by PyTorch's FlopCounterMode over the definition on the meta device, ideal bytes are its tensors:

    forward bytes  = inputs + outputs                     each tensor once, views of an input not again
    backward bytes = inputs + output gradients + input gradients

Shape legend: B images, L patches, P pixels per patch, D width, H heads, d head size, F hidden width, C pixel channels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pixelgen_kernels.launch import Launch, ModelShape
from pixelgen_kernels.pixel_attention import PixelAttentionWeights
from pixelgen_kernels.swiglu import swiglu_reference

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
class Operator:
    """One operator.

    inputs(shape, maker): keyword arguments of both functions at a model's sizes. definition: the plain-PyTorch body,
    or its name in the operator's module. constant: names of the tensors that get no gradient. in_place: it returns
    nothing and changes all tensors that are not constant. variants: further kernels that a model may ask for, as
    suffix of their names and arguments of the module's `aot`. launches and tuning stand in for its aot and CONFIGS.
    """

    name: str
    inputs: Callable[[ModelShape, Maker], Inputs]
    definition: str | Callable[..., Any]
    function_name: str = ""
    constant: tuple[str, ...] = ()
    in_place: bool = False
    variants: tuple[tuple[str, dict[str, Any]], ...] = ()
    launches: Callable[[ModelShape, Any], list[Launch]] | None = field(default=None, repr=False)
    tuning: tuple[Any, ...] | None = None

    @cached_property
    def module(self) -> ModuleType:
        return importlib.import_module(f"pixelgen_kernels.{self.name}")

    @property
    def function(self) -> Callable[..., Any]:
        """The public function: `function_name`, or that of the operator's own name."""
        return getattr(self.module, self.function_name or self.name)

    @property
    def reference(self) -> Callable[..., Any]:
        """The definition, in plain PyTorch."""
        return getattr(self.module, self.definition) if isinstance(self.definition, str) else self.definition

    @property
    def configs(self) -> tuple[Any, ...]:
        """Tuning configurations, the shipped one first; empty for an operator without kernels of its own."""
        return self.tuning if self.tuning is not None else getattr(self.module, "CONFIGS", ())

    def aot(self, shape: ModelShape, config: Any) -> list[Launch]:
        """The launches of its forward and backward at a shape, as the default model starts them."""
        return self.launches(shape, config) if self.launches else self.module.aot(shape, config)

    def every_launch(self, shape: ModelShape, config: Any) -> list[Launch]:
        """The launches of `aot` and those of all variants."""
        found = self.aot(shape, config)
        for suffix, arguments in self.variants:
            found += [replace(x, name=x.name + suffix) for x in self.module.aot(shape, config, **arguments)]
        return found


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
        result = outputs(operator.reference(**inputs))
    seen = {x.untyped_storage()._cdata for x in given.values()}
    fresh = [x for x in result if x.untyped_storage()._cdata not in seen]
    read, written = _bytes(given.values()), _bytes(fresh)
    if operator.in_place:
        changed = [x for name, x in given.items() if name not in operator.constant]
        return Work(forward.get_total_flops(), 0, read + _bytes(changed), 0)
    flowing = differentiable(result)
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
        "x_BLD": x, "weight_D": weight, "shift_BD": shift, "scale_BD": scale,
        "branch_BLD": branch, "gate_BD": gate, "eps": 1e-6,
    }  # fmt: skip


def _rotary(s: ModelShape, m: Maker) -> tuple[Tensor, Tensor]:
    angle = m.normal(s.tokens, s.head_dim // 2, scale=3.0, dtype=torch.float32)
    return angle.cos(), angle.sin()


def _qk_norm_rope(s: ModelShape, m: Maker) -> Inputs:
    cos, sin = _rotary(s, m)
    return {
        "qkv": m.normal(s.batch, s.tokens, 3 * s.width),
        "q_weight": m.normal(s.head_dim, scale=0.1, mean=1.0), "k_weight": m.normal(s.head_dim, scale=0.1, mean=1.0),
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
        "weight_C": m.normal(s.channels, scale=0.1, mean=1.0),
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
        "x_NPC": m.normal(N, s.pixels, C), "norm_C": m.normal(C, scale=0.1, mean=1.0),
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
        pixels["weight_C"], *linear(D, S), m.normal(3 * D, D, scale=D**-0.5),
        m.normal(s.head_dim, scale=0.1, mean=1.0), m.normal(s.head_dim, scale=0.1, mean=1.0),
        *linear(D, D), *linear(S, D),
    )  # fmt: skip
    return {
        "x_NPC": pixels["x_NPC"], "modulation": pixels["modulation"], "w": weights,
        "cos": cos, "sin": sin, "heads": s.heads, "eps": 1e-6,
    }  # fmt: skip


def _adamw_ema(s: ModelShape, m: Maker) -> Inputs:
    n = s.parameters // 4
    param, grad, exp_avg, ema = (m.normal(n, scale=0.02, dtype=torch.float32) for _ in range(4))
    return {
        "param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": grad * grad, "emas": (ema,),
        "bf16_out": torch.empty_like(param, dtype=torch.bfloat16), "step": 10, "ema_decays": (0.999,),
        "lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0,
    }  # fmt: skip


def _table(*operators: Operator) -> dict[str, Operator]:
    return {operator.name: operator for operator in operators}


OPERATORS = _table(
    Operator(
        "patch_projection",
        _patch_projection,
        "noised_patch_projection_reference",
        "noised_patch_projection",
        constant=("image", "numbers", "t"),
    ),
    Operator("norm_modulate", _token_stream, "norm_modulate_reference"),
    Operator("qk_norm_rope", _qk_norm_rope, "qk_norm_rope_reference", constant=("cos", "sin")),
    Operator("swiglu", _swiglu, "swiglu_reference"),
    Operator("swiglu_linear", _swiglu_linear, lambda packed, weight: F.linear(swiglu_reference(packed), weight)),
    Operator("attention", _attention, "attention_reference"),
    Operator("pixel_modulate", lambda s, m: _pixels(s, m, 2), "pixel_modulate_reference"),
    Operator(
        "pixel_mlp",
        _pixel_mlp,
        "pixel_mlp_reference",
        variants=(("_post", {"post": True}), ("_tanh", {"gelu": "tanh"})),
    ),
    Operator("pixel_attention", _pixel_attention, "pixel_attention_reference", constant=("cos", "sin")),
    Operator("flow_loss", _flow_loss, "flow_loss_reference", constant=("target_NP3", "weight_B")),
    Operator("adamw_ema", _adamw_ema, "reference", constant=("grad",), in_place=True),
)
