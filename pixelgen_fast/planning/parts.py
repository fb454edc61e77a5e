"""Which part of a model an operation belongs to, in forward by the modules that are running, in backward by autograd.

    a module of the training step    ->  engine/parts.py says it   blocks alike count together
    no module of the training step   ->  frozen networks           a teacher or an encoder, which is nobody's child

Every node that autograd makes has a number, and numbers rise. Where the running module changes in forward, the number
of the next node is written down; a node in backward is of the module in which its number was given. A frozen layer
inside of a trained network counts with that network.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from pixelgen_fast.engine.parts import LOSS, part_of_objective
from pixelgen_fast.planning.trace import Phase
from pixelgen_fast.runs.folder import MODEL

FROZEN = "frozen networks"


class Parts:
    """Knows the part that is running. module: the training objective. Inside `watching()` its modules are followed."""

    def __init__(self, module: nn.Module) -> None:
        self.paths = {id(child): path for path, child in module.named_modules()}
        parents = [module, *(child for name, child in module.named_children() if name == MODEL)]
        self.frozen = {id(child) for parent in parents for child in parent.children() if _is_frozen(child)}
        self.inside = sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)
        self.outside: dict[int, int] = {}
        self.stack: list[str] = []
        self.begins, self.names = [0], [LOSS]

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def now(self) -> tuple[str, Phase]:
        """The part of what is dispatched now, and in which phase of a step it is."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._running(), "forward"
        if self.stack:
            return self._running(), "recompute"
        number = node._sequence_nr()
        # the node that adds up a weight's gradients has no number of its own
        place = bisect_right(self.begins, number) - 1 if number < 2**62 else 0
        return self.names[max(place, 0)], "backward"

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the weights that are not trained, of modules of the step and of those that it was seen to call."""
        return self.inside + sum(self.outside.values())

    def _running(self) -> str:
        return self.stack[-1] if self.stack else LOSS

    def _enter(self, module: nn.Module, args: Any) -> None:
        inside = self._running()
        path = self.paths.get(id(module))
        if path is None:
            self.outside |= {id(p): p.numel() * p.element_size() for p in module.parameters(recurse=False)}
        if inside == FROZEN or path is None or id(module) in self.frozen:
            self.stack.append(FROZEN)
        else:
            self.stack.append(part_of_objective(path))
        self._note()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()
        self._note()

    def _note(self) -> None:
        if torch._C._current_autograd_node() is None and self.names[-1] != self._running():
            self.begins.append(torch.autograd._get_sequence_nr())
            self.names.append(self._running())


def _is_frozen(module: nn.Module) -> bool:
    """Whether it has weights and trains none."""
    weights = list(module.parameters())
    return bool(weights) and not any(p.requires_grad for p in weights)
