"""Noised patch projection: images and patches of any size, Philox's noise, and what an operator owes."""

import pytest
import torch
import triton.language as tl
from einops import rearrange
from pixelgen_kernels import patch_projection as inference
from pixelgen_kernels import philox
from pixelgen_kernels.agreement import relative_error, tolerance
from pixelgen_kernels.patch_projection import noised_patch_projection as public
from pixelgen_kernels.patch_projection import (
    noised_patch_projection_bwd_kernel,
    noised_patch_projection_bwd_reduce_kernel,
    noised_patch_projection_fwd_kernel,
    noised_patch_projection_noise_fwd_kernel,
    noised_patch_projection_reference,
)
from pixelgen_kernels.registration import kernels
from support.operator_runs import moved

OP, SEED, SCALE = "noised_patch_projection", 0xFEDCBA9876543210, 1.3
NAMES = ("tokens", "pixels", "target")
# (B, H, W, patch, D): sides that differ, p = 16, 8, 12, 4, more tokens than a block, an odd width.
SHAPES = [(2, 16, 32, 16, 40), (3, 24, 16, 8, 33), (2, 12, 24, 12, 8), (3, 28, 32, 4, 130)]


def inputs(B, H, W, patch, D, device, planar=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    found = {
        "image": torch.randint(0, 256, (B, H, W, 3), generator=generator, dtype=torch.uint8),
        "numbers": torch.tensor([7, 2**32 + 1, 2**40 + 5])[:B],
        "t": torch.tensor([0.3, 0.9, 0.0])[:B],
        "weight": (0.05 * torch.randn(D, 3 * patch * patch, generator=generator)).to(dtype),
        "bias": torch.randn(D, generator=generator).to(dtype),
    }
    if planar:
        found["image"] = 2 * torch.rand(B, 3, H, W, generator=generator) - 1
    dtokens = torch.randn(B, H * W // patch**2, D, generator=generator)
    return {name: x.to(device) for name, x in found.items()}, dtokens.to(device, dtype)


def run(function, given, patch, dtokens, gradients, dtype=None):
    """(outputs, gradients of weight and bias); image, numbers and time are constants."""
    leaves = {k: given[k] for k in ("weight", "bias")}
    constants = {k: v for k, v in given.items() if k not in leaves}
    return gradients(
        lambda **k: function(**k, **constants, patch=patch, seed=SEED, noise_scale=SCALE),
        leaves, [dtokens, None, None], dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("planar", [False, True], ids=["uint8", "float"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(body, shape, planar, device, gradients, assert_close):
    given, dtokens = inputs(*shape, device, planar)
    outputs, grads = run(public, given, shape[3], dtokens, gradients)
    assert [x.dtype for x in outputs] == [torch.float32] * 3
    references, refs = run(noised_patch_projection_reference, given, shape[3], dtokens, gradients, torch.float64)
    for name, out, ref in zip(NAMES, outputs, references, strict=True):
        assert_close(OP, name, out, ref)
    for name in ("weight", "bias"):
        assert_close(OP, f"d{name}", grads[name], refs[name])


@pytest.mark.parametrize("seed", [SEED, 1, -3, 2**64 - 3])
def test_the_noise_is_philox_of_seed_and_image_number(body, seed, device):
    """Where x = 0 the target is -e, number by number, and z is (1-t) e."""
    given, _ = inputs(3, 8, 16, 8, 8, device, planar=True)
    given["image"].zero_()
    _, pixels, target = public(**given, patch=8, seed=seed)
    e = philox.normal(seed, given["numbers"], philox.NOISE, 3 * 8 * 16).view(3, 3, 8, 16)
    e = rearrange(e, "B C (h p) (w q) -> B (h w) (p q) C", p=8, q=8)
    assert (target + e).abs().max() < 5e-6
    assert (pixels - (1 - given["t"])[:, None, None, None] * e).abs().max() < 5e-6


def test_data_at_time_one_is_the_inference_projection(body, device, assert_close):
    """At t = 1 there is no noise in z: tokens and pixels are those of x / 127.5 - 1 and of the plain projection."""
    given, _ = inputs(2, 16, 32, 16, 24, device)
    given["t"] = torch.ones(2, device=device)
    tokens, pixels, _ = public(**given, patch=16, seed=SEED)
    x = rearrange(given["image"], "B H W C -> B C H W").double() / 127.5 - 1
    tokens_ref, pixels_ref = inference(x, given["weight"].double(), given["bias"].double(), 16)
    assert_close(OP, "tokens", tokens, tokens_ref)
    assert_close(OP, "pixels", pixels, pixels_ref)


def test_an_image_is_the_same_alone_and_in_a_batch(body, device, assert_close):
    """Noised pixels and target bit for bit; a product may round otherwise where its rows lie otherwise in a block."""
    given, _ = inputs(3, 16, 16, 8, 24, device)
    batch = public(**given, patch=8, seed=SEED)
    one = given | {name: given[name][1:2].contiguous() for name in ("image", "numbers", "t")}
    alone = public(**one, patch=8, seed=SEED)
    assert_close(OP, "tokens", alone[0], batch[0][1:2])
    assert torch.equal(alone[1], batch[1][1:2]) and torch.equal(alone[2], batch[2][1:2])


def test_only_tokens_carry_a_gradient(device):
    given, _ = inputs(1, 8, 8, 8, 8, device)
    given["weight"].requires_grad_()
    tokens, pixels, target = public(**given, patch=8, seed=SEED)
    assert tokens.requires_grad and not pixels.requires_grad and not target.requires_grad


def test_bias_of_another_type(compiled_body, device, gradients):
    given, dtokens = inputs(2, 8, 8, 4, 24, device)
    given["bias"] = given["bias"].bfloat16()
    _, grads = run(public, given, 4, dtokens, gradients)
    assert grads["weight"].dtype == torch.float32 and grads["bias"].dtype == torch.bfloat16


def test_registration(device):
    given, dtokens = inputs(2, 8, 8, 4, 24, device)
    features = torch.randn(2, 4, 48, device=device)
    backward = (dtokens, features, given["weight"], given["bias"])
    torch.library.opcheck(kernels.noised_patch_projection_backward, backward)
    given["weight"].requires_grad_(), given["bias"].requires_grad_()
    torch.library.opcheck(kernels.noised_patch_projection, (*given.values(), 4, 5, SCALE))


def test_offsets_past_two_to_the_31(addresses):
    """Image 2^28 of 16 x 16 pixels, token 2^28, part 1 of a sum over 2^29 tokens."""
    image, side, patch, D = 2**28, 16, 16, 16
    values, bf16, fp32 = 3 * side * side, torch.bfloat16, torch.float32
    touched = addresses(
        noised_patch_projection_noise_fwd_kernel, (image, 0, 0), image_ptr=torch.uint8, numbers_ptr=torch.int64,
        t_ptr=fp32, features_ptr=bf16, pixels_ptr=bf16, target_ptr=fp32, seed_low=5, seed_high=0, noise_scale=1.0,
        H=side, W=side, PATCH=patch, LEVELS=4, BLOCK_G=16, PLANAR=False,
    )  # fmt: skip
    everything = list(range(image * values, (image + 1) * values))
    assert touched["numbers_ptr"].tolist() == touched["t_ptr"].tolist() == [image]
    for name in ("image_ptr", "features_ptr", "pixels_ptr", "target_ptr"):
        assert touched[name].tolist() == everything, name
    given = {"features_ptr": bf16, "D": D, "K": 16, "DTYPE": tl.float32}
    touched = addresses(
        noised_patch_projection_fwd_kernel, (2**24, 0, 0), weight_ptr=bf16, bias_ptr=bf16, tokens_ptr=bf16, M=2**28 + 3,
        BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, **given,
    )  # fmt: skip
    rows = list(range(2**28 * 16, (2**28 + 3) * 16))
    assert touched["features_ptr"].tolist() == touched["tokens_ptr"].tolist() == rows
    touched = addresses(
        noised_patch_projection_bwd_kernel, (1, 0, 0), dtokens_ptr=bf16, partial_ptr=fp32, M=2**28 + 3, rows=2**28,
        BLOCK_D=16, BLOCK_K=16, BLOCK_M=16, **given,
    )  # fmt: skip
    assert touched["features_ptr"].tolist() == touched["dtokens_ptr"].tolist() == rows
    assert touched["partial_ptr"].tolist() == list(range(16 * 16 + 16, 2 * (16 * 16 + 16)))
    touched = addresses(
        noised_patch_projection_bwd_reduce_kernel, (2, 0, 0), partial_ptr=fp32, out_ptr=bf16, N=2**30, splits=3, BLOCK=4
    )
    assert touched["partial_ptr"].tolist() == [s * 2**30 + i for s in range(3) for i in range(8, 12)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, r"float \[B, 3, H, W\] or uint8 \[B, H, W, 3\]"),
        ({"image": torch.zeros(2, 8, 8, 3)}, r"float \[B, 3, H, W\] or uint8"),
        ({"image": torch.zeros(2, 8, 3, 8, dtype=torch.uint8).transpose(2, 3)}, "image must be contiguous"),
        ({"image": torch.zeros(2, 3, 8, 16)[..., ::2]}, "image must be contiguous"),
        ({"image": torch.zeros(2, 3, 8, 8, requires_grad=True)}, "image gets no gradient"),
        ({"image": torch.zeros(2, 10, 8, 3, dtype=torch.uint8)}, "image 10 x 8 does not divide into 4 x 4 patches"),
        ({"numbers": torch.zeros(2)}, r"numbers must be int64 \[2\]"),
        ({"numbers": torch.zeros(3, dtype=torch.int64)}, r"numbers must be int64 \[2\]"),
        ({"t": torch.zeros(2, 1)}, r"t must be \[2\], got \[2, 1\]"),
        ({"weight": torch.zeros(24, 47)}, r"weight must be \[24, 48\], got \[24, 47\]"),
        ({"bias": torch.zeros(23)}, r"bias must be \[24\], got \[23\]"),
        ({"weight": torch.zeros(24, 48, dtype=torch.int32)}, "weight must be float32, bfloat16 or float16"),
        ({"patch": 2}, "patch must be a multiple of 4, got 2"),
    ],
)
def test_bad_input_is_named(change, message, device):
    given, _ = inputs(2, 8, 8, 4, 24, device)
    change = {name: moved(x, device) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        public(**({"patch": 4, "seed": SEED} | given | change))


@pytest.mark.gpu
@pytest.mark.parametrize("patch", [4, 8, 16])
def test_bfloat16(patch, gradients, assert_close):
    given, dtokens = inputs(3, 128, 128, patch, 1152, "cuda", dtype=torch.bfloat16)
    outputs, grads = run(public, given, patch, dtokens, gradients)
    references, refs = run(noised_patch_projection_reference, given, patch, dtokens, gradients, torch.float64)
    for name, out, ref in zip(NAMES, outputs, references, strict=True):
        assert_close(OP, name, out, ref)
    assert relative_error(outputs[1], references[1]) <= tolerance("", torch.bfloat16), "pixels are rounded once"
    for name in ("weight", "bias"):
        assert_close(OP, f"d{name}", grads[name], refs[name])
