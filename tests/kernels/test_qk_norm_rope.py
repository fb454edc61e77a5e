"""QK-norm and rotary embedding: against complex numbers in float64, and what an operator owes its callers."""

import pytest
import torch
from pixelgen_kernels import qk_norm_rope as public
from pixelgen_kernels.qk_norm_rope import qk_norm_rope_bwd_kernel, qk_norm_rope_fwd_kernel
from pixelgen_kernels.registration import kernels


def inputs(B, L, H, d, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    angles = 6 * torch.rand(L, d // 2, generator=generator).to(device)
    tensors = {"qkv": randn(B, L, 3 * H * d), "q_norm_weight": randn(d), "k_norm_weight": randn(d)}
    tables = {"cos": angles.cos(), "sin": angles.sin(), "heads": H}
    return tensors, tables, [randn(B, L, H, d) for _ in range(3)]


def by_complex_numbers(qkv, q_norm_weight, k_norm_weight, cos, sin, heads):
    """The same in complex float64, where the rotation is one product."""
    q, k, v = qkv.double().unflatten(-1, (3, heads, len(q_norm_weight))).unbind(2)
    angle = torch.complex(cos.double(), sin.double())[:, None]

    def rotate(x, weight):
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * angle).flatten(-2)

    return rotate(q, q_norm_weight), rotate(k, k_norm_weight), v


@pytest.mark.parametrize("shape", [(2, 3, 3, 24), (2, 2, 12, 64), (2, 0, 2, 8)], ids=str)
def test_outputs_and_gradients(body, shape, device, gradients, assert_close):
    """Odd heads; a head size that is a power of two; no token."""
    tensors, tables, cotangents = inputs(*shape, device)
    outputs, grads = gradients(public, tensors, cotangents, **tables)
    refs, ref_grads = gradients(by_complex_numbers, tensors, cotangents, dtype=torch.float64, **tables)
    for name, out, ref in zip(("q", "k", "v"), outputs, refs, strict=True):
        assert_close("qk_norm_rope", name, out, ref)
    for name, ref in ref_grads.items():
        assert_close("qk_norm_rope", f"d{name}", grads[name], ref)


def test_v_is_a_view_and_unused_outputs_have_no_gradient(compiled_body, device, gradients):
    tensors, tables, (_, dk, _) = inputs(2, 3, 3, 24, device)
    v = public(**tensors, **tables)[2]
    assert v.data_ptr() == tensors["qkv"].data_ptr() + 2 * 3 * 24 * v.element_size()
    _, grads = gradients(public, tensors, [None, dk, None], **tables)
    q, k, v = grads["qkv"].unflatten(-1, (3, 3, 24)).unbind(2)
    assert not q.any() and not v.any() and not grads["q_norm_weight"].any()
    assert k.any() and grads["k_norm_weight"].any()


def test_registration(device):
    tensors, tables, grads = inputs(2, 3, 3, 8, device)
    cos, sin, heads = tables.values()
    torch.library.opcheck(kernels.qk_norm_rope, (*tensors.values(), cos, sin, heads, 1e-6))
    torch.library.opcheck(kernels.qk_norm_rope_backward, (*grads, *tensors.values(), cos, sin, 1e-6))


def test_compiles_to_one_graph(body, device, gradients):
    tensors, tables, cotangents = inputs(2, 3, 3, 8, device)

    def layer(qkv, **rest):
        # a product before, so that the packed projection is no leaf, and a sum after, as attention would read v
        q, k, v = public(1.5 * qkv, **rest)
        return q, k, v + q

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (outputs, grads), (traced, traced_grads) = (
        gradients(function, tensors, cotangents, **tables) for function in (layer, compiled)
    )
    for out, other in zip([*outputs, *grads.values()], [*traced, *traced_grads.values()], strict=True):
        assert torch.equal(out, other)


def test_offsets_past_two_to_the_31(addresses):
    """The last 32 rows of image 2^21: its packed projection begins at element 2^21 * 256 * 3456."""
    image, L, H, d, rows = 2**21, 256, 16, 72, 32
    half, full = torch.bfloat16, torch.float32
    block = image * (L * H // rows) + L * H // rows - 1
    sizes = {"L": L, "eps": 1e-6, "H": H, "d": d, "BLOCK_R": rows, "BLOCK_d": 128}
    token = image * L + L - 2
    outputs = list(range(token * H * d, (token + 2) * H * d))
    pointers = {"q_norm_weight_ptr": half, "k_norm_weight_ptr": half, "cos_ptr": full, "sin_ptr": full, "qkv_ptr": half}
    tables = list(range((L - 2) * d // 2, L * d // 2))

    def packed(part):
        return [(3 * t + part) * H * d + i for t in (token, token + 1) for i in range(H * d)]

    for part, name in enumerate("qk"):
        program = (2 * block + part, 0, 0)
        touched = addresses(qk_norm_rope_fwd_kernel, program, **pointers, q_ptr=half, k_ptr=half, **sizes)
        assert touched.keys() == {"qkv_ptr", "cos_ptr", "sin_ptr", f"{name}_norm_weight_ptr", f"{name}_ptr"}
        assert touched[f"{name}_ptr"].tolist() == outputs
        assert touched["qkv_ptr"].tolist() == packed(part)
        assert touched["cos_ptr"].tolist() == touched["sin_ptr"].tolist() == tables

    for part, name in enumerate("qkv"):
        touched = addresses(
            qk_norm_rope_bwd_kernel, (3 * block + part, 0, 0), **pointers, dq_ptr=half, dk_ptr=half, dv_ptr=half,
            dqkv_ptr=half, partial_ptr=full, CHUNK=rows, **sizes,
        )  # fmt: skip
        assert touched[f"d{name}_ptr"].tolist() == outputs
        assert touched["dqkv_ptr"].tolist() == packed(part)
        if name == "v":
            assert touched.keys() == {"dv_ptr", "dqkv_ptr"}
            continue
        assert touched["qkv_ptr"].tolist() == packed(part)
        assert touched["cos_ptr"].tolist() == touched["sin_ptr"].tolist() == tables
        assert touched["partial_ptr"].tolist() == list(range((2 * block + part) * d, (2 * block + part + 1) * d))


def arguments(**changed):
    given = {"qkv": (2, 3, 48), "q_norm_weight": (8,), "k_norm_weight": (8,), "cos": (3, 4), "sin": (3, 4)}
    return {name: torch.zeros(shape) for name, shape in given.items()} | {"heads": 2} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": 5}, r"qkv must be \[B, L, 3 \* 5 heads \* an even d\], got \[2, 3, 48\]"),
        ({"heads": 16}, r"an even d"),
        ({"qkv": torch.zeros(3, 48)}, r"qkv must be \[B, L, .* got \[3, 48\]"),
        ({"qkv": torch.zeros(2, 48, 3).mT}, "qkv must be contiguous"),
        ({"k_norm_weight": torch.zeros(4)}, r"k_norm_weight must be \[8\], got \[4\]"),
        ({"cos": torch.zeros(4, 4)}, r"cos must be \[3, 4\], got \[4, 4\]"),
        ({"sin": torch.zeros(3, 4, dtype=torch.complex64)}, "sin must be float32, bfloat16 or float16, got .*complex"),
        ({"q_norm_weight": torch.zeros(8).bfloat16()}, "q_norm_weight and k_norm_weight must share a dtype"),
    ],
)
def test_bad_input_is_named(changed, message):
    with pytest.raises(ValueError, match="qk_norm_rope: .*" + message):
        public(**arguments(**changed))


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "d"), [(12, 64), (16, 72)])
def test_bfloat16(H, d, gradients, assert_close):
    tensors, tables, cotangents = inputs(4, 257, H, d, "cuda", torch.bfloat16)
    outputs, grads = gradients(public, tensors, cotangents, **tables)
    refs, ref_grads = gradients(by_complex_numbers, tensors, cotangents, dtype=torch.float64, **tables)
    for name, out, ref in zip(("q", "k", "v"), outputs, refs, strict=True):
        assert_close("qk_norm_rope", name, out, ref)
    for name, ref in ref_grads.items():
        assert_close("qk_norm_rope", f"d{name}", grads[name], ref)
