"""The report: counts against hand-made listings and exact arithmetic, and a gate that fails for each planted fault."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from pixelgen_kernels import tuning
from pixelgen_kernels.launch import Launch, Started
from pixelgen_kernels.registry import OPERATORS
from pixelgen_kernels.report import compile, sass, warmup
from pixelgen_kernels.report.command import BASELINE, main, note
from pixelgen_kernels.report.gpu import H100, occupancy, with_ceilings
from pixelgen_kernels.report.listing import listed
from pixelgen_kernels.report.rules import broken_times, read_baseline
from pixelgen_kernels.shapes import JIT_H, MODELS, B

HERE = Path(__file__).parent


def listing(*lines: str) -> str:
    """An nvdisasm listing: a line that ends in a colon is a label."""
    return "\n".join(x if x.endswith(":") else f"        /*{16 * i:04x}*/    {x} ;" for i, x in enumerate(lines))


NESTED = listing(
    "MOV R1, R2",
    ".L_x_0:", "LDG.E.128 R4, desc[UR6][R2.64]",
    ".L_x_1:", "@!P1 LDG.E.LTC128B.64 R8, desc[UR6][R2.64]", "MUFU.EX2 R3, R3", "@P0 BRA `(.L_x_1)",
    "STG.E desc[UR6][R2.64], R4", "@!P2 BRA `(.L_x_0)",
    "EXIT",
    ".L_x_2:", "BRA `(.L_x_2)",
)  # fmt: skip


def test_instructions_count_once_for_each_trip_of_the_loops_around_them():
    p = sass.profile(NESTED, trips=(3, 5))
    assert p.slots == 1 + 3 * (1 + 5 * 3 + 2) + 1
    assert p.special == 15
    # a full warp moves 32 x 16, 32 x 8 and 32 x 4 bytes with these; LTC128B names a cache sector, not a width
    assert p.access == {128: 3 * 512, 64: 15 * 256, 32: 3 * 128}
    assert p.share_at_least(128) == 512 / (512 + 5 * 256 + 128)
    assert p.undeclared == 0


def test_loops_without_a_trip_count_are_reported():
    assert sass.profile(NESTED, trips=(3,)).undeclared == 1
    assert sass.profile(NESTED).undeclared == 2


def test_a_jump_back_that_closes_no_loop_is_none():
    """A block that the compiler moved behind the end jumps back to where it was taken from."""
    text = listing("@P0 BRA `(.L_x_1)", ".L_x_0:", "NOP", "EXIT", ".L_x_1:", "NOP", "BRA `(.L_x_0)")
    assert sass.profile(text).undeclared == 0
    assert sass.profile(text, trips=(100,)).slots == 5


def test_polls_of_a_barrier_and_out_of_line_helpers_are_left_out():
    text = listing(
        ".L_x_0:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5", "@!P0 BRA `(.L_x_0)", "UTMALDG.2D [UR4], [UR6]",
        "EXIT", "$__internal_0_$__cuda_div_slowpath:", "MUFU.RCP R1, R1",
    )  # fmt: skip
    p = sass.profile(text, trips=(100,))
    assert (p.slots, p.bulk, p.special, p.undeclared) == (4, 1, 0, 0)


@pytest.mark.parametrize(
    ("opcode", "multiply_adds"),
    [
        # a warpgroup of four warps shares one HGMMA; HMMA belongs to one warp
        ("HGMMA.64x128x16.F32.BF16", 64 * 128 * 16 // 4),
        ("HMMA.16816.F32.BF16", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8),
    ],
)
def test_multiply_adds_of_matrix_instructions(opcode, multiply_adds):
    assert sass.profile(listing(f"{opcode} R4, R8, R12, R4", "EXIT")).matrix == multiply_adds


def test_a_text_that_is_no_listing_is_refused():
    with pytest.raises(ValueError, match="no instruction found"):
        sass.profile("nothing here")


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks", "limit"),
    [
        # 65,536 registers, 228 KB (1 KB more a block than it asks for), 64 warps and 32 blocks on a multiprocessor
        (32, 0, 4, 16, "registers"),
        (33, 0, 4, 12, "registers"),
        (64, 0, 8, 4, "registers"),
        # 143 round to 144 x 32 = 4608 a warp: 14, of which four schedulers can take 12
        (143, 0, 8, 1, "registers"),
        (255, 0, 4, 2, "registers"),
        (16, 0, 1, 32, "warps"),
        (16, 113 * 1024, 4, 2, "shared memory"),
        (16, 113 * 1024 + 1, 4, 1, "shared memory"),
        (16, 227 * 1024, 4, 1, "shared memory"),
        (16, 227 * 1024 + 1, 4, 0, "shared memory"),
    ],
)
def test_occupancy(registers, shared, warps, blocks, limit):
    found = occupancy(H100, registers, shared, warps)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == blocks * warps / 64


def report(folder: Path, names: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the report over planted kernels in a process that is free of the interpreter."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PIXELGEN_OPS")}
    env |= {"PIXELGEN_CACHE": str(folder / "store"), "TRITON_CACHE_DIR": str(folder / "triton"), **environment}
    command = [sys.executable, str(HERE / "planted.py"), names, "--models=B", "--jobs=0", "--verbose"]
    baseline = f"--baseline={folder / 'baseline.json'}"
    return subprocess.run([*command, baseline, *options], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Folder, result and JSON rows, by launch name, of one run over every planted kernel, accepted as the baseline."""
    folder = tmp_path_factory.mktemp("planted")
    names = "good,slow,spill,narrow,no_wgmma,undeclared,atomic,broken,crowded"
    out = report(folder, names, "--gate", "--update-baseline", f"--json={folder / 'rows.json'}")
    assert (folder / "rows.json").exists(), out.stderr
    content = json.loads((folder / "rows.json").read_text())
    return folder, out, {row["launch"]["name"]: row for row in content["rows"]}


def test_counts_of_compiled_kernels_are_exact(planted):
    _, _, rows = planted
    copy, product = rows["copy_fwd"], rows["product_fwd"]
    warps = copy["launch"]["grid"] * copy["launch"]["num_warps"]
    assert {k: n * warps for k, n in copy["compiled"]["profile"]["access"].items()} == {"128": 2 * 4 * (1 << 20)}
    assert copy["modelled"]["limit"] == "memory"
    # the tensor cores execute what the product asks for: the loop was found and its 32 trips were counted
    assert product["modelled"]["executed_flops"] == product["launch"]["flops"]
    assert product["compiled"]["profile"]["wgmma"] == 32 * (64 // 16) * (128 // 64)
    # two 64 x 2 KB panels in each of three stages
    assert product["compiled"]["shared"] == 3 * 2 * 128 * 64 * 2


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ("spill/spill_fwd", "bytes of stack per thread"),
        ("spill/spill_fwd", "accesses of local memory a warp"),
        ("narrow/narrow_fwd", "0% of its bytes in accesses of 128 bits"),
        ("no_wgmma/no_wgmma_fwd", "has a matrix product but no wgmma instruction"),
        ("undeclared/undeclared_fwd", "1 loops whose trip counts its launch does not declare"),
        ("undeclared/undeclared_fwd", "executes 0.55 GFLOP on the tensor cores but declares 17.72"),
        ("atomic/atomic_fwd", "adds with atomics"),
        ("broken/broken_fwd", "does not compile: CompilationError"),
        ("crowded/crowded_fwd", "needs 294912 bytes of shared memory, over the 232448 of a block on sm_90"),
        ("crowded/crowded_fwd", "does not fit on a multiprocessor"),
    ],
)
def test_the_gate_names_every_planted_fault(planted, launch, message):
    _, out, _ = planted
    assert out.returncode == 1
    assert any(line.startswith(f"GATE B/{launch}: ") and message in line for line in out.stderr.splitlines()), (
        out.stderr
    )


def test_the_gate_passes_what_is_good_and_compiles_nothing_twice(planted):
    folder, first, _ = planted
    assert "GATE B/good" not in first.stderr
    again = report(folder, "good,slow", "--gate")
    assert again.returncode == 0, again.stderr
    assert "compiled" in first.stderr and "compiled" not in again.stderr


def test_the_gate_fails_on_a_slower_kernel_and_on_one_without_a_baseline(planted):
    folder, _, _ = planted
    accepted = json.loads((folder / "baseline.json").read_text())
    (folder / "part.json").write_text(
        json.dumps({"microseconds": {k: v for k, v in accepted["microseconds"].items() if "good" not in k}})
    )
    out = report(folder, "good,slow", "--gate", f"--baseline={folder / 'part.json'}", PLANTED_WORK="200")
    assert out.returncode == 1
    assert "GATE B/slow/slow_fwd: modelled time grew from 2.8 to" in out.stderr
    assert "GATE B/good/copy_fwd: has no row in the baseline" in out.stderr
    assert "GATE B/good/product_fwd: has no row in the baseline" in out.stderr


@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures_compile_and_must_fit(planted, arch):
    folder, _, _ = planted
    out = report(folder, "good,crowded", f"--arch={arch}", "--gate")
    broken = [line for line in out.stderr.splitlines() if line.startswith("GATE")]
    assert f"sm_{arch}" in out.stdout
    assert len(broken) == 1 and broken[0].startswith("GATE B/crowded/crowded_fwd: needs "), out.stderr


def test_rows_that_vanished_from_a_whole_run_are_named():
    assert broken_times([], {"XL/old/old_fwd": 1.0}, whole=False) == []
    assert broken_times([], {"XL/old/old_fwd": 1.0}, whole=True) == [
        "XL/old/old_fwd: is in the baseline but no longer exists"
    ]


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no baseline at .*none\.json; write one with --update-baseline"):
        read_baseline(tmp_path / "none.json")
    for content in ("{}", '{"microseconds": {"B/x/x_fwd": 1.0}}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ValueError, match="is not a baseline"):
            read_baseline(tmp_path / "other.json")
    with pytest.raises(compile.ToolError, match=r"nvdisasm is not at .*triton wheel"):
        monkeypatch.setattr(compile.triton, "__file__", str(tmp_path / "__init__.py"))
        compile.tool("nvdisasm")
    with pytest.raises(ValueError, match="a process without TRITON_INTERPRET=1"):
        compile.compile_all([started()])
    with pytest.raises(ValueError, match="architecture 70 is not one of"):
        compile.compile_all([started()], arch=70)


def started(**changes: object) -> Started:
    """A launch of a kernel that there is none of. changes: of its plan, or `arguments` that it starts with."""
    arguments = changes.pop("arguments", (64,))
    kernel = SimpleNamespace(fn=started, arg_names=("N", "BLOCK"), cache_key="source")
    plan = dict(name="x_fwd", kernel=kernel, grid=1, constants={"BLOCK": 32}, num_warps=4, num_stages=1,
                bytes_moved=1, rows=1)  # fmt: skip
    return Started.of(Launch(**plan | changes), arguments)


def test_an_answer_is_stored_for_all_that_it_depends_on(monkeypatch):
    other_source = SimpleNamespace(fn=started, arg_names=("N", "BLOCK"), cache_key="other")
    keys = [
        compile.key(started(), 90),
        compile.key(started(), 80),
        compile.key(started(kernel=other_source), 90),
        compile.key(started(constants={"BLOCK": 64}), 90),
        compile.key(started(num_warps=8), 90),
        compile.key(started(num_stages=3), 90),
        compile.key(started(options={"maxnreg": 128}), 90),
        compile.key(started(loops=(3,)), 90),
        *(compile.key(started(arguments=(n,)), 90) for n in (1, 65, 2**40)),
    ]
    monkeypatch.setattr(compile.triton, "__version__", "0")
    keys.append(compile.key(started(), 90))
    monkeypatch.setattr(compile, "_analysis", lambda: "another analysis")
    keys.append(compile.key(started(), 90))
    assert len(set(keys)) == len(keys)
    # neither depends on the grid nor on what is declared for the roofline
    assert compile.key(started(grid=7, bytes_moved=9, rows=8), 90) == keys[-1]


def test_a_kernel_of_a_model_is_listed_once_and_for_the_model_s_own_cases():
    found = listed(OPERATORS, MODELS.values())
    assert len({(item.model, item.started.key) for item in found}) == len(found) == len({item.key for item in found})
    assert all(item.case in MODELS[item.model].cases for item in found)
    by_model = {model: {item.key.partition("/")[2] for item in found if item.model == model} for model in MODELS}
    assert by_model["L"] >= {"flow_loss/flow_loss_bwd_reduce", "pixel_mlp/pixel_mlp_bwd_reduce"}
    # the sum of partial results is the same for every variant of an operator
    assert "pixel_mlp_tanh/pixel_mlp_bwd_reduce" not in by_model["L"]
    assert "norm_modulate_last/norm_modulate_bwd" in by_model["JiT-H"] - by_model["L"]


def test_every_configuration_is_listed_on_request_and_a_tuned_one_is_shipped(tmp_path, monkeypatch):
    operators = {"swiglu": OPERATORS["swiglu"]}
    first, *others = OPERATORS["swiglu"].configs
    shipped = listed(operators, [B])
    every = listed(operators, [B], every=True)
    assert every[: len(shipped)] == shipped and all(item.shipped for item in shipped)
    assert {item.config for item in every[len(shipped) :]} == {str(config) for config in others}
    assert not any(item.shipped for item in every[len(shipped) :])

    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    (tmp_path / "h100.json").write_text(json.dumps({"swiglu": {str(B.ffn): list(others[0])}}))
    tuning._tuned.cache_clear()
    try:
        tuned = listed(operators, [B], every=True)
        assert [item.started.key for item in tuned if item.shipped] == [
            item.started.key for item in every if item.config == str(others[0])
        ]
        assert {item.config for item in tuned if not item.shipped} == {str(c) for c in (first, *others[1:])}
        # another GPU's file, and another size, change nothing
        assert [x.started.key for x in listed(operators, [B], gpu="A100")] == [x.started.key for x in shipped]
        assert listed(operators, [JIT_H])[0].launch.constants["BLOCK_N"] == first.block_n
    finally:
        tuning._tuned.cache_clear()


def test_the_committed_baseline_holds_every_launch_that_is_listed():
    assert set(read_baseline(BASELINE)) == {item.key for item in listed(OPERATORS, MODELS.values())}


def test_measured_ceilings_replace_those_of_the_device(tmp_path):
    path = tmp_path / "ceilings.json"
    path.write_text(json.dumps({"tflop_per_s": 712.5, "tb_per_s": 2.9, "gpu": "NVIDIA H100 PCIe", "copies": 3}))
    device = with_ceilings(H100, path)
    assert (device.tensor_rate, device.bandwidth) == (712.5e12, 2.9e12)
    assert replace(device, tensor_rate=H100.tensor_rate, bandwidth=H100.bandwidth, ceilings=H100.ceilings) == H100
    assert "712 TFLOP/s, 2.9 TB/s (measured on NVIDIA H100 PCIe, ceilings.json)" in note(device)
    assert "798 TFLOP/s, 3.0 TB/s (seen elsewhere)" in note(H100)


@pytest.mark.parametrize(
    "content", ["no json", "[1, 2]", "{}", '{"tflop_per_s": 700}', '{"tflop_per_s": 700, "tb_per_s": 0}',
                '{"tflop_per_s": "700", "tb_per_s": 2.8}', '{"tflop_per_s": NaN, "tb_per_s": 2.8}']
)  # fmt: skip
def test_a_file_that_holds_no_ceilings_is_named(tmp_path, content):
    path = tmp_path / "wrong.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"wrong\.json: (no readable|ceilings need)"):
        with_ceilings(H100, path)
    with pytest.raises(ValueError, match=r"none\.json: no readable"):
        with_ceilings(H100, tmp_path / "none.json")


@pytest.mark.parametrize("option", ["--gate", "--update-baseline"])
def test_the_baseline_is_kept_at_the_report_s_own_ceilings(tmp_path, option):
    path = tmp_path / "ceilings.json"
    path.write_text(json.dumps({"tflop_per_s": 700, "tb_per_s": 2.9}))
    with pytest.raises(ValueError, match="--ceilings changes the times"):
        main([f"--ceilings={path}", option])


def test_ceilings_change_what_they_bind(planted):
    """Half the bandwidth doubles a copy's time; a product that the tensor cores bind takes theirs."""
    folder, _, rows = planted
    (folder / "ceilings.json").write_text(json.dumps({"tflop_per_s": 399, "tb_per_s": 1.5}))
    out = report(folder, "good", f"--ceilings={folder / 'ceilings.json'}", f"--json={folder / 'slower.json'}")
    assert out.returncode == 0, out.stderr
    slower = {
        row["launch"]["name"]: row["modelled"] for row in json.loads((folder / "slower.json").read_text())["rows"]
    }
    for name in ("copy_fwd", "product_fwd"):
        for limit in ("tensor", "memory"):
            assert slower[name][limit] == pytest.approx(2 * rows[name]["modelled"][limit])
        assert slower[name]["issue"] == rows[name]["modelled"]["issue"]
    assert slower["copy_fwd"]["time"] == pytest.approx(2 * rows["copy_fwd"]["modelled"]["time"])


def test_warmup_without_a_gpu_says_why_it_does_nothing(monkeypatch):
    monkeypatch.setattr(warmup.torch.cuda, "is_available", lambda: False)
    assert "nothing to do without a GPU" in warmup.warmup([started()], "a model")


def test_warmup_prepares_each_kernel_once():
    launches = [started(), started(grid=7), started(num_warps=8), started()]
    assert [x.launch.num_warps for x in warmup.distinct(launches)] == [4, 8]
