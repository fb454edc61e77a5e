"""One AdamW + EMA pass against the published formulas in numpy float64, and its skip against 'nothing happened'."""

import importlib

import numpy as np
import pytest
import torch
from pixelgen_kernels import bodies, tuning
from pixelgen_kernels.agreement import relative_error, tolerance
from pixelgen_kernels.registration import kernels
from torch import Tensor

# the package gives its operators' names to their functions, so the module comes from the import system
op = importlib.import_module("pixelgen_kernels.adamw_ema")

HYPER = dict(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
DECAYS = [0.5, 0.999]
BODIES = ["reference", "fused", "native", "triton"]
DTYPES = {"f64": torch.float64, "f32": torch.float32}


@pytest.fixture
def body(request, monkeypatch):
    """reference: the formulas; fused: PyTorch's own kernel; native: csrc; triton: ours."""
    monkeypatch.setenv("PIXELGEN_OPS", request.param if request.param in ("native", "triton") else "reference")
    return op.reference if request.param == "reference" else op.adamw_ema


def shard(size: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = {k: torch.randn(size, generator=generator, dtype=dtype) for k in ("param", "grad", "exp_avg", "ema_a", "ema_b")}
    x["exp_avg_sq"] = torch.rand(size, generator=generator, dtype=dtype)
    return {name: tensor.to(device) for name, tensor in x.items()}


def update(body, x: dict[str, Tensor], **more) -> None:
    args = HYPER | dict(step=7, ema_decays=DECAYS) | more
    body(x["param"], x["grad"], x["exp_avg"], x["exp_avg_sq"], [x["ema_a"], x["ema_b"]], **args)


def by_hand(x: dict[str, Tensor], step: int, beta1: float = 0.9, beta2: float = 0.95) -> dict[str, np.ndarray]:
    """Loshchilov & Hutter, algorithm 2, lines 5 to 12, then the averages."""
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "ema_a", "ema_b")
    p, g, m, v, a, b = (x[k].double().cpu().numpy() for k in names)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    p = p - 3e-3 * (m / (1 - beta1**step) / (np.sqrt(v / (1 - beta2**step)) + 1e-8) + 0.1 * p)
    return dict(param=p, exp_avg=m, exp_avg_sq=v, ema_a=0.5 * a + 0.5 * p, ema_b=0.999 * b + 0.001 * p)


def assert_matches(x: dict[str, Tensor], expected: dict[str, np.ndarray]) -> None:
    for name, want in expected.items():
        error = relative_error(x[name], torch.from_numpy(want))
        assert error <= tolerance("adamw_ema", x[name].dtype), f"{name}: relative error {error}"


@pytest.mark.parametrize(
    ("body", "precision"),
    [(body, precision) for body in BODIES for precision in DTYPES if body in BODIES[:2] or precision == "f32"],
    indirect=["body"],
)
@pytest.mark.parametrize("size", [1, 63, 1021, 1025])
@pytest.mark.parametrize("on_device", [False, True], ids=["numbers", "tensors"])
def test_follows_the_formulas(body, precision, size, on_device, device):
    x = shard(size, DTYPES[precision], device)
    grad, expected = x["grad"].clone(), by_hand(x, 7)
    as_given = (lambda v: torch.tensor(v, dtype=torch.float64, device=device)) if on_device else (lambda v: v)
    update(body, x, step=as_given(7), ema_decays=[as_given(d) for d in DECAYS])
    assert_matches(x, expected)
    assert torch.equal(x["grad"], grad)


@pytest.mark.parametrize("body", BODIES, indirect=True)
@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
def test_grad_scale_scales_the_gradient(body, on_device, device):
    x = shard(129, torch.float32, device)
    grad, expected = x["grad"].clone(), by_hand(x | {"grad": x["grad"].double() * 0.3}, 7)
    update(body, x, grad_scale=torch.tensor(0.3, device=device) if on_device else 0.3)
    assert_matches(x, expected)
    assert torch.equal(x["grad"], grad)


@pytest.mark.parametrize("body", BODIES[1:], indirect=True)
def test_a_list_is_updated_as_its_tensors_one_by_one(body, device):
    """Sizes on both sides of the native body's pieces of 16384; bitwise, as nothing is summed."""
    sizes = (1, 515, 16384, 16385, 40001) if body == "native" else (1, 515, 700)
    shards, alone = ([shard(size, torch.float32, device) for size in sizes] for _ in range(2))
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    lists = [[x[name] for x in shards] for name in names]
    emas = [[x[name] for x in shards] for name in ("ema_a", "ema_b")]
    op.adamw_ema_foreach(*lists, emas, **HYPER, step=7, ema_decays=DECAYS, grad_scale=0.5)
    for x, y in zip(shards, alone, strict=True):
        update(op.adamw_ema, y, grad_scale=0.5)
        assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("body", BODIES[1:], indirect=True)
def test_total_norm(body, device):
    tensors = [torch.randn(size, device=device) for size in (1, 1023, 16385, 0)]
    expected = float(torch.cat(tensors).double().norm())
    assert float(op.total_norm(tensors)) == pytest.approx(expected, rel=1e-6)
    tensors[2][77] = float("nan")
    assert not torch.isfinite(op.total_norm(tensors))


def test_the_native_body_refuses_lists_that_do_not_fit(monkeypatch):
    monkeypatch.setenv("PIXELGEN_OPS", "native")
    x = torch.zeros(4)
    with pytest.raises(ValueError, match=r"lists of \[2, 1, 2, 2\] tensors for 0 decays"):
        op.adamw_ema_foreach([x, x], [x], [x, x], [x, x], [], **HYPER, step=1, ema_decays=[])
    with pytest.raises(ValueError, match=r"contiguous float32 of one shape, got .*torch.float64 \[4\]"):
        op.adamw_ema_foreach([x], [x.double()], [x], [x], [], **HYPER, step=1, ema_decays=[])


@pytest.mark.parametrize("body", ["native", "triton"], indirect=True)
@pytest.mark.parametrize("step", [1, 2, 10, 400, 5000, 10**6])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99), (0.999, 0.9999)])
def test_corrections_keep_their_digits_at_any_step(body, step, betas, device):
    """1 - b^s loses 4 digits to cancellation at b = 0.9999, s = 1 when taken as a difference in float32."""
    x = shard(33, torch.float32, device)
    expected = by_hand(x, step, *betas)
    update(body, x, step=step, beta1=betas[0], beta2=betas[1])
    assert_matches(x, expected)


@pytest.mark.parametrize("config", op.CONFIGS, ids=str)
@pytest.mark.parametrize("emas", range(op.MOST_EMAS + 1))
def test_every_configuration_and_number_of_averages(config, emas, device):
    x = shard(515, torch.float32, device)
    averages = [x["ema_a"] + i for i in range(emas)]
    decays = [torch.tensor(1.0 - 0.1**i, device=device) for i in range(emas)]
    start = [a.double().cpu().numpy() for a in averages]
    p = by_hand(x, 7)["param"]
    tensors = (x["param"], x["grad"], x["exp_avg"], x["exp_avg_sq"], averages)
    with tuning.using("adamw_ema", config):
        op.adamw_ema(*tensors, **HYPER, step=7, ema_decays=decays)
    for i, (now, then) in enumerate(zip(averages, start, strict=True)):
        assert_matches({"ema": now}, {"ema": then + 0.1**i * (p - then)})


@pytest.mark.parametrize("body", BODIES, indirect=True)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_skipped_step_changes_no_bit(body, bad, device):
    x = shard(63, torch.float32, device)
    x["grad"][5] = bad
    out = torch.randn(63, device=device).bfloat16()
    before = {name: tensor.clone() for name, tensor in x.items()} | {"out": out.clone()}
    update(body, x, skip=torch.tensor(True, device=device), bf16_out=out)
    x["grad"], before["grad"] = torch.zeros(1), torch.zeros(1)
    assert all(torch.equal(x.get(name, out), tensor) for name, tensor in before.items())


@pytest.mark.parametrize("body", BODIES, indirect=True)
def test_a_step_that_is_not_skipped_is_the_same_as_one_without_skip(body, device):
    x, y = shard(63, torch.float32, device), shard(63, torch.float32, device)
    out = torch.zeros(63, dtype=torch.bfloat16, device=device)
    update(body, x)
    update(body, y, skip=torch.tensor(False, device=device), bf16_out=out)
    assert all(torch.equal(x[name], y[name]) for name in x)
    if bodies.INTERPRETED and bodies.body(out) == "triton":
        # Triton's interpreter cuts float32 to bfloat16 where hardware rounds: one unit in the last place
        torch.testing.assert_close(out.float(), y["param"], rtol=2.0**-7, atol=0.0)
    else:
        assert torch.equal(out, y["param"].bfloat16())


def test_what_does_not_fit_is_refused_before_anything_changes():
    x = shard(63, torch.float32)
    before = x["param"].clone()
    with pytest.raises(ValueError, match=r"grad is torch.float64 \[63\], but param is torch.float32"):
        update(op.adamw_ema, x | {"grad": x["grad"].double()})
    with pytest.raises(ValueError, match=r"ema is torch.float32 \[62\]"):
        update(op.adamw_ema, x | {"ema_b": x["ema_b"][:62]})
    with pytest.raises(ValueError, match="1 EMAs and 2 decays"):
        tensors = (x["param"], x["grad"], x["exp_avg"], x["exp_avg_sq"], [x["ema_a"]])
        op.adamw_ema(*tensors, step=1, ema_decays=DECAYS, **HYPER)
    with pytest.raises(ValueError, match=r"bf16_out is \[1\]"):
        update(op.adamw_ema, x, bf16_out=torch.zeros(1))
    assert torch.equal(x["param"], before)


def test_what_the_kernel_cannot_take_is_refused(device, monkeypatch):
    monkeypatch.setenv("PIXELGEN_OPS", "triton")
    x = shard(64, torch.float32, device)
    with pytest.raises(ValueError, match=r"param must be float32 for the kernel, got torch\.float64"):
        update(op.adamw_ema, shard(64, torch.float64, device))
    with pytest.raises(ValueError, match=r"exp_avg must be contiguous, got strides \(2,\) for \[64\]"):
        update(op.adamw_ema, x | {"exp_avg": torch.zeros(128, device=device)[::2]})
    with pytest.raises(ValueError, match="at most 4 EMAs in one pass, got 5"):
        tensors = (x["param"], x["grad"], x["exp_avg"], x["exp_avg_sq"], [x["ema_a"]] * 5)
        op.adamw_ema(*tensors, step=1, ema_decays=[0.9] * 5, **HYPER)


def test_an_empty_shard_is_left_alone(device):
    update(op.adamw_ema, shard(0, torch.float32, device))


def test_registration(device):
    x = shard(40, torch.float32, device)
    decays = [torch.tensor(d, device=device) for d in DECAYS]
    out = torch.zeros(40, dtype=torch.bfloat16, device=device)
    scalars = (torch.tensor(3.0, device=device), torch.tensor(False, device=device), torch.tensor(0.5, device=device))
    tensors = (x["param"], x["grad"], x["exp_avg"], x["exp_avg_sq"], [x["ema_a"], x["ema_b"]], decays, *scalars)
    torch.library.opcheck(kernels.adamw_ema, (*tensors, out, 3e-3, 0.9, 0.95, 1e-8, 0.1))


def test_offsets_past_two_to_the_31(addresses):
    """The last block of a shard of 2^41 elements, whose numbers need 41 bits."""
    program, block = 2**31 - 2, 1024
    pointers = {name: torch.float32 for name in op.adamw_ema_kernel.arg_names if name.endswith("_ptr")} | {
        "skip_ptr": torch.bool
    }
    scalars = dict.fromkeys(("lr", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "keep_weight"), 0.5)
    touched = addresses(
        op.adamw_ema_kernel, (program, 0, 0), **pointers, **scalars, log_beta1=-1.0, log_beta2=-1.0,
        N=program * block + 3, EMAS=1, BF16=True, BLOCK=block,
    )  # fmt: skip
    expected = [program * block + i for i in range(3)]
    names = ("param_ptr", "grad_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "ema0_ptr", "bf16_ptr")
    assert all(touched[name].tolist() == expected for name in names)
    assert "ema1_ptr" not in touched
