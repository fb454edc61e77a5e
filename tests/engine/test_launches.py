"""The launches of a step, listed on the meta device: for every system, without memory, and by Triton's own key enough.

That a step in the interpreter starts exactly what is listed is proved in tests/kernels/test_step_launches.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.engine.launches import build_on_meta, optimizer_launches, step_launches
from pixelgen_fast.engine.optimizer import AdamWEMA

HERE = Path(__file__).parent
CONFIGS = Path(__file__).parents[2] / "configs"
# configurations of runs, not those of `pixelgen compare` and `pixelgen teacher`
RUNS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if "model:" in path.read_text().splitlines())


def small_systems() -> list[str]:
    """The variants of test_systems.py, which warm_worker.py takes a step of."""
    spec = importlib.util.spec_from_file_location("small_systems", HERE / "test_systems.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.VARIANTS)


TEACHER = ("alignment.teacher=vit_small_patch16_dinov3", "alignment.layer=2")
SYSTEMS = [
    *(f"{variant} bf16" for variant in small_systems()), "pixeldit fp32",
    "jit fp32 train.zero_stage=2", "repa bf16 train.zero_stage=3 model.num_heads=3",
    "pixeldit bf16 train.recompute=operators", "pixeldit bf16 train.recompute=blocks",
]  # fmt: skip


def load(name: str, *overrides: str) -> cfg.Config:
    return cfg.load(CONFIGS / f"{name}.yaml", overrides, models.model_schema)


class OffMeta(TorchDispatchMode):
    """The most bytes that an operation put anywhere but on the meta device."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and not x.is_meta]
        sizes = [x.untyped_storage().nbytes() for x in tensors]
        self.most = max([self.most, *sizes])
        return out


@pytest.mark.parametrize("name", RUNS)
def test_every_configuration_is_listed_without_memory(name: str) -> None:
    with OffMeta() as off_meta:
        kernels = {started.launch.kernel.fn.__name__ for started in step_launches(load(name))}
    assert off_meta.most < 1_000_000  # tables of positions; the weights of the smallest are a hundred times as much
    # every system's blocks have norms, attention and a feed-forward layer; those of DINO, MAR and FractalGen are plain,
    # and DiT-DH does not norm its queries and keys
    operators = ["norm_modulate", "swiglu", *(["qk_norm_rope"] if not name.startswith("ditdh") else [])]
    blocks = {f"{op}_{way}_kernel" for op in operators for way in ("fwd", "bwd")}
    assert "adamw_ema_kernel" in kernels
    assert blocks <= kernels or "trunk" in name or name.startswith(("mar", "fractal"))
    assert ("pixel_mlp_bwd_kernel" in kernels) == hasattr(load(name).model, "pixel_mlp_ratio")


def test_what_a_run_sets_is_in_the_list() -> None:
    """Precision, recomputation, averages and an alignment each start what they should."""

    def counts(*overrides: str, precision: str = "bf16") -> dict[str, int]:
        found: dict[str, int] = {}
        for started in step_launches(load("digits", *overrides), precision):
            found[started.launch.name] = found.get(started.launch.name, 0) + 1
        return found

    plain = counts()
    blocks = counts("train.recompute=blocks")
    assert blocks["norm_modulate_fwd"] == 2 * plain["norm_modulate_fwd"]
    assert blocks["norm_modulate_bwd"] == plain["norm_modulate_bwd"]
    teacher = counts(*TEACHER)
    # the projector's shards, which are not averaged
    assert teacher["adamw_ema_fwd"] == 2 * plain["adamw_ema_fwd"]
    several = load("digits", "optimizer.ema=[0.9,0.99]", *TEACHER)
    averages = {x.constants["EMAS"] for x in step_launches(several) if x.launch.name == "adamw_ema_fwd"}
    assert averages == {0, 2}
    pointers = {
        precision: {kind for started in step_launches(load("digits"), precision) for kind in started.signature.values()}
        for precision in ("bf16", "fp32")
    }
    assert "*bf16" in pointers["bf16"] and "*bf16" not in pointers["fp32"]


@pytest.mark.parametrize("ranks", [1, 4])
def test_matrices_of_muon_start_no_kernel_of_ours(ranks: int) -> None:
    """But what of the weights is AdamW's does; the rest of the step is the same."""
    adamw, muon = (step_launches(load("digits", f"optimizer.name={name}"), ranks=ranks) for name in ("adamw", "muon"))
    ours = [[x for x in found if x.launch.name.startswith("adamw")] for found in (adamw, muon)]
    assert len(adamw) - len(ours[0]) == len(muon) - len(ours[1])
    if ranks == 1:  # one flat buffer a group, in bf16
        rows = [sum(x.launch.rows for x in found) for found in ours]
        assert 0 < rows[1] < rows[0]


def test_no_weight_is_at_an_odd_place() -> None:
    """JiT-H has biases of 6826 numbers; behind one of them, ZeRO's buffer would hold the other weights unaligned."""
    config = load("jit_h_256")
    module, optimizer = build_on_meta(config, "bf16", in_one_buffer=True)
    assert any(p.numel() % 8 for p in module.parameters())
    assert all(p.storage_offset() % 8 == 0 for p in module.parameters() if p.numel() % 8 == 0)
    assert len({p.untyped_storage()._cdata for p in optimizer.param_groups[0]["params"]}) == 1
    pointers = {(name, started.launch.name) for started in step_launches(config) for name in started.signature
                if name.endswith("weight_ptr") and name not in started.aligned}  # fmt: skip
    assert not pointers


@pytest.mark.parametrize(
    ("numel", "kernels"), [(100, {("i32", True), ("i32", False), (None, False)}), (2**31, {("i64", True)})]
)
def test_a_shard_of_any_size_is_listed(numel: int, kernels: set[tuple[str | None, bool]]) -> None:
    """Whatever the number of ranks makes of a group: the elements up to a multiple of 16, and those behind it."""
    param = nn.Parameter(torch.empty(numel, device="meta"))
    found = optimizer_launches(AdamWEMA([param]), sharded=True)
    assert {(started.signature.get("N"), "N" in started.aligned) for started in found} >= kernels


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """What Triton was asked for by warm-up and by a step of each small system, in a process without the interpreter."""
    folder = tmp_path_factory.mktemp("warm")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    env |= {"DS_ACCELERATOR": "cpu", "PIXELGEN_OPS": "triton", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(HERE / "warm_worker.py"), str(folder)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((folder / "keys.json").read_text())


def test_every_system_is_warmed(keys: dict[str, dict[str, list[str]]]) -> None:
    assert list(keys) == SYSTEMS


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_after_warm_up_compiles_nothing(keys: dict[str, dict[str, list[str]]], system: str) -> None:
    warmed, started = (set(keys[system][of]) for of in ("warmed", "started"))
    assert len(started) > (1 if system.startswith(("mar", "fractal")) else 10)
    assert started <= warmed, started - warmed
    # more is warmed only for the optimizer, whose shard could have another size on more ranks
    assert all(key.startswith("adamw_ema_kernel ") for key in warmed - started)
