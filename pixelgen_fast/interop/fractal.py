"""FractalGen's published weights: a dictionary whose `model` has a level inside a level, next_fractal. for each.

The row of no class is a tensor of its own there. Packed here: that row with those of the classes, red, green and blue
of a network of colors, w1 | w3 of a feed-forward layer. The public code is under the MIT licence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pixelgen_fast.errors import InputError
from pixelgen_fast.interop.form import PublicForm
from pixelgen_fast.interop.layout import (
    Shapes,
    State,
    add_linear,
    add_norm,
    add_vit_block,
    arguments,
    depth,
    require,
)
from pixelgen_fast.layers import swiglu_width
from pixelgen_fast.models.fractal import Level, Settings
from pixelgen_fast.models.fractal_levels import GUIDE_DEPTH, GUIDE_WIDTH, NEIGHBOURS
from pixelgen_fast.models.fractal_pixel import VALUES
from pixelgen_fast.weights import rename

PREFIXES = {"raw": ""}
INSIDE = "next_fractal."
# heads by width, where the published sizes agree; shapes do not tell them
HEADS = {
    (1024, 512, 128): (16, 8, 4),
    (768, 384, 192, 64): (12, 6, 3, 4),
    (1024, 512, 256, 64): (16, 8, 4, 4),
    (1280, 640, 320, 64): (16, 8, 4, 4),
}
# guidance and temperature of the published samples, by generator and widths
SAMPLING = {
    ("causal", (1024, 512, 128)): (11.0, 1.03),
    ("masked", (1024, 512, 128)): (6.5, 1.02),
    ("masked", (768, 384, 192, 64)): (29.0, 1.1),
    ("masked", (1024, 512, 256, 64)): (21.0, 1.1),
    ("masked", (1280, 640, 320, 64)): (19.0, 1.1),
}


def read(content: Any, prefixes: Mapping[str, str]) -> dict[str, State]:
    """Raises ValueError when the file has no dictionary `model`."""
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise InputError("a FractalGen checkpoint has a dictionary 'model', this file has none")
    return {"raw": state}


def config(mapping: Mapping[str, Any]) -> tuple[Settings, int, int]:
    """Translate the public constructor's arguments. Returns (model config, image size, number of classes).

    Keys: img_size_list, embed_dim_list, num_blocks_list, num_heads_list, generator_type_list (the last level is that of
    colors), class_num (1000), guiding_pixel (False), num_conds (5, or 1 with "ar"), r_weight (1); dropout,
    rounding_noise (0.01); label_drop, mode and masked change no weight.
    """
    lists = ("img_size_list", "embed_dim_list", "num_blocks_list", "num_heads_list", "generator_type_list")
    found = arguments(mapping, fixed={}, required=lists, optional=(
        "class_num", "guiding_pixel", "num_conds", "r_weight", "dropout", "rounding_noise", "label_drop", "mode",
        "masked",
    ))  # fmt: skip
    sides, widths, blocks, heads, kinds = (found[name] for name in lists)
    kind, conditions = kinds[0], {"mar": NEIGHBOURS, "ar": 1}
    if any(other != kind for other in kinds[:-1]) or found.get("num_conds", conditions[kind]) != conditions[kind]:
        raise InputError(f"config: generators {kinds} with num_conds {found.get('num_conds')}; one kind is known, mar "
                         f"with {NEIGHBOURS} conditions or ar with 1")  # fmt: skip
    shapes = list(zip(sides[1:], widths, heads, blocks, strict=False))
    settings = Settings(
        **dict(zip(("patch_size", "hidden_size", "num_heads", "depth"), shapes[0], strict=True)),
        generator="masked" if kind == "mar" else "causal",
        inner=[Level(*shape) for shape in shapes[1:]],
        pixel_hidden_size=widths[-1],
        pixel_num_heads=heads[-1],
        pixel_depth=blocks[-1],
        guiding_pixel=bool(found.get("guiding_pixel", False)),
        dropout=found.get("dropout", 0.1),
        rounding_noise=found.get("rounding_noise", 0.01),
        red_weight=found.get("r_weight", 1.0),
    )
    return settings, sides[0], found.get("class_num", 1000)


def public_shapes(c: Settings, image_size: int, num_classes: int) -> Shapes:
    """Names and shapes of a published FractalGen, in the order of its state dict."""
    shapes: Shapes = {"fake_latent": (1, c.hidden_size), "class_emb.weight": (num_classes, c.hidden_size)}
    side, above, prefix = image_size, c.hidden_size, ""
    for number, level in enumerate(levels(c)):
        guided, name = c.guiding_pixel and number > 0, f"{prefix}generator"
        D, p = level.hidden_size, level.patch_size
        if c.generator == "masked":
            shapes[f"{name}.mask_token"] = (1, 1, D)
        shapes[f"{name}.pos_embed_learned"] = (1, _front(c, number) + (side // p) ** 2, D)
        add_linear(shapes, f"{name}.patch_emb", D, 3 * p * p)
        add_norm(shapes, f"{name}.patch_emb_ln", D)
        add_linear(shapes, f"{name}.cond_emb", D, above)
        if guided:
            add_linear(shapes, f"{name}.pix_proj", D, 3)
        for i in range(level.depth):
            (add_vit_block if c.generator == "masked" else _add_causal_block)(shapes, f"{name}.blocks.{i}", D)
        add_norm(shapes, f"{name}.norm", D)
        if guided:
            _add_colors(shapes, f"{name}.guiding_pixel_loss.", above, GUIDE_WIDTH, GUIDE_DEPTH)
        side, above, prefix = p, D, prefix + INSIDE
    _add_colors(shapes, prefix, above, c.pixel_hidden_size, c.pixel_depth)
    return shapes


def levels(c: Settings) -> list[Level]:
    """All levels, the first as the others."""
    return [Level(c.patch_size, c.hidden_size, c.num_heads, c.depth), *c.inner]


def _add_causal_block(shapes: Shapes, name: str, D: int) -> None:
    F = swiglu_width(D, 256)
    add_linear(shapes, f"{name}.attention.wqkv", 3 * D, D, bias=False)
    add_linear(shapes, f"{name}.attention.wo", D, D, bias=False)
    add_linear(shapes, f"{name}.feed_forward.w1", F, D, bias=False)
    add_linear(shapes, f"{name}.feed_forward.w3", F, D, bias=False)
    add_linear(shapes, f"{name}.feed_forward.w2", D, F, bias=False)
    shapes[f"{name}.attention_norm.weight"] = shapes[f"{name}.ffn_norm.weight"] = (D,)


def _add_colors(shapes: Shapes, prefix: str, above: int, W: int, blocks: int) -> None:
    add_linear(shapes, f"{prefix}cond_proj", W, above)
    for color in "rgb":
        shapes[f"{prefix}{color}_codebook.weight"] = (VALUES, W)
    add_norm(shapes, f"{prefix}ln", W)
    for i in range(blocks):
        add_vit_block(shapes, f"{prefix}blocks.{i}", W)
    add_norm(shapes, f"{prefix}norm", W)
    for color in "rgb":
        shapes[f"{prefix}{color}_mlm.bias"] = (1, VALUES)


_NAMES = [
    (r"generator\.guiding_pixel_loss\.", "guide."),
    (r"generator\.", ""),
    (r"pos_embed_learned", "position"),
    (r"patch_emb_ln\.|(?<![a-z_])ln\.", "embed_norm."),
    (r"patch_emb\.", "patch_embed."),
    (r"(cond_emb|cond_proj)\.", "cond_embed."),
    (r"pix_proj\.", "guide_embed."),
    (r"\.mlp\.(fc[12])\.", r".\1."),
    (r"\.attn\.", "."),
    (r"\.attention\.wqkv\.", ".attn.qkv."),
    (r"\.attention\.wo\.", ".attn.proj."),
    (r"\.feed_forward\.w[13]\.", ".mlp.w13."),
    (r"\.feed_forward\.w2\.", ".mlp.w2."),
    (r"\.attention_norm\.", ".norm1."),
    (r"\.ffn_norm\.", ".norm2."),
    (r"[rgb]_codebook\.weight", "codes"),
    (r"[rgb]_mlm\.bias", "bias"),
]
# the order in which public weights lie in the one that packs them
_ORDER = ("class_emb", "fake_latent", "r_", "g_", "b_", "w1", "w3")


def _packed(names: Iterable[str], config: Settings) -> dict[str, list[str]]:
    """The public names of each native one, as they lie in it."""
    found: dict[str, list[str]] = {}
    for name in names:
        number, plain = name.count(INSIDE), name.replace(INSIDE, "")
        level = "pixels." if number > len(config.inner) else f"levels.{number}."
        shared = plain in ("class_emb.weight", "fake_latent")
        found.setdefault("y_embed.weight" if shared else level + rename(plain, _NAMES), []).append(name)
    for several in found.values():
        several.sort(
            key=lambda name: [i for i, first in enumerate(_ORDER) for part in name.split(".") if part.startswith(first)]
        )
    return found


def to_native(state: State, config: Settings) -> dict[str, Tensor]:
    """Rename and pack the weights of a published FractalGen; differentiable."""
    native = {}
    for name, public in _packed(state, config).items():
        rows = [state[one] for one in public]
        if name.endswith(("position", "mask_token")):
            native[name] = rows[0].flatten(0, -2) if name.endswith("position") else rows[0].flatten()
        elif name.endswith("codes"):
            native[name] = torch.stack(rows)
        else:
            native[name] = torch.cat(rows) if len(rows) > 1 else rows[0]
    return native


def to_public(state: State, config: Settings) -> dict[str, Tensor]:
    """The inverse of `to_native`."""
    length = len(state["levels.0.position"]) - _front(config, 0)
    size, classes = round(length**0.5) * config.patch_size, len(state["y_embed.weight"]) - 1
    shapes = public_shapes(config, size, classes)
    found = {}
    for name, public in _packed(shapes, config).items():
        parts = state[name].flatten().split([math.prod(shapes[one]) for one in public])
        found |= {one: part.view(shapes[one]) for one, part in zip(public, parts, strict=True)}
    return {name: found[name] for name in shapes}


def _front(config: Settings, number: int) -> int:
    """Tokens in front of a level's patches."""
    return 1 if config.generator == "causal" else NEIGHBOURS + (config.guiding_pixel and number > 0)


def config_of(state: State) -> Settings:
    """The size of a published FractalGen, from the shapes of its weights.

    Raises ValueError when keys are missing, or for widths that none of the published sizes has: shapes do not tell how
    many heads there are.
    """
    require(state, "FractalGen", ("class_emb.weight", "fake_latent", "generator.patch_emb.weight"))
    count = max(name.count(INSIDE) for name in state)
    prefixes = [INSIDE * number for number in range(count + 1)]
    require(state, "FractalGen", [f"{prefix}generator.patch_emb.weight" for prefix in prefixes[:-1]])
    require(state, "FractalGen", [f"{prefixes[-1]}r_codebook.weight"])
    patches = [state[f"{prefix}generator.patch_emb.weight"].shape for prefix in prefixes[:-1]]
    widths = (*(shape[0] for shape in patches), state[f"{prefixes[-1]}r_codebook.weight"].shape[1])
    if widths not in HEADS:
        raise InputError(
            f"a FractalGen of widths {widths}: the number of heads is known for {', '.join(map(str, HEADS))}"
        )
    heads, kind = HEADS[widths], "masked" if "generator.mask_token" in state else "causal"
    first, *inner = [
        Level(round((shape[1] / 3) ** 0.5), shape[0], head, depth(state, f"{prefix}generator.blocks."))
        for shape, head, prefix in zip(patches, heads, prefixes, strict=False)
    ]
    return Settings(
        hidden_size=first.hidden_size,
        num_heads=first.num_heads,
        depth=first.depth,
        patch_size=first.patch_size,
        generator=kind,
        inner=inner,
        pixel_hidden_size=widths[-1],
        pixel_num_heads=heads[-1],
        pixel_depth=depth(state, f"{prefixes[-1]}blocks."),
        guiding_pixel=any("guiding_pixel_loss" in name for name in state),
    )


def image_size_of(state: State, config: Settings) -> int:
    length = state["generator.pos_embed_learned"].shape[1] - _front(config, 0)
    return round(length**0.5) * config.patch_size


def sections(config: Settings, image_size: int) -> dict[str, dict[str, Any]]:
    """The published guidance and temperature of the size, 64 passes over the image."""
    widths = (config.hidden_size, *(level.hidden_size for level in config.inner), config.pixel_hidden_size)
    guidance, temperature = SAMPLING[config.generator, widths]
    return {"sample": {"guidance": guidance, "temperature": temperature, "passes": 64}}


FORM = PublicForm(
    PREFIXES,
    config,
    public_shapes,
    to_native,
    config_of,
    read=read,
    image_size_of=image_size_of,
    class_table="class_emb.weight",
    no_class=lambda state: 0,
    to_public=to_public,
    sections=sections,
)
