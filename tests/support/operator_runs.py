"""Operators of the registry run with their gradients: the public function on a device, the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pixelgen_kernels.registry import OPERATORS, Inputs, Maker, differentiable, leaves, outputs, tensors
from pixelgen_kernels.shapes import ModelShape
from torch import Tensor

CASES = {case: operator for operator in OPERATORS.values() for case in operator.cases()}


def inputs(case: str, shape: ModelShape, device: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """The same numbers at every call."""
    operator = CASES[case]
    return operator.inputs(shape, Maker(dtype, device)) | operator.cases()[case].change


def run(case: str, given: Inputs, function: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Outputs and gradients by name; of an operator that works in place, what it changed.

    function: the public one if None. Cotangents are the same numbers at every call, on every device.
    """
    operator = CASES[case]
    wanted, flowing = leaves(operator, given), operator.cases()[case].flowing
    out = outputs((function or operator.function)(**given))
    if operator.in_place:
        return {name: x for name, x in tensors(given).items() if name not in operator.constant}
    found = {f"output {i}": x.detach() for i, x in enumerate(out)}
    out = differentiable(out if flowing is None else [out[i] for i in flowing])
    if out:
        maker = Maker(torch.float32, "cpu", seed=1)
        cotangents = [maker.normal(*x.shape).to(x) for x in out]
        grads = torch.autograd.grad(out, list(wanted.values()), cotangents, allow_unused=True)
        # autograd leaves out what a result does not depend on, a compiled body then computes its zeros
        pairs = zip(wanted.items(), grads, strict=True)
        found |= {f"gradient of {name}": torch.zeros_like(x) if grad is None else grad for (name, x), grad in pairs}
    return found


def exact(case: str, given: Inputs) -> dict[str, Tensor]:
    """What `run` gives for the definition in float64, on a CPU."""
    return run(case, {name: _double(x) for name, x in given.items()}, CASES[case].definition)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        x = value.detach().cpu()
        return x.double() if x.is_floating_point() else x
    if isinstance(value, tuple | list) and any(isinstance(x, Tensor) for x in value):
        parts = map(_double, value)
        return type(value)._make(parts) if hasattr(value, "_make") else type(value)(parts)
    return value


def moved(x: Tensor, device: str) -> Tensor:
    """A tensor with the strides and the type of x on a device, of any values; `to` makes some contiguous."""
    there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return there.requires_grad_(x.requires_grad)
