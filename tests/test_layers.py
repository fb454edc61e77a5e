"""Layers against their formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

from pixelgen_fast.layers import Attention, Float32Tables, FourierEmbedder, SwiGLU, rope_2d_axial


@pytest.mark.parametrize("hidden", [16, 21])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("body", ["reference", "triton"])
def test_columns_of_zeros_change_no_number(hidden: int, bias: bool, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels the hidden width is rounded up to 16 in the products: outputs and all gradients stay."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setenv("PIXELGEN_OPS", body)
    torch.manual_seed(0)
    layer, x = SwiGLU(12, hidden, bias=bias).to(device), torch.randn(2, 5, 12, device=device, requires_grad=True)
    cotangent = torch.randn(2, 5, 12, device=device)
    layer(x).backward(cotangent)

    exact = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    y = x.detach().double().requires_grad_()
    a, b = F.linear(y, exact["w13.weight"], exact.get("w13.bias")).chunk(2, -1)
    out = F.linear(F.silu(a) * b, exact["w2.weight"], exact.get("w2.bias"))
    out.backward(cotangent.double())
    pairs = [(layer(x), out), (x.grad, y.grad), *((p.grad, exact[name].grad) for name, p in layer.named_parameters())]
    for got, wanted in pairs:
        assert got.shape == wanted.shape
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("body", ["reference", "native"])
def test_attention_without_norms_turns_queries_and_keys_as_they_are(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair of features is a complex number, and its turn at a place a product. Float64, every step written out."""
    monkeypatch.setenv("PIXELGEN_OPS", body)
    torch.manual_seed(0)
    layer, x = Attention(16, 2, qkv_bias=True, qk_norm=False), torch.randn(3, 6, 16)
    cos, sin = rope_2d_axial(2, 3, 8)
    qkv = F.linear(x.double(), layer.qkv.weight.double(), layer.qkv.bias.double()).view(3, 6, 3, 2, 8)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    place = torch.arange(6)
    frequencies = 10.0 ** (-4 * torch.arange(2).double() / 2)
    angle = torch.cat([(place // 3)[:, None] * frequencies, (place % 3)[:, None] * frequencies], dim=1)
    turn = torch.polar(torch.ones_like(angle), angle)
    q, k = (torch.view_as_real(torch.view_as_complex(h.reshape(3, 2, 6, 4, 2)) * turn).flatten(-2) for h in (q, k))
    out = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected = F.linear(out, layer.proj.weight.double(), layer.proj.bias.double())
    torch.testing.assert_close(layer(x, cos, sin).double(), expected, rtol=1e-5, atol=1e-6)


def test_fourier_embedding_is_that_of_its_frequencies() -> None:
    torch.manual_seed(0)
    layer, t = FourierEmbedder(8), torch.tensor([0.0, 0.3, 1.0])
    angle = 2 * torch.pi * t.double()[:, None] * layer.frequencies.double()
    h = F.linear(torch.cat([angle.sin(), angle.cos()], 1), layer.mlp[0].weight.double(), layer.mlp[0].bias.double())
    expected = F.linear(F.silu(h), layer.mlp[2].weight.double(), layer.mlp[2].bias.double())
    torch.testing.assert_close(layer(t).double(), expected, rtol=1e-5, atol=1e-6)


def test_float32_tables_may_have_a_buffer_that_is_none() -> None:
    """A network whose positions are learned has no rotary table; it is moved and cast all the same."""

    class Tables(Float32Tables):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rope", None, persistent=False)
            self.register_buffer("table", torch.ones(2), persistent=False)

    module = Tables().bfloat16()
    assert module.rope is None and module.table.dtype == torch.float32
