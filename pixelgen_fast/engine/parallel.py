"""What wraps a model from outside, in the one order that works: recomputation, compilation, then ZeRO (zero.py).

Both act on each block in place, so no name in a state dict changes. Recomputation trades memory for time in backward:

    none        keep what the operators need
    operators   keep matrix products and attention, compute everything between them again; of the products, those whose
                output is over six times as wide as their input (the pixel modulation) are computed again too
    blocks      keep what goes in and out of a block, compute the whole block again
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pixelgen_fast.settings import Recompute

_PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2)}
_ATTENTION = ("pixelgen::attention", "pixelgen_native::attention", "aten::_scaled_dot_product")
_WIDE = 6


def wrap_blocks(blocks: list[nn.Module], *, recompute: Recompute, compile_blocks: bool) -> None:
    """Recompute parts of each block in backward instead of keeping them, and compile each block without breaks."""
    for block in blocks:
        if recompute == "blocks":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if recompute == "operators":
            contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
        if compile_blocks:
            block.compile(fullgraph=True)


def _keep_products(context: Any, op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name().split(".")[0]
    if name in _PRODUCTS:
        left, right = (args[i] for i in _PRODUCTS[name])
        wide = right.shape[1] > _WIDE * left.shape[1]
        return CheckpointPolicy.PREFER_RECOMPUTE if wide else CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.MUST_SAVE if name.startswith(_ATTENTION) else CheckpointPolicy.PREFER_RECOMPUTE
