"""What a kernel launch is, as plain data: enough to compile it for a GPU that is not there and to model its time.

An operator file offers  aot(shape: ModelShape, config) -> list[Launch],  one Launch for each kernel that its forward
and its backward start at that shape with that tuning configuration; the report compiles and judges them.

Shape legend: B images, L patches, P pixels per patch, D width, H heads, d head size, F hidden width, C pixel channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model and its batch that kernels depend on. depth and pixel_depth count blocks."""

    name: str
    width: int
    heads: int
    ffn: int
    depth: int
    pixel_depth: int
    parameters: int
    batch: int = 64
    tokens: int = 256
    pixels: int = 256
    channels: int = 16
    pixel_hidden: int = 64
    patch: int = 16

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def rows(self) -> int:
        """Patch tokens of the batch, B L."""
        return self.batch * self.tokens

    @property
    def pixel_rows(self) -> int:
        """Pixels of the batch, B L P."""
        return self.batch * self.tokens * self.pixels

    @property
    def image(self) -> int:
        """Height and width of the image in pixels."""
        return int(self.tokens**0.5) * self.patch


B = ModelShape("B", width=768, heads=12, ffn=2048, depth=12, pixel_depth=2, parameters=184_749_155)
L = ModelShape("L", width=1024, heads=16, ffn=2730, depth=22, pixel_depth=4, parameters=569_648_963)
XL = ModelShape("XL", width=1152, heads=16, ffn=3072, depth=26, pixel_depth=4, parameters=797_383_203)
MODELS = {shape.name: shape for shape in (B, L, XL)}


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    name: unique among the launches of its operator; contains "_fwd" or "_bwd".
    kernel: the triton.jit function.
    signature: Triton type of every argument that is no constexpr: "*bf16", "*fp32", "i32", "i64", "fp32", ...
    constexprs: value of every constexpr argument, and of integer arguments that Triton specialises because they are 1.
    grid: number of programs. flops: 2 x multiply-adds of its matrix products, 0 where it has none.
    bytes_moved: what it must read from and write to HBM, each tensor once.
    rows: pixels or tokens it handles, the unit of "issue slots per row".
    loops: trip count of its loops by nesting depth, outermost first; a kernel without a loop has ().
    divisible: integer arguments that are multiples of 16 at this shape (pointers always are, unless in `unaligned`).
    widest: bits of the widest access that the layout in memory allows to nine tenths of its bytes, which the report's
        gate asks for; below 128 only where rows begin at addresses that are no multiple of 16 bytes (a SwiGLU of 2730
        bf16, a target of three float32 a pixel).
    options: further options of the Triton backend, such as {"maxnreg": 128}.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    grid: int
    flops: int
    bytes_moved: int
    rows: int
    loops: tuple[int, ...] = ()
    divisible: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    widest: int = 128
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def direction(self) -> Literal["forward", "backward"]:
        return "backward" if "_bwd" in self.name else "forward"
