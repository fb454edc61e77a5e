"""The visit to a GPU: nothing is measured twice, no failure goes unseen, and others can read what it brings home."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu import counters, kernel_tests, launch_times, plan, sides, steps, summary, tune, wheels
from gpu.visit import Part, Result, Task, Visit, read
from pixelgen_kernels import tuning
from pixelgen_kernels.registry import OPERATORS
from pixelgen_kernels.shapes import MODELS, RAGGED

HERE = Path(__file__).parent
KINDS = ("good", "red", "nothing", "broken import", "crashes", "hangs")


def visit(out, *parts):
    made = Visit(parts, out, limit=600, path=[str(HERE)])
    made.run()
    return made


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    """A visit with a task of each kind, over."""
    out = tmp_path_factory.mktemp("visit")
    limits = {"hangs": 2.0}
    tasks = tuple(Task(kind, "small_measurements", {"kind": kind}, limits.get(kind, 60.0)) for kind in KINDS)
    return visit(out, Part("small", 1.0, tasks, ahead=len(KINDS)))


def test_every_way_to_fail_leaves_a_row_that_says_so(visited):
    found = {task: result for (_, task), result in read(visited.rows).items()}
    assert {kind: found[kind].end for kind in KINDS} == {
        "good": "ok",
        "red": "red",
        "nothing": "no rows",
        "broken import": "exit 1",
        "crashes": "killed by SIGABRT",
        "hangs": "timed out after 2 s",
    }
    # what was measured before the end is there
    assert [[row.get("value") for row in found[kind].rows] for kind in ("good", "crashes", "hangs")] == [[1.5]] * 3
    assert "no such library" in found["broken import"].tail
    assert found["red"].reds == ["off by far"]
    assert found["good"].about == {"machine": "a cpu"}
    assert [text.split(":")[0] for text in visited.missing()] == [f"small {kind}" for kind in KINDS[1:]]


def test_a_second_visit_measures_what_is_missing_and_nothing_else(visited, tmp_path):
    copy = tmp_path / "day.jsonl"
    copy.write_text(visited.rows.read_text() + '{"part": "small", "task": "good", "begi')  # killed while it wrote
    tasks = tuple(Task(kind, "small_measurements", {"kind": "good"}) for kind in ("good", "crashes"))
    again = visit(tmp_path, Part("small", 1.0, tasks, ahead=2))
    found = {task: result for (_, task), result in read(again.rows).items()}
    assert {task: (found[task].attempt, found[task].end, len(found[task].rows)) for task in ("good", "crashes")} == {
        "good": (1, "ok", 1),
        "crashes": (2, "ok", 1),
    }
    assert again.missing() == []


def test_a_part_gets_what_earlier_ones_leave_and_ends_with_its_share():
    parts = [Part("a", 30, ()), Part("b", 60, ()), Part("c", 10, ())]
    made = SimpleNamespace(parts=parts, limit=200.0, start=1000.0)
    assert [Visit._deadline(made, part) - 1000.0 for part in parts] == [60.0, 180.0, 200.0]


def test_without_time_nothing_is_begun(tmp_path):
    made = Visit([Part("small", 1.0, (Task("good", "small_measurements", {"kind": "good"}),))], tmp_path, limit=1.0)
    made.run()
    assert read(made.rows) == {}
    assert made.missing() == ["small good: not measured"]


# --- the training step ---


class FakeTraining:
    """A training whose loss is what the test says."""

    engine_name, flops, device = "deepspeed", 10**9, torch.device("cpu")

    def __init__(self, losses, norm=1.0):
        self.losses, self.norm, self.engine = iter(losses), norm, SimpleNamespace(grad_norm=torch.tensor(norm))

    def step(self):
        self.loss = torch.tensor(next(self.losses))

    def gradient_norms(self):
        from contextlib import nullcontext

        return nullcontext({"weight": torch.tensor(self.norm)})


@pytest.mark.parametrize(
    ("losses", "norm", "red"),
    [
        ([1.0] * 20, 1.0, None),
        ([1.0, math.nan] + [1.0] * 20, 1.0, "not finite: nan"),
        ([1.0] * 3 + [math.inf] * 20, 1.0, "not finite: the last loss"),
        ([1.0] * 20, math.nan, "not finite: nan, nan, nan, weight"),
    ],
)
def test_a_number_that_is_not_finite_is_red(monkeypatch, losses, norm, red):
    monkeypatch.setattr(steps, "build", lambda config, side: FakeTraining(losses, norm))
    monkeypatch.setattr(steps, "ready", lambda config, side: None)
    monkeypatch.setattr(steps, "device_peak", lambda device: (1e12, "measured"))
    rows = []
    steps.measure(lambda **row: rows.append(row), lambda: None, plan.B, 2, "ours", plan.TINY, steps=2)
    assert [row["red"] for row in rows if "red" in row] == ([red] if red else [])
    assert rows[0]["images_per_s"] > 0


def row_of_step(side="ours", loss=1.0, norm=2.0, gradient=1e-4, overrides=(), ms=100.0, images=64):
    return {
        "config": plan.XL, "images": images, "side": side, "overrides": list(overrides), "losses": [loss] * 3,
        "gradient_norms": [norm] * 3, "by_parameter": {"large": norm, "small": gradient},
        "attention": "attention: PyTorch SDPA on cuda", "engine": "deepspeed", "ms": ms, "p20": ms, "p80": ms,
        "images_per_s": 64e3 / ms, "tflop_per_s": 500.0, "share": 0.5, "peak_gb": 40.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "red"),
    [
        ({}, False),
        ({"loss": 1.0004, "norm": 2.01, "gradient": 1.04e-4}, False),
        ({"loss": 1.001}, True),
        ({"norm": 2.1}, True),
        # a ten thousandth of all, and still seen
        ({"gradient": 1.1e-4}, True),
        ({"loss": math.nan}, True),
        ({"norm": math.nan}, True),
        ({"gradient": math.nan}, True),
        ({"gradient": 0.0}, True),
    ],
)
def test_sides_agree_or_are_red(change, red):
    (found,) = sides.compare([row_of_step(**change), row_of_step("reference")], "cuda")
    assert (found.name, found.against) == (f"{plan.XL} ours 64", f"{plan.XL} reference 64")
    assert found.red == red


def test_a_parameter_without_a_gradient_is_red():
    lacking = row_of_step()
    del lacking["by_parameter"]["small"]
    (found,) = sides.compare([lacking, row_of_step("reference")], "cuda")
    assert (found.red, found.worst) == (True, "small")


def test_what_is_compared_with_what():
    rows = [
        row_of_step("ours"),
        row_of_step("ours", overrides=["train.recompute=blocks"]),
        row_of_step("ours", overrides=["model.patch_depth=3"]),
        row_of_step("ours", images=32),
        row_of_step("compiled"),
    ]
    without = [(c.name.split(" ", 1)[1], c.against.split(" ", 1)[1]) for c in sides.compare(rows, "cuda")]
    assert without == [("ours 64 recompute=blocks", "ours 64"), ("compiled 64", "ours 64")]
    beside = sides.compare([*rows, row_of_step("reference")], "cuda")
    assert {c.against.split(" ", 1)[1] for c in beside} == {"reference 64"}


# --- what it brings home ---

ABOUT = {"machine": "NVIDIA H100 80GB HBM3", "date": "2026-11-27T10:00:00+00:00", "torch": "2.11.0", "triton": "3.6.0",
         "python": "3.12.3", "system": "Linux", "commit": "cf40120"}  # fmt: skip
BEST = [4, 16, 64]


def results(*more):
    rows = {
        ("ceilings", "products"): [
            {"what": "copy", "ms": 1.0, "tb_per_s": 2.9},
            {"what": "product square", "model": "", "direction": "forward", "ms": 2.0, "tflop_per_s": 780.0},
            {"what": "product square", "model": "", "direction": "input gradient", "ms": 2.0, "tflop_per_s": 750.0},
            {"what": "attention flash_attention", "model": "XL", "head_dim": 72, "forward_ms": 1.0, "backward_ms": 2.0,
             "forward_tflop_per_s": 400.0, "backward_tflop_per_s": 300.0},
        ],
        ("tests", "kernels"): [{"count": {"PASSED": 50}}, {"count": {"PASSED": 700, "FAILED": 1}, "code": 1}],
        ("step", "XL"): [row_of_step(ms=130.0)],
        ("step", "XL reference"): [row_of_step("reference", ms=330.0)],
        ("variants", "XL graph"): [row_of_step(overrides=["train.cuda_graph=true"], ms=120.0)],
        ("operators", "swiglu"): [
            {"case": "swiglu", "model": "XL", "pass": "both", "provider": "ours", "body": "triton", "p50": 0.1,
             "gb_per_s": 2700.0, "tflop_per_s": 0.0, "share": 0.9},
            {"case": "swiglu", "provider": "liger", "absent": "swiglu XL liger: not installed"},
        ],
        ("profile", "XL ours"): [
            {"step_ms": 130.0, "busy_ms": 120.0, "idle_share": 0.077, "kernels": 1000.0},
            {"kernel": "nvjet_tst_256x128", "us": 9000.0, "calls": 104.0},
        ],
        ("counters", "XL"): [{"model": "XL", "kernel": "swiglu_fwd_kernel", "dram__bytes.sum": "201 Mbyte"}],
        ("tuning", "norm_modulate"): [
            {"operator": "norm_modulate", "model": "XL", "key": "1152", "best": BEST, "gain": 1.2, "kept": True},
            {"operator": "norm_modulate", "model": "L", "key": "1024", "best": BEST, "gain": 1.01, "kept": False},
        ],
        ("sampling", "XL"): [
            {"config": plan.XL, "body": "triton", "images": 64, "steps": 10, "guidance": 3.25, "images_per_s": 40.0}
        ],
        ("loader", "jpeg"): [{"absent": "DALI is not installed"}],
        ("predicted", "XL"): [
            {"model": "XL", "case": "swiglu", "launch": name, "limit": "memory", "modelled_us": 100.0,
             "measured_us": us, "ratio": us / 100, "tb_per_s": 2.5, "tflop_per_s": 0.0}
            for name, us in (("swiglu_fwd", 110.0), ("swiglu_bwd", 120.0), ("swiglu_sum", 40.0))
        ],
    }  # fmt: skip
    return {key: Result(1, ABOUT, found, "ok") for key, found in rows.items()} | dict(more)


def test_the_page_says_where_and_shows_every_row(tmp_path):
    assert summary.write(tmp_path, results(), []) == []
    text = (tmp_path / "day.md").read_text()
    assert text.startswith("# NVIDIA H100 80GB HBM3, 2026-11-27\n")
    for wanted in (
        "torch 2.11.0; triton 3.6.0; python 3.12.3; system Linux; commit cf40120",
        "Red or missing: 0",
        "| copy |  |  | 1 |  | 2.9 |",
        "| attention flash_attention | XL | 72 | 400 | 300 |",
        "- kernels: 700 passed, 1 failed",
        f"| {plan.XL} ours 64 | deepspeed | 130 |",
        f"| {plan.XL} ours 64 cuda_graph=true | deepspeed | 120 |",
        "ours is 2.54 times as fast as reference",
        "| swiglu | both | ours | triton | 100 | 2700 |",
        "- not there: swiglu XL liger: not installed",
        "XL ours: 130.00 ms, of which 120.00 ms in 1000 kernels; idle 7.7%",
        "| nvjet_tst_256x128 | 9000 | 104 |",
        "| swiglu_fwd_kernel | 201 Mbyte |",
        "| norm_modulate | 1152 | [4, 16, 64] | 1.2 | yes |",
        f"| {plan.XL} | triton | 64 | 10 | 3.25 | 40 |",
        "DALI is not installed",
        "| XL | swiglu | swiglu_bwd | memory | 100 | 120 | 1.2 | 2.5 | 0 |",
        "Measured / modelled: median 1.10, worst 0.40 (XL swiglu swiglu_sum).",
    ):
        assert wanted in text


def test_what_is_red_or_missing_or_disagrees_comes_first(tmp_path):
    broken = (("step", "XL"), Result(1, ABOUT, [row_of_step(loss=2.0), {"red": "compiled after the warm-up"}], "red"))
    bad = summary.write(tmp_path, results(broken), ["loader jpeg: timed out after 60 s"])
    assert [text.split(":")[0] for text in bad] == [
        "step XL", f"step {plan.XL} ours 64 disagrees with {plan.XL} reference 64", "loader jpeg",
    ]  # fmt: skip
    head = (tmp_path / "day.md").read_text().split("##")[0]
    assert all(f"- {text}" in head for text in bad)


def test_a_step_that_disagrees_is_measured_again(tmp_path):
    assert summary.disagreeing(results()) == set()
    broken = results((("step", "XL"), Result(1, ABOUT, [row_of_step(gradient=2e-4)], "ok")))
    assert summary.disagreeing(broken) == {("step", "XL")}
    rows = tmp_path / "day.jsonl"
    events = ({"begin": 1}, {"value": 1}, {"end": "ok"})
    rows.write_text("".join(json.dumps({"part": "step", "task": "XL"} | event) + "\n" for event in events))
    made = Visit(
        [Part("step", 1.0, (Task("XL", "small_measurements", {"kind": "good"}),))], tmp_path, 60.0, [str(HERE)]
    )
    made.run(again={("step", "XL")})
    assert read(rows)["step", "XL"].attempt == 2


def test_rows_of_two_versions_are_said_to_be(tmp_path):
    older = (("step", "XL"), Result(1, ABOUT | {"commit": "0000000"}, [row_of_step()], "ok"))
    summary.write(tmp_path, results(older), [])
    assert "Rows are of more than one commit: 0000000; cf40120." in (tmp_path / "day.md").read_text()


def test_the_report_takes_the_ceilings(tmp_path):
    from pixelgen_kernels.report.gpu import H100, with_ceilings

    summary.write(tmp_path, results(), [])
    device = with_ceilings(H100, tmp_path / "ceilings.json")
    assert (device.tensor_rate, device.bandwidth) == (780e12, 2.9e12)
    written = json.loads((tmp_path / "ceilings.json").read_text())
    assert (written["gpu"], written["date"]) == (ABOUT["machine"], ABOUT["date"])


def test_plans_take_the_tuned_configurations(tmp_path, monkeypatch):
    summary.write(tmp_path, results(), [])
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    configs = OPERATORS["norm_modulate"].configs
    assert list(configs[0]) != BEST
    tuning._tuned.cache_clear()
    with tuning.planning_for(ABOUT["machine"]):
        taken = {D: list(tuning.chosen("norm_modulate", configs, D)) for D in (1152, 1024)}
    tuning._tuned.cache_clear()
    # the one that was kept, and the first where none was
    assert taken == {1152: BEST, 1024: list(configs[0])}


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("AMD EPYC 9B14, 2 threads", "cpu"),
    ],
)
def test_a_tuned_table_is_named_for_its_card(machine, name):
    assert summary.short_name(machine) == name


# --- the measurements ---


def test_the_plan_names_what_the_registry_has():
    assert set(plan.OPERATORS) == set(OPERATORS)
    assert set(plan.TUNED) == {name for name, operator in OPERATORS.items() if len(operator.configs) > 1}
    assert set(plan.NAMED) == set(MODELS)
    for rehearsal in (False, True):
        parts = plan.parts(rehearsal)
        names = [(part.name, task.name) for part in parts for task in part.tasks]
        assert len(set(names)) == len(names)
        json.dumps([dict(task.arguments) for part in parts for task in part.tasks])
    assert sum(part.seconds for part in plan.parts(False)) == 540
    assert [part.name for part in plan.parts(True)] == [part.name for part in plan.parts(False)]


def test_the_sizes_of_a_tuned_entry_are_what_launchers_ask_for():
    keys = {name: tune.key_of(OPERATORS[name], MODELS["XL"]) for name in ("norm_modulate", "qk_norm_rope", "adamw_ema")}
    assert keys == {"norm_modulate": "1152", "qk_norm_rope": "16,72", "adamw_ema": ""}


def test_a_configuration_that_is_wrong_is_red_and_not_timed(monkeypatch):
    operator, shape = OPERATORS["swiglu"], RAGGED["many"]
    wrong, real = operator.configs[1], tune.outcome

    def outcome(*arguments):
        found = real(*arguments)
        return [x * math.nan for x in found] if arguments[-1] == wrong else found

    monkeypatch.setattr(tune, "outcome", outcome)
    rows = []
    tune.tune(lambda **row: rows.append(row), operator, "8", shape, rounds=1)
    assert [row["red"] for row in rows if "red" in row] == [f"swiglu 8 {list(wrong)} is off by inf"]
    assert [row["config"] for row in rows if "p50" in row] == [list(c) for c in operator.configs if c != wrong]


def test_the_times_of_launches_are_those_of_the_registry():
    operator, shape = OPERATORS["norm_modulate"], RAGGED["odd"]
    found = launch_times.launch_times(launch_times.prepared(operator, shape, "cpu"), "cpu")
    assert [launch.name for launch, _ in found] == [started.launch.name for started in operator.launches(shape)]
    assert all(us > 0 for _, us in found)


def test_lines_of_pytest_are_read_with_and_without_workers():
    lines = {
        "[gw1] [ 42%] PASSED tests/b.py::test_x[a b-1] ": ("PASSED", "tests/b.py::test_x[a b-1]"),
        "tests/a.py::test_x[None-1] FAILED                    [ 50%]": ("FAILED", "tests/a.py::test_x[None-1]"),
        "tests/a.py::test_x[None-1] ": None,
        "FAILED tests/a.py::test_x - ValueError: PASSED": None,
        "=== 1 failed, 3 passed in 2.00s ===": None,
    }  # fmt: skip
    assert {line: kernel_tests.outcome(line) for line in lines} == lines


def test_failing_tests_are_red_and_counted(tmp_path):
    (tmp_path / "test_two.py").write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    rows = []
    select = [str(tmp_path / "test_two.py"), "-p", "no:cacheprovider"]
    kernel_tests.measure(lambda **row: rows.append(row), lambda: None, select, workers=0, expected=3)
    assert [row["red"].split("::")[-1] for row in rows if "red" in row] == [
        "test_bad FAILED", "pytest ended with 1 after 2 tests of 3 at least",
    ]  # fmt: skip
    assert {"count": {"PASSED": 1, "FAILED": 1}, "code": 1} in rows


def test_counters_are_read_from_what_ncu_writes():
    lines = [
        "==PROF== Connected to process 1",
        '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
        '"0","1","swiglu_fwd_kernel","dram__bytes.sum","Mbyte","201.3"',
        '"0","1","swiglu_fwd_kernel","launch__registers","register/thread","40"',
        '"1","1","swiglu_bwd_kernel","dram__bytes.sum","Mbyte","604.0"',
    ]
    assert counters.kernels(lines) == [
        {"kernel": "swiglu_fwd_kernel", "dram__bytes.sum": "201.3 Mbyte", "launch__registers": "40 register/thread"},
        {"kernel": "swiglu_bwd_kernel", "dram__bytes.sum": "604.0 Mbyte"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tags", "fits"),
    [("py3-none-any", True), ("py2.py3-none-any", True), ("py39-none-manylinux_2_28_x86_64", True),
     (f"cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-linux_x86_64", True),
     ("cp38-abi3-manylinux_2_28_x86_64", True), ("cp399-cp399-linux_x86_64", False), ("py399-none-any", False)],
)  # fmt: skip
def test_a_wheel_of_another_python_is_not_unpacked(tags, fits):
    assert wheels._fits(Path(f"name-1.0-{tags}.whl")) == fits


def test_the_command_refuses_what_it_cannot_do(tmp_path):
    command = [sys.executable, str(HERE.parents[1] / "benchmarks" / "gpu_day.py"), "--out", str(tmp_path)]
    done = subprocess.run([*command, "--rehearse", "--parts", "steps"], capture_output=True, text=True)
    assert (done.returncode, "--parts steps: use some of ceilings, tests, step," in done.stderr) == (1, True)
