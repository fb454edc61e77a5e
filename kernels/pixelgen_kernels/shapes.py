"""Named sizes: of real models, and ragged ones. Tests, benchmarks, the report and tuning read this list.

Shape legend: B images, L patches, P pixels per patch, D width, H heads, d head size, F hidden width, C pixel channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# The cases of the registry that a step of a system starts: an operator, or an operator and the suffix of a variant.
TRANSFORMER = ("random_words", "norm_modulate", "norm_modulate_first", "qk_norm_rope", "swiglu", "adamw_ema")
PIXELDIT = (*TRANSFORMER, "noised_patch_projection", "pixel_modulate", "pixel_mlp", "flow_loss")
PIXELDIT_OPTIONS = ("pixel_modulate_plain", "pixel_mlp_post", "pixel_mlp_tanh", "pixel_mlp_post_tanh")
JIT = (*TRANSFORMER, "norm_modulate_last")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model and its batch that kernels depend on.

    ffn: hidden width of the feed-forward layer, rounded up to a multiple of 16. cases: what a step of it starts, of the
    registry.
    """

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
    cases: tuple[str, ...] = (*PIXELDIT, *PIXELDIT_OPTIONS)

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

    def with_batch(self, batch: int) -> ModelShape:
        return replace(self, batch=batch)


B = ModelShape("B", width=768, heads=12, ffn=2048, depth=12, pixel_depth=2, parameters=184_749_155)
L = ModelShape("L", width=1024, heads=16, ffn=2736, depth=22, pixel_depth=4, parameters=569_648_963)
XL = ModelShape("XL", width=1152, heads=16, ffn=3072, depth=26, pixel_depth=4, parameters=797_383_203)
# from block 10 on there are 32 tokens more
JIT_H = ModelShape(
    "JiT-H", width=1280, heads=16, ffn=3424, depth=32, pixel_depth=0, parameters=952_514_368, tokens=288, cases=JIT
)
MODELS = {shape.name: shape for shape in (B, L, XL, JIT_H)}


def _ragged(
    name: str, batch: int, tokens: int, width: int, heads: int, ffn: int, patch: int, pixels: int, channels: int,
    hidden: int,
) -> ModelShape:  # fmt: skip
    return ModelShape(
        name, width, heads, ffn, depth=1, pixel_depth=1, parameters=4 * (257 + width), batch=batch, tokens=tokens,
        pixels=pixels, channels=channels, pixel_hidden=hidden, patch=patch,
    )  # fmt: skip


# What real models never are and kernels must bear: a single row, sizes that are no power of two and no multiple of 16,
# heads of two features, rows of one block exactly and of one more, more images than one step of a reduction, more rows,
# tokens and pixels than a chunk, blocks that end inside a patch, and nothing at all. Pixels need not be patch^2 here.
RAGGED = {
    shape.name: shape
    for shape in (
        _ragged("one", 1, tokens=1, width=8, heads=1, ffn=1, patch=4, pixels=1, channels=16, hidden=16),
        _ragged("odd", 3, tokens=9, width=66, heads=3, ffn=341, patch=4, pixels=9, channels=24, hidden=40),
        _ragged("wide", 1, tokens=4, width=1152, heads=16, ffn=1025, patch=16, pixels=16, channels=32, hidden=48),
        _ragged("many", 65, tokens=1, width=8, heads=4, ffn=8, patch=4, pixels=16, channels=8, hidden=32),
        _ragged("long", 2, tokens=36, width=72, heads=9, ffn=1024, patch=8, pixels=32, channels=16, hidden=64),
        _ragged("empty", 0, tokens=4, width=32, heads=2, ffn=24, patch=4, pixels=16, channels=8, hidden=32),
    )
}
