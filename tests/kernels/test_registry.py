"""The registry: every operator is in it, its launches are whole, and its FLOPs and bytes are those of the formulas."""

import pixelgen_kernels
import pytest
from pixelgen_kernels import bodies, philox
from pixelgen_kernels.registry import OPERATORS, launches, work
from pixelgen_kernels.shapes import MODELS, XL, ModelShape
from support.operator_runs import CASES, inputs, run
from torch.utils.flop_counter import FlopCounterMode

KERNELS = [name for name, operator in OPERATORS.items() if operator.configs]
SMALL = ModelShape("small", width=32, heads=2, ffn=24, depth=1, pixel_depth=1, parameters=200, batch=2, tokens=4,
                   pixels=16, channels=8, pixel_hidden=32, patch=4)  # fmt: skip


def test_every_public_operator_is_in_the_table():
    public = {name for name in pixelgen_kernels.__all__ if name.islower()}
    # in training the image is noised on its way through the projection; patch_projection is the same without noise
    # rotate is plain PyTorch, of which there is no other body; layers are made of operators
    public -= {"patch_projection", "rotate", "attention_layer", "swiglu_layer"}
    # random numbers are drawn by philox's functions
    assert {operator.function for operator in OPERATORS.values()} == {
        philox.words, *(getattr(pixelgen_kernels, name) for name in public)
    }  # fmt: skip


def test_models_name_cases_of_the_table():
    assert set().union(*(shape.cases for shape in MODELS.values())) <= set(CASES)
    assert {CASES[case].name for case in XL.cases} == set(KERNELS)
    for shape in MODELS.values():
        assert {case for case, started in launches(shape).items() if started} == set(shape.cases)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", [case for case, operator in CASES.items() if operator.configs])
def test_launches_name_every_argument_of_their_kernel(case, model):
    operator = CASES[case]
    for config in operator.configs:
        started = operator.launches(MODELS[model], case, config)
        names = [one.launch.name for one in started]
        assert len(set(names)) == len(names) and all(name.startswith(operator.name) for name in names)
        without_gradient = operator.in_place or operator.function is philox.words
        assert {one.launch.direction for one in started} == (
            {"forward"} if without_gradient else {"forward", "backward"}
        )
        for launch, signature, constants, aligned in ((s.launch, s.signature, s.constants, s.aligned) for s in started):
            assert set(signature) | set(constants) == set(launch.kernel.arg_names), launch.name
            assert not set(signature) & set(constants), launch.name
            assert aligned <= set(signature) and set(launch.constants) <= set(constants), launch.name
            assert min(launch.grid, launch.bytes_moved, launch.rows, *launch.loops, 1) == 1, launch.name
            assert launch.num_warps in (1, 2, 4, 8, 16) and launch.num_stages >= 1, launch.name


@pytest.mark.parametrize("name", KERNELS)
def test_launches_declare_the_work_of_the_definition(name):
    """FLOPs of the definition at least; bytes of its tensors, give or take partial sums and saved results.

    A kernel whose product is too thin for the tensor cores, under 10 FLOP a byte, declares no FLOPs.
    """
    operator = OPERATORS[name]
    ideal = work(operator, XL)
    started = [one.launch for one in operator.launches(XL)]
    for direction in {launch.direction for launch in started}:
        of_it = [launch for launch in started if launch.direction == direction]
        flops, size = sum(launch.flops for launch in of_it), sum(launch.bytes_moved for launch in of_it)
        wanted_flops, wanted = (getattr(ideal, f"{direction}_{what}") for what in ("flops", "bytes"))
        assert flops >= wanted_flops or (flops == 0 and wanted_flops < 10 * wanted)
        assert 0.75 * wanted <= size <= 2.0 * wanted, f"{direction}: {size / wanted:.2f} of the ideal bytes"


def test_only_rows_that_start_unaligned_may_move_in_narrow_accesses():
    """Rows of the loss's 3 target values and its 51 sums start at multiples of 4 bytes; and the tail of a shard is what
    no wide access covers."""
    for model, shape in MODELS.items():
        for case, started in launches(shape).items():
            for launch in (one.launch for one in started):
                by_four = case == "flow_loss" or launch.name.endswith("_tail")
                assert launch.widest == (32 if by_four else 128), f"{model}: {launch.name}"


def flops(case, body, device):
    """Of forward and backward; recomputation is not counted."""
    with bodies.forced(body), FlopCounterMode(display=False) as counter:
        run(case, inputs(case, SMALL, device))
    return counter.get_total_flops()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_every_body_counts_the_flops_of_the_definition(case, body, device):
    assert flops(case, body, device) == flops(case, "reference", device)


@pytest.mark.parametrize("asked", bodies.BODIES)
@pytest.mark.parametrize("case", CASES)
def test_flops_are_counted_without_memory(case, asked, device):
    """Meta tensors have shapes only: any body may be asked for there, also one that cannot run on this machine."""
    assert flops(case, asked, "meta") == flops(case, "reference", device)


def test_work_counts_the_formulas():
    tokens, pixels, width = 64 * 256, 64 * 256 * 256, 1152
    of = {name: work(operator, XL) for name, operator in OPERATORS.items()}
    # q k^T and p v, each 2 L L d a head, and two products for the gradients of each
    assert of["attention"].forward_flops == 2 * 2 * 64 * 16 * 256 * 256 * 72
    assert of["attention"].backward_flops == 2 * of["attention"].forward_flops
    assert of["attention"].forward_bytes == 2 * tokens * width * 4
    assert of["pixel_mlp"].forward_flops == 2 * pixels * 2 * 16 * 64
    assert of["pixel_mlp"].backward_flops == 2 * of["pixel_mlp"].forward_flops
    assert of["flow_loss"].forward_flops == 2 * pixels * 3 * 16
    assert of["flow_loss"].backward_flops == 2 * of["flow_loss"].forward_flops
    # image and noise get no gradient
    assert of["noised_patch_projection"].forward_flops == 2 * tokens * 3 * 256 * width
    assert of["noised_patch_projection"].backward_flops == of["noised_patch_projection"].forward_flops
    assert of["swiglu"].forward_bytes == 2 * tokens * 3072 * 3
    assert of["swiglu"].backward_bytes == 2 * tokens * 3072 * 5
