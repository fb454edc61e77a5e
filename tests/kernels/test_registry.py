"""The registry: every operator is in it, its launches are whole, and its FLOPs and bytes are those of the formulas."""

import pixelgen_kernels
import pytest
import torch
from pixelgen_kernels.launch import MODELS, XL, ModelShape
from pixelgen_kernels.registry import OPERATORS, Maker, differentiable, leaves, outputs, tensors, work

KERNELS = [name for name, operator in OPERATORS.items() if operator.configs]
TINY = ModelShape("tiny", width=32, heads=2, ffn=24, depth=1, pixel_depth=1, parameters=200, batch=2, tokens=4,
                  pixels=16, channels=8, pixel_hidden=32, patch=4)  # fmt: skip


def test_every_public_operator_is_in_the_table():
    public = {name for name in pixelgen_kernels.__all__ if name.islower()}
    # in training the image is noised on its way through the projection; patch_projection is the same without noise
    assert {operator.function.__name__ for operator in OPERATORS.values()} == public - {"patch_projection"}


@pytest.mark.parametrize("name", OPERATORS)
def test_public_function_and_definition_agree_on_the_inputs_of_the_table(name, device, assert_close):
    operator = OPERATORS[name]
    mine, theirs = (operator.inputs(TINY, Maker(torch.float32, device)) for _ in range(2))
    wanted, exact = leaves(operator, mine), leaves(operator, theirs)
    out, ref = outputs(operator.function(**mine)), outputs(operator.reference(**theirs))
    if operator.in_place:
        for key, x in tensors(mine).items():
            assert_close(key, x, tensors(theirs)[key], 1e-5 if x.dtype == torch.float32 else 2.0**-7)
        return
    for i, (a, b) in enumerate(zip(out, ref, strict=True)):
        assert_close(f"output {i}", a, b)
    maker = Maker(torch.float32, device, seed=1)
    cotangents = [maker.normal(*x.shape, dtype=x.dtype) for x in differentiable(out)]
    grads = torch.autograd.grad(differentiable(out), list(wanted.values()), cotangents)
    refs = torch.autograd.grad(differentiable(ref), list(exact.values()), cotangents)
    for key, a, b in zip(wanted, grads, refs, strict=True):
        assert_close(f"gradient of {key}", a, b)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", KERNELS)
def test_launches_name_every_argument_of_their_kernel(name, model):
    operator = OPERATORS[name]
    assert 1 <= len(operator.configs) <= 6
    for config in operator.configs:
        launches = operator.every_launch(MODELS[model], config)
        names = [launch.name for launch in launches]
        assert len(set(names)) == len(names) and all(x.startswith(name) for x in names)
        assert {x.direction for x in launches} == ({"forward"} if operator.in_place else {"forward", "backward"})
        for launch in launches:
            arguments = set(launch.kernel.arg_names)
            assert set(launch.signature) | set(launch.constexprs) == arguments, launch.name
            assert not set(launch.signature) & set(launch.constexprs), launch.name
            assert set(launch.divisible) | set(launch.unaligned) <= arguments, launch.name
            assert min(launch.grid, launch.bytes_moved, launch.rows, *launch.loops, 1) == 1, launch.name


@pytest.mark.parametrize("name", KERNELS)
def test_launches_declare_the_work_of_the_definition(name):
    """FLOPs of the definition at least; bytes of its tensors, give or take partial sums and saved results.

    A kernel whose product is too thin for the tensor cores, under 10 FLOP a byte, declares no FLOPs.
    """
    operator = OPERATORS[name]
    ideal = work(operator, XL)
    for direction in ("forward", "backward"):
        launches = [x for x in operator.aot(XL, operator.configs[0]) if x.direction == direction]
        flops, size = sum(x.flops for x in launches), sum(x.bytes_moved for x in launches)
        wanted_flops, wanted = (getattr(ideal, f"{direction}_{what}") for what in ("flops", "bytes"))
        assert flops >= wanted_flops or (flops == 0 and wanted_flops < 10 * wanted)
        assert 0.75 * wanted <= size <= 2.0 * wanted, f"{direction}: {size / wanted:.2f} of the ideal bytes"


def test_only_rows_that_start_unaligned_may_move_in_narrow_accesses():
    """L's SwiGLU is 2730 bf16 wide, the loss's target 3 float32: their rows start at multiples of 4 bytes."""
    for model, shape in MODELS.items():
        for name in KERNELS:
            for launch in OPERATORS[name].every_launch(shape, OPERATORS[name].configs[0]):
                narrow = (model, name) == ("L", "swiglu") or launch.name in ("flow_loss_fwd", "flow_loss_bwd")
                assert launch.widest == (32 if narrow else 128), launch.name


def test_work_counts_the_formulas():
    tokens, pixels, width = 64 * 256, 64 * 256 * 256, 1152
    attention, mlp, swiglu = (work(OPERATORS[name], XL) for name in ("attention", "pixel_mlp", "swiglu"))
    # q k^T and p v, each 2 L L d a head, and two products for the gradients of each
    assert attention.forward_flops == 2 * 2 * 64 * 16 * 256 * 256 * 72
    assert attention.backward_flops == 2 * attention.forward_flops
    assert mlp.forward_flops == 2 * pixels * 2 * 16 * 64
    assert mlp.backward_flops == 2 * mlp.forward_flops
    assert attention.forward_bytes == 2 * tokens * width * 4
    assert swiglu.forward_bytes == 2 * tokens * 3072 * 3
    assert swiglu.backward_bytes == 2 * tokens * 3072 * 5
