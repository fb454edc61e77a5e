"""The discriminator's spectral norm, token norm and backbone; its other numbers are those of golden/rae_disc.npz."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from support.golden import relative
from support.teachers import write_teacher
from torch import nn

from pixelgen_fast.rae.discriminator import (
    Backbone,
    Discriminator,
    SpectralConv,
    TokenNorm,
    adaptive_weight,
    load_discriminator,
    quantised,
)

V3 = "vit_small_patch16_dinov3"


def test_counts_of_the_published_discriminator() -> None:
    with torch.device("meta"):
        network = timm.create_model("vit_small_patch8_224.dino", num_classes=0)
        discriminator = Discriminator(Backbone(network))
    assert discriminator._backbone[0].taps == (2, 5, 8, 11)
    assert sum(p.numel() for p in discriminator.parameters()) == 7_386_245
    assert sum(p.numel() for p in network.parameters()) == 21_670_272


def test_renewed_often_the_spectral_norm_is_the_largest_singular_value() -> None:
    torch.manual_seed(0)
    conv = SpectralConv(6, 4, size=3)
    for _ in range(200):
        conv.renew()
    x = torch.randn(2, 6, 5)
    sigma = torch.linalg.svdvals(conv.weight.flatten(1))[0]
    padded = torch.cat([x[..., -1:], x, x[..., :1]], dim=-1)
    expected = nn.functional.conv1d(padded, conv.weight / sigma, conv.bias)
    assert relative(conv(x), expected) < 1e-5


def test_one_renewal_is_that_of_torch() -> None:
    """torch's own hook takes a step of the power iteration in each forward pass of training, and none in evaluation."""
    torch.manual_seed(0)
    conv, reference = SpectralConv(6, 4), nn.utils.spectral_norm(nn.Conv1d(6, 4, 1))
    with torch.no_grad():
        reference.weight_orig.copy_(conv.weight)
        reference.bias.copy_(conv.bias)
        reference.weight_u.copy_(conv.u)
        reference.weight_v.copy_(conv.v)
    x = torch.randn(2, 6, 5)
    conv.renew()
    assert torch.allclose(conv(x), reference(x), atol=1e-6)
    assert torch.allclose(conv(x), reference.eval()(x), atol=1e-6)


def test_a_token_norm_knows_no_other_image() -> None:
    norm, x = TokenNorm(3), torch.randn(4, 3, 7) * 5 + 2
    out = norm(x)
    assert torch.allclose(out.mean(dim=2), torch.zeros(4, 3), atol=1e-6)
    assert torch.allclose(out.var(dim=2, unbiased=False), torch.ones(4, 3), atol=1e-4)
    assert torch.equal(norm(x[1:2]), out[1:2])


def test_any_dino_is_a_backbone_and_stays_out_of_the_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    discriminator = load_discriminator(V3, str(write_teacher(tmp_path / "t", V3)))
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    logits = discriminator(x * 2 - 1)
    logits.mean().backward()
    assert logits.shape == (2, 3 * 16) and float(x.grad.abs().sum()) > 0
    assert all(name.startswith("heads.") for name in discriminator.state_dict())
    assert discriminator.double()._backbone[0].network.cls_token.dtype == torch.float64


def test_the_published_network_is_read_by_its_names(tmp_path: Path) -> None:
    """DINO's ViT-S/8: keys without a bias, the tanh form of GELU, whatever the file says."""
    network = timm.create_model("vit_small_patch8_224.dino", num_classes=0)
    for block in network.blocks:
        nn.init.ones_(block.attn.qkv.bias)
    torch.save(network.state_dict(), tmp_path / "dino_vit_small_patch8_224.pth")
    backbone = load_discriminator(
        "vit_small_patch8_224.dino", str(tmp_path / "dino_vit_small_patch8_224.pth")
    )._backbone[0]
    for block in backbone.network.blocks:
        assert [float(third.abs().max()) for third in block.attn.qkv.bias.chunk(3)] == [1.0, 0.0, 1.0]
        assert block.mlp.act.approximate == "tanh"
    assert torch.equal(backbone.network.blocks[3].mlp.fc1.weight, network.blocks[3].mlp.fc1.weight)


def test_quantised_images_have_256_levels() -> None:
    x = torch.linspace(-1.5, 1.5, 1001)
    levels = (quantised(x) + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert float(levels.min()) == 0 and float(levels.max()) == 255 and len(levels.round().unique()) == 256


def test_the_adaptive_weight_is_bounded() -> None:
    assert float(adaptive_weight(torch.tensor(2.0), torch.tensor(0.5))) == torch.tensor(2.0 / (0.5 + 1e-6))
    assert float(adaptive_weight(torch.tensor(2.0), torch.tensor(0.0))) == 1e4
