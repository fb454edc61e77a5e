"""Whether the tensors of a file are the weights of a network: by name and by shape."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor


def misfits(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor | tuple[int, ...]], optional: Collection[str] = ()
) -> list[str]:
    """A line for each weight that is missing, extra or of another shape; empty where all fit.

    wanted: tensors or their shapes, by name. optional: names among them that may be absent.
    """
    shapes = {name: list(value.shape if isinstance(value, Tensor) else value) for name, value in wanted.items()}
    wrong = [f"missing {name} {s}" for name, s in shapes.items() if name not in state and name not in optional]
    wrong += [f"extra {name} {list(value.shape)}" for name, value in state.items() if name not in shapes]
    wrong += [
        f"{name} is {list(state[name].shape)}, wanted {s}"
        for name, s in shapes.items()
        if name in state and list(state[name].shape) != s
    ]
    return wrong
