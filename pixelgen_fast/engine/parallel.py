"""What wraps a model from outside, in the one order that works: checkpointing, compilation, then ZeRO (zero.py).

Both act on each block in place, so no name in a state dict changes.
"""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint


def wrap_blocks(blocks: list[nn.Module], *, checkpoint_blocks: bool, compile_blocks: bool) -> None:
    """Recompute each block in backward instead of keeping its activations, and compile each block without breaks."""
    for block in blocks:
        if checkpoint_blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compile_blocks:
            block.compile(fullgraph=True)
