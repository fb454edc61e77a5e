"""A model under the names of a published checkpoint, and what the systems need to describe such names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pixelgen_fast.errors import InputError
from pixelgen_fast.weights import misfits

State = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


class PublicLayout(nn.Module):
    """A model whose parameters keep the names and shapes of a published checkpoint.

    forward takes what the model takes, a flow (x, t, y) in the public convention, and gradients arrive under the public
    names; the computation is the native model's, on tensors packed on the fly. `native_state()`: the packed weights.
    fixed: names in the state that are tables of the model's. frozen: those of its weights that are not trained.
    call: as PublicForm has it.
    """

    def __init__(
        self,
        native: nn.Module,
        state: State,
        to_native: Callable[[State], dict[str, Tensor]],
        fixed: Iterable[str] = (),
        frozen: Iterable[str] = (),
        call: Callable[..., Any] = lambda net, *inputs: net(*inputs),
    ) -> None:
        super().__init__()
        self._native = [native]  # in a list, so that its own parameters are not registered a second time
        self._to_native, self._call = to_native, call
        self._tables = {*fixed, *frozen}
        self._names = [name for name in state if name not in frozenset(fixed)]
        for name, value in state.items():
            self._register(name, value.detach().clone())

    def _register(self, name: str, value: Tensor) -> None:
        *path, leaf = name.split(".")
        module: nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        if name in self._tables:
            module.register_buffer(leaf, value)
        else:
            module.register_parameter(leaf, nn.Parameter(value))

    def native_state(self) -> dict[str, Tensor]:
        weights = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return self._to_native({name: weights[name] for name in self._names})

    def forward(self, *inputs: Any) -> Any:
        state = self.native_state()
        return self._call(lambda *z, **options: functional_call(self._native[0], state, z, options), *inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._native[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> nn.Module:
        self._native[0].train(mode)
        return super().train(mode)


def check_state(state: State, wanted: Mapping[str, tuple[int, ...]], fixed: State | None = None) -> None:
    """Raise ValueError naming every missing, extra and misshapen weight, and every table that is not as computed."""
    problems = misfits(state, wanted)
    problems += [
        f"{name} is not the table that the model computes"
        for name, table in (fixed or {}).items()
        # half a bf16 digit, for files whose tables were rounded with their weights
        if name in state
        and state[name].shape == table.shape
        and not torch.allclose(state[name].float(), table, 0, 4e-3)
    ]
    if problems:
        shown = "; ".join(problems[:20]) + ("" if len(problems) <= 20 else f"; and {len(problems) - 20} more")
        raise InputError(f"{len(problems)} weights do not fit the model: {shown}")


def add_linear(shapes: Shapes, name: str, rows: int, columns: int, bias: bool = True) -> None:
    """Enter the weight, and the bias, of a linear layer."""
    shapes[f"{name}.weight"] = (rows, columns)
    if bias:
        shapes[f"{name}.bias"] = (rows,)


def add_norm(shapes: Shapes, name: str, dim: int) -> None:
    """Enter the weight and the bias of a LayerNorm."""
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (dim,)


def add_vit_block(shapes: Shapes, name: str, dim: int) -> None:
    """Enter a block of timm's ViT whose MLP is four times as wide."""
    add_norm(shapes, f"{name}.norm1", dim)
    add_linear(shapes, f"{name}.attn.qkv", 3 * dim, dim)
    add_linear(shapes, f"{name}.attn.proj", dim, dim)
    add_norm(shapes, f"{name}.norm2", dim)
    add_linear(shapes, f"{name}.mlp.fc1", 4 * dim, dim)
    add_linear(shapes, f"{name}.mlp.fc2", dim, 4 * dim)


def depth(state: Iterable[str], prefix: str) -> int:
    """How many numbered modules stand under a prefix such as "blocks."."""
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))


def require(state: State, system: str, names: Iterable[str]) -> None:
    """Raise ValueError when the weights that tell a model's size are not there."""
    if missing := [name for name in names if name not in state]:
        raise InputError(f"not a {system} state dict: missing {', '.join(missing)}")


def arguments(
    config: Mapping[str, Any], *, fixed: Mapping[str, Any], required: Iterable[str], optional: Iterable[str]
) -> dict[str, Any]:
    """The constructor arguments in a public configuration, without "system" and those whose value is `fixed`.

    Raises ValueError naming a missing or unknown key, or a fixed one with another value.
    """
    found = {key: value for key, value in config.items() if key != "system"}
    for key, value in fixed.items():
        if found.pop(key, value) != value:
            raise InputError(f"config: {key} must be {value}, the published models know no other")
    if missing := [key for key in required if key not in found]:
        raise InputError(f"config: missing {', '.join(missing)}")
    known = {*required, *optional}
    if extra := [key for key in found if key not in known]:
        raise InputError(f"config: unknown {', '.join(extra)}; valid: {', '.join(sorted(known | set(fixed)))}")
    return found
