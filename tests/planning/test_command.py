"""pixelgen plan from end to end on a small model, and one clear line for what no run could have."""

import json
import re
from pathlib import Path

import pytest

from pixelgen_fast.cli import main
from pixelgen_fast.planning.cards import find_card, table

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits.yaml")


def plan(*arguments: str) -> int:
    return main(["plan", DIGITS, *arguments])


def test_table_json_and_page(tmp_path, capsys):
    data, page = tmp_path / "plan.json", tmp_path / "plan.html"
    assert plan("--gpus", "2", "--json", str(data), "--html", str(page), "train.micro_batch=16") == 0
    said = capsys.readouterr().out
    for title in ("A step of 32 images", "Parts", "Communication", "Memory", "The run on 2 GPUs", "Loader"):
        assert re.search(rf"^{title}", said, re.MULTILINE), title
    found = json.loads(data.read_text())
    cases = found["cases"]
    assert cases["floor"]["step"] < cases["planned"]["step"] < cases["pessimistic"]["step"]
    assert cases["planned"]["hours"]["configured"] == pytest.approx(80_000 / 32 * cases["planned"]["step"] / 3600)
    assert cases["planned"]["kwh"]["configured"] == pytest.approx(cases["planned"]["hours"]["configured"] * 1.4)
    assert len(found["changes"]) <= 3 and found["memory"]["stage 1"]["largest_micro_batch"] > 16
    text = page.read_text()
    assert text.count("<svg") == 3 and "http-equiv" not in text and not re.search(r'(src|href)="https?:', text)


def test_a_rank_waits_for_all_that_is_sent(tmp_path):
    """Over a link of 1 MB/s nearly all of the step is communication."""
    card = tmp_path / "slow.json"
    card.write_text('{"gpu": "Slow", "tflop_per_s": 100, "tb_per_s": 1, "link_gb_per_s": 0.001}')
    assert (
        plan(
            "--gpus",
            "2",
            "train.micro_batch=32",
            "train.global_batch=64",
            "--gpu",
            str(card),
            "--json",
            str(tmp_path / "plan.json"),
        )
        == 0
    )
    cases = json.loads((tmp_path / "plan.json").read_text())["cases"]
    assert cases["planned"]["shown"] == cases["planned"]["sent"] > 0.9 * cases["planned"]["step"]


def test_an_unknown_card_has_flops_and_no_share_of_a_peak(tmp_path, capsys):
    card = tmp_path / "mine.json"
    card.write_text('{"gpu": "Mine", "tflop_per_s": 100, "tb_per_s": 1}')
    assert plan("--gpus", "1", "--gpu", str(card), "--json", str(tmp_path / "plan.json")) == 0
    said = capsys.readouterr().out
    assert "No share of the data sheet's rate (MFU): that of Mine is not known." in said
    assert "MFU, of" not in said and "model TFLOP/s of a GPU" in said and "No energy" in said
    case = json.loads((tmp_path / "plan.json").read_text())["cases"]["floor"]
    assert case["mfu"] is None and case["kwh"]["configured"] is None and case["flops_per_second"] > 0


def test_measured_ceilings_stand_beside_the_data_sheet_of_the_card_they_name():
    card = find_card(str(ROOT / "benchmarks" / "results" / "2026-11-27_h200" / "ceilings.json"))
    assert card.limits.products == pytest.approx(789.4e12, rel=1e-3) and card.limits.memory == pytest.approx(
        4.2385e12, rel=1e-3
    )
    assert card.sheet == (989e12, 4.8e12) and card.memory == 141e9


@pytest.mark.parametrize("name", table())
def test_every_number_of_the_table_names_its_source(name):
    entry = dict(table()[name])
    sources = entry.pop("sources")
    assert sources.keys() == entry.keys() - {"gpu"} and all(sources.values())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gpus", "0"], "--gpus is 0; it must be from 1 to 1,000,000"),
        (["--gpus", "4", "--nodes", "3"], "--nodes is 3; it must be at least 1 and divide --gpus 4"),
        (["--gpus", "1", "--gpu", "h1000"], "--gpu h1000: no such card and no such file; use one of h100, h200"),
        (["--gpus", "5"], "train.global_batch 32 does not divide over 5 ranks"),
        (["--gpus", "2"], "train.micro_batch 32 does not divide the 16 images"),
        (["--gpus", "1", "train.precision=fp32"], "the plan is of bf16 runs on GPUs, and this is none; add train.pre"),
        (["--gpus", "1", "run.device=cpu"], "the plan is of bf16 runs on GPUs, and this is none; add run.device=cuda"),
    ],
)
def test_what_no_run_could_have_is_one_line(arguments, line, capsys):
    assert plan(*arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and line in said[0]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{}", "lacks gpu, tflop_per_s, tb_per_s; it needs gpu"),
        ('{"gpu": "Mine", "tflop_per_s": 100}', "lacks tb_per_s; it needs gpu"),
        ('{"gpu": "Mine", "tflop_per_s": 0, "tb_per_s": 1}', "tflop_per_s is 0; it must be a number above 0"),
        ('{"gpu": "Mine", "tflop_per_s": 1, "tb_per_s": "1"}', "tb_per_s is '1'; it must be a number above 0"),
        ('{"gpu": 3, "tflop_per_s": 1, "tb_per_s": 1}', "gpu is 3; it must be the name of the card"),
        ("[]", "lacks an object; it needs gpu"),
        ("{", "no readable JSON file"),
    ],
)
def test_a_card_that_lacks_something_is_one_line(content, line, tmp_path, capsys):
    card = tmp_path / "card.json"
    card.write_text(content)
    assert plan("--gpus", "1", "--gpu", str(card)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and line in said[0] and "card.json" in said[0]


def test_a_dry_run_tells_the_hours(capsys):
    assert main(["train", DIGITS, "--dry-run", "run.device=auto", "train.precision=bf16"]) == 0
    assert re.search(r"^hours +[\d.]+ planned on 1 H100, .*modelled \(pixelgen plan\)$", capsys.readouterr().out, re.M)


def test_a_folder_is_no_file_to_write(tmp_path, capsys):
    for option in ("--json", "--html"):
        assert plan("--gpus", "1", option, str(tmp_path)) == 2
        assert f"{option} {tmp_path} is a folder" in capsys.readouterr().err
