"""How an operator stands in PyTorch, and how its gradient hangs on it.

    @operator("swiglu", fake)                  the launcher becomes the Triton body of pixelgen::swiglu
    def swiglu_forward(packed): ...

    swiglu_forward.gradient(save, backward)    save(ctx, inputs, output), backward(ctx, *gradients), as autograd's

Called from plain eager code, an operator is its launcher, and its gradient a node of autograd around it: PyTorch's
dispatcher and its wrappers around Python operators cost more than a small kernel. Where somebody looks on
(torch.compile, a FLOP counter, meta or fake tensors, function transforms), the registered operator runs instead, with
the same launcher, the same save and the same backward.

One rule for gradients: an operator has `gradient`. Only where a result is more than the operator's outputs (a view of
an input, a product with a library) does a torch.autograd.Function stand around calls of operators that have none.

csrc registers the CPU body and its gradient under the same name when it is loaded. For the interpreter the kernels are
registered under `pixelgen_interpreter::`, so that one process can compare all bodies on the same CPU tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from pixelgen_kernels.bodies import INTERPRETED, Body
from pixelgen_kernels.launch import is_recording

NAMESPACE = "pixelgen_interpreter" if INTERPRETED else "pixelgen"
kernels = getattr(torch.ops, NAMESPACE)
# By name of the operator: for who sees an operator dispatched and asks what it would start.
LAUNCHERS: dict[str, Callable[..., Any]] = {}


class Operator:
    """A launcher and its registered twin. Call it, or where it has a gradient `apply` it, with positional arguments."""

    def __init__(
        self, name: str, launcher: Callable[..., Any], fake: Callable[..., Any], flops: Any, mutates: Sequence[str]
    ) -> None:
        functools.update_wrapper(self, launcher)
        self.name, self.launcher = name, launcher
        LAUNCHERS[name] = launcher
        self.node: type[torch.autograd.Function] | None = None
        schema = torch.library.infer_schema(launcher, mutates_args=mutates)
        self.registered = torch.library.custom_op(
            f"{NAMESPACE}::{name}", self.on_device, mutates_args=mutates, schema=schema
        )
        self.registered.register_fake(fake)
        if NAMESPACE != "pixelgen":
            torch.library.define(f"pixelgen::{name}", schema)
            torch.library.register_fake(f"pixelgen::{name}", fake)
        # in PyTorch's dispatcher the kernels, and for CPU tensors the body that csrc brings
        self.op, self.native = (getattr(space, name).default for space in (kernels, torch.ops.pixelgen))
        if flops is not None:
            register_flop_formula([getattr(space, name) for space in {kernels, torch.ops.pixelgen}])(flops)

    def gradient(self, save: Callable[..., None], backward: Callable[..., Any]) -> None:
        """Give the operator its gradient: for the dispatcher, and as a node of autograd around the launcher."""
        self.registered.register_autograd(backward, setup_context=save)
        if NAMESPACE != "pixelgen":
            torch.library.register_autograd(f"pixelgen::{self.name}", backward, setup_context=save)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self.on_device(*args)
            save(ctx, args, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.node = type(self.name, (torch.autograd.Function,), members)

    def on_device(self, *args: Any) -> Any:
        """The launcher, on the device of its first tensor."""
        like = args[0]
        if not like.is_cuda or like.get_device() == torch.cuda.current_device():
            return self.launcher(*args)
        with torch.cuda.device_of(like):
            return self.launcher(*args)

    def __call__(self, *args: Any, body: Body = "triton") -> Any:
        """Run a compiled body, without a gradient: asking for one, such as a second derivative, is an error."""
        if body == "native":
            return self.native(*args)
        # the dispatcher refuses what would otherwise be left out of the sum without a word
        wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        return self.on_device(*args) if not wanted and eager(args[0]) else self.op(*args)

    def apply(self, *args: Any, body: Body = "triton") -> Any:
        """Run a compiled body, with its gradient."""
        if body == "native":
            return self.native(*args)
        return self.node.apply(*args) if eager(args[0]) else self.op(*args)


def operator(
    name: str, fake: Callable[..., Any], flops: Callable[..., int] | None = None, mutates: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator that registers a launcher as the Triton body of pixelgen::<name>.

    fake: same arguments, returns empty outputs of the same shapes, strides and dtypes. flops: shapes of the tensor
    arguments and the other arguments as they are, keyword out_shape; 2 x multiply-adds of the matrix products.
    mutates: arguments that it changes. The launcher's first argument is a tensor; its kernels start on that tensor's
    device.
    """
    return lambda launcher: Operator(name, launcher, fake, flops, mutates)


def eager(tensor: Tensor) -> bool:
    """Whether nobody looks on: no compilation, dispatch mode, subclass or transform, and a tensor that has memory."""
    if torch.compiler.is_compiling():
        return False
    if is_recording():
        return True
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )
