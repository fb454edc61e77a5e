"""Products of a few rows that give each row the bits that it has among many."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ROWS = 4


def as_among_many(images: int, device: torch.device) -> AbstractContextManager[object]:
    """FewRows where so many images are so few on a device that it matters; else nothing."""
    return FewRows() if images < ROWS and device.type == "cpu" else nullcontext()


class FewRows(TorchFunctionMode):
    """While it is entered, a linear layer of fewer than ROWS rows on a CPU is one of ROWS.

    MKL takes another kernel for fewer, which sums a row's products in another order. The conditioning of an image is
    one row; without this a level of one of its pixels could depend on how many images are drawn beside it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and args[0].device.type == "cpu" and (rows := args[0].shape[:-1].numel()) < ROWS:
            x: Tensor = args[0]
            padded = torch.cat([x.reshape(rows, x.shape[-1]), x.new_zeros(ROWS - rows, x.shape[-1])])
            out: Tensor = func(padded, *args[1:], **(kwargs or {}))
            return out[:rows].reshape(*x.shape[:-1], out.shape[-1])
        return func(*args, **(kwargs or {}))
