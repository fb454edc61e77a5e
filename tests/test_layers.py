"""Layers against their formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

from pixelgen_fast.layers import SwiGLU


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
