"""A comparison runs what is missing, reads what the runs left, and says what the numbers say."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pixelgen_fast.cli import main
from pixelgen_fast.compare import run, schema
from pixelgen_fast.compare.reading import Ground, read, versus
from pixelgen_fast.compare.results import LATENTS, PIECES, PIXELS, Judged, Spread, Variant, seconds
from pixelgen_fast.config import ConfigError
from pixelgen_fast.models import build_model

ROOT = Path(__file__).parents[2]

TINY = f"""
base: {ROOT}/configs/digits.yaml
seeds: [0, 1]
samples: 20
settings:
  model: {{hidden_size: 16, num_heads: 2, patch_depth: 1, pixel_depth: 1}}
  train: {{images: 128}}
  log: {{every_images: 64, tensorboard: false}}
  optimizer: {{warmup_images: 0}}
  sample: {{steps: 2, grid_classes: 2, grid_per_class: 2, grid_every_images: 0}}
variants:
  Plain: {{}}
  With frequencies:
    objective: {{frequency_weight: 1.0}}
quick:
  seeds: [3]
  settings:
    train: {{images: 64}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "compare.yaml"
    path.write_text(TINY + f"dir: {tmp_path / 'out'}\n")
    return path


@pytest.mark.parametrize("name", ["compare_digits", "compare_alignment"])
def test_every_shipped_variant_can_be_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that do not go together are refused by the system, not by its schema; those on a DINO need its files."""
    monkeypatch.chdir(ROOT)
    compare = schema.load(f"configs/{name}.yaml")
    plain = [variant for variant in compare.variants if not schema.needs(compare, variant)]
    assert plain
    for variant in plain:
        with torch.device("meta"):
            build_model(schema.run_config(compare, variant, 0), 10)


def test_runs_once_and_writes_a_page_that_needs_no_other_file(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two variants, one seed; a second call makes no run again and finds what the first left. One that is stopped in
    the seed after it has the page of the first."""
    assert main(["compare", str(config), "seeds=[1]"]) == 0
    page = (tmp_path / "out" / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # quality, the flow curves and two grids
    assert "One seed cannot tell a difference from chance." in page
    assert 'src="' in page and "http" not in page
    for name in ("plain", "with_frequencies"):
        folder = tmp_path / "out" / name / "seed1"
        report = json.loads((folder / "evaluation.json").read_text())["report"]
        assert f"{report['frechet_generated']:.1f}" in page
        assert report["generated"] == 20
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("evaluation.json")}
    assert main(["compare", str(config), "seeds=[1]"]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("evaluation.json")}
    assert "Plain" in (tmp_path / "out" / "page.md").read_text()
    (tmp_path / "out" / "page.html").unlink()
    train_and_judge = run._train_and_judge
    monkeypatch.setattr(run, "_train_and_judge", lambda *pair: pair[2] != 2 and train_and_judge(*pair))
    assert run.run(schema.load(config, ["seeds=[1,2]"])) is None
    assert "2 systems, 1 seed each" in (tmp_path / "out" / "page.html").read_text()


def test_quick_replaces_seeds_and_settings(config: Path) -> None:
    whole, quick = schema.load(config), schema.load(config, quick=True)
    assert (whole.seeds, quick.seeds) == ([0, 1], [3])
    assert schema.run_config(whole, "Plain", 0).train.images == 128
    made = schema.run_config(quick, "With frequencies", 3)
    assert made.train.images == 64 and made.objective.frequency_weight == 1.0 and made.run.seed == 3


def test_a_model_that_names_a_system_replaces_the_base(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(
        f"base: {ROOT}/configs/digits.yaml\nvariants:\n  JiT:\n"
        "    model: {system: jit, hidden_size: 16, num_heads: 2, depth: 2, patch_size: 4}\n"
    )
    assert schema.run_config(schema.load(path), "JiT", 0).model.system == "jit"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seedz: [1]", "seedz"),
        ("seeds: [1, 1]", r"each seed once; seeds \[1, 1\]"),
        ("variants: {A: {optimizer: {lrr: 1}}}", "variant 'A' .*did you mean optimizer.lr"),
        ("variants: {A b: {}, a-b: {}}", "two variants have the same"),
    ],
)
def test_refusals_name_the_key_or_the_variant(config: Path, tmp_path: Path, text: str, message: str) -> None:
    key = text.split(":")[0]
    kept = "\n".join(line for line in config.read_text().splitlines() if not line.startswith(f"{key}:"))
    if key == "variants":
        kept = kept.replace("  Plain: {}\n  With frequencies:\n    objective: {frequency_weight: 1.0}\n", "")
    path = tmp_path / "bad.yaml"
    path.write_text(f"{kept}\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        schema.load(path)


def test_a_run_that_fails_is_named_with_its_last_words(config: Path) -> None:
    compare = schema.load(config, ["settings.data.root=nowhere"])
    with pytest.raises(
        run.CompareError, match=r"(?s)pixelgen train .* ended with code 2; .*train\.log ends with.*nowhere"
    ):
        run.run(compare)


REAL = Ground({"classifier_accuracy": 0.95, "frechet_real": 12.0}, {})


def variant(
    name: str, frechet: tuple[float, ...], alignment: tuple[float, ...] = (), parameters: int = 10, kind: str = PIXELS,
    right: float = 1.0, took: float = 10.0, needs: tuple[str, ...] = (),
) -> Variant:  # fmt: skip
    def same(value: float) -> Spread:
        return Spread(tuple(value for _ in frechet))

    half = Judged(24, same(took / 2), same(right), Spread(tuple(2 * value for value in frechet)))
    return Variant(
        name=name, kind=kind, needs=needs, folders=(), rows=(),
        points=(half, Judged(48, same(took), same(right), Spread(frechet))), by_class={"0": 1.0, "1": right},
        flow=same(1.0), alignment=Spread(alignment), images_per_second=same(1.0), draw_ms=same(2.0),
        parameters=parameters,
    )  # fmt: skip


def test_a_difference_counts_when_every_seed_shows_it() -> None:
    base = Spread((20.0, 22.0, 24.0))
    lower, higher, mixed = Spread((19.0, 21.0, 23.0)), Spread((21.0, 23.0, 25.0)), Spread((19.0, 22.0, 25.0))
    assert versus(lower, base, ".1f") == "lower with every one of 3 seeds (21.0 against 22.0)"
    assert versus(higher, base, ".1f") == "higher with every one of 3 seeds (23.0 against 22.0)"
    assert versus(mixed, base, ".1f").startswith("lower with 1 and higher with 1 of 3 seeds")
    assert versus(base, base, ".1f").endswith("no clear difference")
    assert versus(Spread((1.0,)), Spread((2.0,)), ".1f") == "1.0 against 2.0 with one seed"


def test_the_reading_says_when_a_lower_alignment_loss_has_worse_pixels() -> None:
    base = variant("Base", (20.0, 20.0))
    repa, student = variant("REPA", (18.0, 19.0), (0.5, 0.5)), variant("Student", (25.0, 26.0), (0.2, 0.2), 20)
    said = dict(read([base, repa, student], REAL))
    (helps,), (lower,), (cost,) = (said[name] for name in (*said,)[-3:])
    assert "REPA against Base: Fréchet distance lower with every one of 2 seeds" in helps and "Student" not in helps
    assert "Student against REPA: alignment loss lower with every one of 2 seeds (0.200 against 0.500)" in lower
    assert "Fréchet distance higher with every one of 2 seeds (25.5 against 18.5)" in lower
    assert "right class lower with 0 and higher with 0 of 2 seeds" in lower
    assert "Student 1.00 ± 0.00 times its time an image in training, 1.00 ± 0.00 times in drawing, 2.00 times" in cost


DECODER = {"seconds": 7.0, "psnr": 21.0, "distribution": {"frechet_generated": 9.0, "share": 0.9}}


def test_the_reading_answers_by_what_was_judged() -> None:
    ground = Ground(REAL.real, {"teacher": {"seconds": 5.0}, "decoder": DECODER})
    base = variant("Base", (20.0, 20.0), right=0.8)
    quick = variant("Quick", (30.0, 31.0), took=4.0, parameters=20)
    rae = variant("RAE", (15.0, 25.0), kind=LATENTS, needs=("teacher", "decoder"), parameters=30)
    ar = variant("AR", (60.0, 61.0), kind=PIECES)
    said = dict(read([base, quick, rae, ar], ground))
    can, far, latent, pieces, *_ = said.values()
    assert "Of 3 systems that generate pixels, 2 draw" in can[0] and "with every seed: Quick, AR." in can[0]
    assert "lowest Fréchet distance is that of Base, 20.0 ± 0.0, the highest that of AR, 60.5 ± 0.5" in can[1]
    assert "Base is wrong only at 1; Quick is never wrong" in can[2]
    assert "after 24 images Base has the lowest, 40.0; after 48 images Base has the lowest, 20.0" in far[0]
    assert "Quick is through first, in 4 s; what had been judged by then was best with Quick, 30.5 after 48" in far[1]
    assert "no clear relation over 4 systems" in far[2]
    assert (
        "RAE against Base: Fréchet distance lower with 1 and higher with 1 of 2 seeds (20.0 against 20.0)" in latent[0]
    )
    assert (
        "a Fréchet distance of 9.0 from the real ones, and the judge finds their class in 90.0%, at 21.0 dB"
        in latent[2]
    )
    assert "RAE 22 s to train (teacher and decoder included) and 2.0 ± 0.0 ms to draw an image" in latent[3]
    assert "AR against Base: Fréchet distance higher with every one of 2 seeds" in pieces[0] and "decoder" not in str(
        pieces
    )


def test_seconds_of_training_are_those_of_its_rows() -> None:
    rows = [{"nimg": 10, "images_per_second": 5.0}, {"nimg": 30, "images_per_second": 10.0}]
    assert [seconds(rows, nimg) for nimg in (0, 10, 29, 30)] == [0, 2, 2, 4]


def test_spread() -> None:
    assert Spread((1.0, 2.0, 4.0)).text(".2f") == "2.33 ± 1.50"
    assert Spread((1.0,)).text(".1f") == "1.0" and Spread(()).text(".1f") == ""


def test_a_signal_is_passed_on_to_the_run_which_saves(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)"
    )

    def ask() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    with (tmp_path / "log").open("w") as out:
        assert run._finished([sys.executable, "-c", child], out) == 75
    asking.join()
