"""Attention: SDPA against float64, and the choice among libraries, played by stand-ins in plain PyTorch on a CPU."""

import sys
import types
import warnings

import pytest
import torch
from pixelgen_kernels import attention as public
from pixelgen_kernels.registration import kernels
from torch.utils.flop_counter import FlopCounterMode

module = sys.modules["pixelgen_kernels.attention"]


def inputs(B=2, L=5, H=3, d=8, device="cpu", dtype=torch.float32):
    """q and k as an operator gives them, v as a slice of a packed projection."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(B, L, H, d, device=device).to(dtype) for name in "qk"}
    tensors["v"] = torch.randn(B, L, 3, H, d, device=device).to(dtype)[:, :, 2]
    return tensors, torch.randn(B, L, H, d, device=device).to(dtype)


def softmax_attention(q, k, v):
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v), scores.logsumexp(-1)


def softmax_attention_backward(dout, q, k, v, out, lse):
    """As flash attention does it: probabilities from lse, the row sums of dout * out instead of a second softmax."""
    scale = q.shape[-1] ** -0.5
    p = torch.exp(torch.einsum("blhd,bmhd->bhlm", q, k) * scale - lse[..., : q.shape[1], None])
    dp = torch.einsum("blhd,bmhd->bhlm", dout, v)
    ds = scale * p * (dp - (dout * out).sum(-1).transpose(1, 2)[..., None])
    return (
        torch.einsum("bhlm,bmhd->blhd", ds, k),
        torch.einsum("bhlm,blhd->bmhd", ds, q),
        torch.einsum("bhlm,blhd->bmhd", p, dout),
    )


def write(outputs, results):
    for output, result in zip(outputs, results, strict=True):
        output.copy_(result)


# The four libraries' functions with the argument order of their releases.
def flash_4_modules():
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, *, return_lse=False):
        return softmax_attention(q, k, v)

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False):
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        return softmax_attention_backward(dout, q, k, v, out, lse)

    return {
        "flash_attn": {"__path__": []},
        "flash_attn.cute": {"__path__": [], "flash_attn_func": flash_attn_func},
        "flash_attn.cute.interface": {"_flash_attn_bwd": _flash_attn_bwd},
    }


def flash_3_modules():
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
        return softmax_attention(q, k, v)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, is_causal=False, deterministic=False,
    ):  # fmt: skip
        assert (softmax_scale, is_causal, max_seqlen_k) == (q.shape[-1] ** -0.5, False, None)
        write((dq, dk, dv), softmax_attention_backward(dout, q, k, v, out, softmax_lse))

    return {"flash_attn_interface": {"flash_attn_func": flash_attn_func, "_flash_attn_backward": _flash_attn_backward}}


def flash_2_modules():
    def flash_attn_func(q, k, v, dropout_p=0.0, return_attn_probs=False):
        return *softmax_attention(q, k, v), None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        options = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
        assert options == (0.0, q.shape[-1] ** -0.5, False, -1, -1, 0.0, None)
        write((dq, dk, dv), softmax_attention_backward(dout, q, k, v, out, softmax_lse))

    functions = {"flash_attn_func": flash_attn_func, "_flash_attn_backward": _flash_attn_backward}
    return {"flash_attn": {"__path__": []}, "flash_attn.flash_attn_interface": functions}


def xformers_modules():
    def forward(query, key, value):
        out, lse = softmax_attention(query, key, value)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))

    def backward(grad, output, lse, query, key, value):
        return softmax_attention_backward(grad, query, key, value, output, lse)

    functions = {
        "memory_efficient_attention_forward_requires_grad": forward,
        "memory_efficient_attention_backward": backward,
    }
    fmha = types.SimpleNamespace(**functions)
    return {"xformers": {"__path__": []}, "xformers.ops": {"fmha": fmha}}


MODULES = {
    "flash-attn 4": flash_4_modules,
    "flash-attn 3": flash_3_modules,
    "flash-attn 2": flash_2_modules,
    "xformers": xformers_modules,
}


class Absent:
    """An import finder for which the libraries are not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flash_attn", "flash_attn_interface", "xformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def install(monkeypatch):
    """install(name, ...): only these libraries are there, and their kernels run on a CPU in float32."""

    def forget():
        module._resolve.cache_clear()
        module._load.cache_clear()

    def run(*names):
        forget()
        for name in [n for n in sys.modules if n.split(".")[0] in ("flash_attn", "flash_attn_interface", "xformers")]:
            monkeypatch.delitem(sys.modules, name)
        for package in names:
            for name, content in MODULES[package]().items():
                stand_in = types.ModuleType(name)
                vars(stand_in).update(content)
                monkeypatch.setitem(sys.modules, name, stand_in)

    monkeypatch.delenv(module.VARIABLE, raising=False)
    monkeypatch.setattr(module, "KERNEL_DEVICE", "cpu")
    monkeypatch.setattr(module, "KERNEL_DTYPES", (torch.float32,))
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    yield run
    forget()


def describe(head_dim=8):
    return module.attention_backend("cpu", torch.float32, head_dim)


def compare(tensors, dout, gradients, assert_close):
    (out,), grads = gradients(lambda q, k, v: public(q, k, v), tensors, [dout])
    (ref,), refs = gradients(lambda q, k, v: softmax_attention(q, k, v)[0], tensors, [dout], dtype=torch.float64)
    assert_close("attention", "out", out, ref)
    for name, expected in refs.items():
        assert_close("attention", f"d{name}", grads[name], expected)


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (1, 7, 2, 72), (2, 0, 2, 8)], ids=str)
def test_sdpa_output_and_gradients(shape, gradients, assert_close):
    """With v a slice; and no token."""
    compare(*inputs(*shape), gradients, assert_close)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (1, 7, 2, 72), (0, 5, 2, 8)], ids=str)
def test_each_library(name, shape, install, gradients, assert_close):
    install(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert describe(shape[-1]).startswith(f"attention: {name} on cpu, float32, head size {shape[-1]}")
    compare(*inputs(*shape), gradients, assert_close)


def test_order_of_the_libraries(install):
    install("flash-attn 3", "flash-attn 2", "xformers")
    assert describe() == "attention: flash-attn 3 on cpu, float32, head size 8 (flash-attn 4 is not installed)"
    install("xformers")
    assert describe() == (
        "attention: xformers on cpu, float32, head size 8 "
        "(flash-attn 4 is not installed; flash-attn 3 is not installed; flash-attn 2 is not installed)"
    )
    install()
    assert describe().startswith("attention: PyTorch SDPA on cpu")


def test_a_library_that_fails_is_reported_and_passed_over(install):
    install("flash-attn 3", "xformers")
    sys.modules["flash_attn_interface"].flash_attn_func = lambda *_, **__: 1 / 0
    with pytest.warns(RuntimeWarning, match="flash-attn 3 is installed but not used: it fails: ZeroDivisionError"):
        assert "attention: xformers on cpu" in describe()
    with warnings.catch_warnings():
        # resolved once: no second probe, no second warning
        warnings.simplefilter("error")
        assert "flash-attn 3 fails: ZeroDivisionError: division by zero" in describe()


def test_a_library_with_wrong_gradients_is_passed_over(install):
    install("flash-attn 4")
    right = sys.modules["flash_attn.cute.interface"]._flash_attn_bwd

    def slightly_wrong(*args):
        dq, dk, dv = right(*args)
        return dq, dk, 1.1 * dv

    sys.modules["flash_attn.cute.interface"]._flash_attn_bwd = slightly_wrong
    with pytest.warns(RuntimeWarning, match="flash-attn 4 is installed but not used: it is wrong by 1.0e-01 relative"):
        assert "attention: PyTorch SDPA" in describe()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("result", range(4), ids=["out", "dq", "dk", "dv"])
def test_a_library_with_one_element_that_is_not_finite_is_passed_over(result, value, install):
    install("flash-attn 4")
    interface = sys.modules["flash_attn.cute.interface"] if result else sys.modules["flash_attn.cute"]
    name, position = ("_flash_attn_bwd", result - 1) if result else ("flash_attn_func", 0)
    right = getattr(interface, name)

    def planted(*args, **options):
        results = right(*args, **options)
        results[position][-1, -1, -1, -1] = value
        return results

    setattr(interface, name, planted)
    with pytest.warns(RuntimeWarning, match="flash-attn 4 is installed but not used: it is wrong by inf"):
        assert "attention: PyTorch SDPA" in describe()


def test_a_broken_installation_is_no_absence(install, monkeypatch):
    install("flash-attn 4")
    monkeypatch.delitem(sys.modules, "flash_attn.cute.interface")
    with pytest.warns(RuntimeWarning, match="flash-attn 4 is installed but not used: it cannot be imported"):
        assert "attention: PyTorch SDPA" in describe()


def test_forced_choice(install, monkeypatch):
    install("flash-attn 2", "xformers")
    for value, expected in (("sdpa", "PyTorch SDPA"), ("xformers", "xformers"), ("flash", "flash-attn 2")):
        monkeypatch.setenv(module.VARIABLE, value)
        assert describe().startswith(f"attention: {expected} on cpu")
    install("flash-attn 2")
    monkeypatch.setenv(module.VARIABLE, "xformers")
    with pytest.raises(ValueError, match=r"=xformers cannot run on cpu .* xformers is not installed; "):
        describe()
    monkeypatch.setenv(module.VARIABLE, "cudnn")
    with pytest.raises(ValueError, match="'cudnn' names no backend; use one of flash, xformers, sdpa, or unset it"):
        describe()


def test_a_cpu_refuses_a_forced_library(monkeypatch):
    monkeypatch.setenv(module.VARIABLE, "flash")
    with pytest.raises(ValueError, match=r"cannot run on cpu in torch.float32 .* cuda in bfloat16 and float16 only"):
        describe()


def test_registration(install):
    install("flash-attn 4")
    (tensors, dout), name = inputs(), "flash-attn 4"
    q, k, v = tensors.values()
    out, lse = softmax_attention(q, k, v)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(kernels.attention, (*leaves, name))
    torch.library.opcheck(kernels.attention_backward, (dout, q, k, v, out, lse, name))


@pytest.mark.parametrize("name", ["flash-attn 3", None])
def test_compiles_to_one_graph(name, install, gradients, assert_close):
    install(*([name] if name else []))
    tensors, dout = inputs()
    torch._dynamo.reset()
    # the first call resolves the backend, inside the trace
    compiled = torch.compile(lambda q, k, v: 2 * public(q, k, v), fullgraph=True, backend="aot_eager")
    (out,), grads = gradients(compiled, tensors, [dout])
    (ref,), refs = gradients(lambda q, k, v: 2 * public(q, k, v), tensors, [dout])
    assert_close("attention", "out", out, ref)
    for tensor, expected in refs.items():
        assert_close("attention", f"d{tensor}", grads[tensor], expected)


@pytest.mark.parametrize("name", ["xformers", None])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops(name, device, install):
    """Two products of 2 L^2 d forward, five backward, for each head."""
    install(*([name] if name else []))
    B, L, H, d = 2, 16, 3, 8
    leaves = [torch.zeros(B, L, H, d, device=device, requires_grad=True) for _ in range(3)]
    with FlopCounterMode(display=False) as counter:
        out = public(*leaves)
    assert counter.get_total_flops() == 2 * B * H * 2 * L * L * d
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * B * H * 2 * L * L * d


def test_meta_tensors_keep_what_a_flash_kernel_keeps():
    leaves = [torch.zeros(2, 16, 3, 8, device="meta", requires_grad=True) for _ in range(3)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        public(*leaves)
    assert sum(kept) == 4 * 2 * 16 * 3 * 8 + 2 * 3 * 16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(5, 3, 8)}, r"q must be \[B, L, H, d\], got \[5, 3, 8\]"),
        ({"k": torch.zeros(2, 6, 3, 8)}, r"k must be like q, \[2, 5, 3, 8\] .* got \[2, 6, 3, 8\]"),
        ({"v": torch.zeros(2, 5, 3, 8, dtype=torch.bfloat16)}, "v must be like q, .* got .* torch.bfloat16 on cpu"),
    ],
)
def test_bad_input_is_named(changed, message):
    tensors, _ = inputs()
    with pytest.raises(ValueError, match="attention: " + message):
        public(**{f"{name}_BLHd": tensor for name, tensor in (tensors | changed).items()})


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 72])
def test_whatever_is_installed_on_the_gpu(d, gradients, assert_close):
    tensors, dout = inputs(4, 256, 16, d, "cuda", torch.bfloat16)
    print(module.attention_backend("cuda", torch.bfloat16, d))
    compare(tensors, dout, gradients, assert_close)
