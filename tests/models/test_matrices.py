"""Which weights of every system Muon trains, and that packed ones are cut where the layers read them apart."""

import re

import pytest
import torch
from support.models import tiny
from torch import nn

from pixelgen_fast import models
from pixelgen_fast.layers import Attention, SwiGLU, ViTBlock, rope_2d
from pixelgen_fast.models.matrices import matrices_of

GATED = {"attn.qkv": 3, "attn.proj": 1, "mlp.w13": 2, "mlp.w2": 1}
PLAIN = {"qkv": 3, "proj": 1, "fc1": 1, "fc2": 1}
PIXEL = {"compress": 1, "attn.qkv": 3, "attn.proj": 1, "expand": 1, "fc1": 1, "fc2": 1}
MLP = {"mlp.0": 1, "mlp.2": 1}
# {blocks: {weight: matrices stacked in it}}
EXPECTED = {
    "alitok": {"transformer.blocks": GATED},
    "deco": {"patch_blocks": GATED, "decoder_blocks": {"fc1": 1, "fc2": 1}},
    "dino_student": {"patch_blocks": GATED, "pixel_blocks": PIXEL},
    "ditdh": {"encoder_blocks": GATED, "head.blocks": GATED},
    "fractal": {"levels.0.blocks": PLAIN}
    | {"levels.1.blocks": PLAIN, "levels.1.guide.blocks": PLAIN, "pixels.blocks": PLAIN},
    "jit": {"transformer": GATED},
    "mar": {"trunk.encoder_blocks": PLAIN, "trunk.decoder_blocks": PLAIN, "head.layers": MLP},
    "patch_ar": {"trunk.layers": GATED, "head.layers": MLP},
    "pixeldit": {"patch_blocks": GATED, "pixel_blocks": PIXEL},
    "pixeldit2": {"patch_blocks": GATED, "grounding.block": GATED},
    "raev2": {"encoder_blocks": GATED, "head.blocks": GATED | {"modulation": 1}},
}
# what RAEv2 has beside its blocks: published, all parameters of two dimensions
ALL_OF_RAEV2 = [
    "enter", "t_embed.mlp.0", "t_embed.mlp.2", "y_embed", "base.modulation", "base.linear", "head.enter",
    "head.condition", "head.out.modulation", "head.out.linear",
]  # fmt: skip


def test_every_system_is_listed():
    assert set(EXPECTED) == set(models.systems())


@pytest.mark.parametrize("system", EXPECTED)
def test_the_matrices_of_a_system(system):
    with torch.device("meta"):
        model = tiny(system, randomise=False)
    matrices = model.matrices()
    found = {name.removesuffix(".weight"): matrices[p] for name, p in model.named_parameters() if p in matrices}
    if system == "raev2":
        assert all(found.pop(name) == 1 for name in ALL_OF_RAEV2)
    in_blocks = {}
    for name, count in found.items():
        (blocks,) = [blocks for blocks in EXPECTED[system] if re.match(rf"{re.escape(blocks)}\.(?=\d|attn|mlp)", name)]
        weight = re.sub(r"^\d+\.", "", name.removeprefix(f"{blocks}."))
        in_blocks.setdefault(blocks, {})[weight] = count
    assert in_blocks == EXPECTED[system]
    assert all(p.ndim == 2 and p.shape[0] % count == 0 for p, count in matrices.items())


def test_frozen_weights_are_none():
    layer = SwiGLU(4, 6)
    layer.w2.requires_grad_(False)
    assert matrices_of([layer]) == {layer.w13.weight: 2}


def test_only_linear_layers_have_matrices():
    layers = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Embedding(2, 2), nn.Conv2d(3, 2, 2))
    assert matrices_of([layers]) == {layers[0].weight: 1}


@torch.no_grad()
def test_packed_weights_are_cut_where_they_are_read_apart():
    """Values are the last third of qkv, and W3, which the output is linear in, the last half of w13."""
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    attention, block, gated = Attention(8, 2), ViTBlock(8, 2, 16, 1e-6), SwiGLU(8, 12)
    attention.proj.bias.zero_()
    for layer, result in (
        (attention.qkv, lambda: attention(x, *rope_2d(2, 2, 4))),
        (block.qkv, lambda: block.attend(torch.nn.functional.linear(x, block.qkv.weight), None)),
        (gated.w13, lambda: gated(x)),
    ):
        parent = next(m for m in (attention, block, gated) if layer in m.children())
        before, parts = result(), layer.weight.chunk(matrices_of([parent])[layer.weight])
        parts[-1].mul_(2.0)
        assert torch.allclose(result(), 2 * before, atol=1e-6)
        parts[0].mul_(2.0)
        assert not torch.allclose(result(), 4 * before, atol=1e-6)
