"""One operator against eager, torch.compile and the libraries that are installed (benchmarks/operators.py)."""

from __future__ import annotations

from collections.abc import Callable

from operators import benchmark, ceiling, dtype_of, parser

from gpu.child import device


def measure(
    row: Callable[..., None], device_free: Callable[[], None], operator: str, model: str, arguments: list[str]
) -> None:
    """arguments: further ones of benchmarks/operators.py."""
    args = parser().parse_args(arguments)
    device_free()
    for found in benchmark(operator, model, args, ceiling(device(), dtype_of(args))):
        named = f"{found['case']} {found['model']} {found['provider']}: "
        row(**found | {word: named + found[word] for word in ("red", "absent") if word in found})
