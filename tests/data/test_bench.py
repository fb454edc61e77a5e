"""The comparison of loaders: a real one of the smallest size, and what is made of its numbers."""

import math
import os

import numpy as np
import pytest
from PIL import Image

from pixelgen_fast import commands
from pixelgen_fast import config as cfg
from pixelgen_fast.cli import main
from pixelgen_fast.data import bench as bench_file
from pixelgen_fast.data.bench import BenchReport, Row, bench
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.pack import pack
from pixelgen_fast.models import model_schema


def row(provider, cores, rates, busy=None, absent=""):
    return Row(provider, cores, rates, busy or rates, absent)


REPORT = BenchReport(
    root="/images",
    size=256,
    images=1000,
    mean_bytes=65_432.1,
    rows=[
        row("loader", 1, [100.0, 90.0, 110.0]),
        row("torchvision v2", 1, [50.0, 30.0, 220.0]),
        row("DALI's file reader", 1, [120.0, 108.0, 132.0]),
        row("loader", 2, [180.0, 200.0, 220.0], [100.0, 100.0, 110.0]),
        row("torchvision v2", 2, [], absent="ModuleNotFoundError: torchvision\nmore"),
        row("DALI's file reader", 2, [100.0, 100.0, 100.0]),
    ],
    total=16,
    per_gpu=450.0,
)


def test_a_report_has_medians_spread_and_the_ratio_of_the_turns():
    lines = REPORT.lines()
    assert lines[0] == "/images: 1,000 of its images, 65.4 kB each, to 256 pixels"
    assert lines[3] == "| loader | 1 | 100 | 90 to 110 | 100 | 100 | 1.00 |"
    assert lines[4] == "| torchvision v2 | 1 | 50 | 30 to 220 | 50 | 50 | 2.00 |"
    assert lines[6] == "| loader | 2 | 200 | 180 to 220 | 100 | 100 | 1.00 |"
    assert lines[7] == "| torchvision v2 | 2 | none: ModuleNotFoundError: torchvision |  |  |  |  |"
    assert lines[9] == "below the floor of 0.9 times DALI's file reader on 1 cores: 0.83"


def test_the_verdict_counts_gpus_and_says_when_the_machine_was_busy():
    # 100 images/s of a core, 16 cores, 450 a GPU: 3.56
    verdict = "16 cores at 100 images/s feed 3 GPUs at 450 images/s each (3.56); one of them needs 4.5 cores"
    assert REPORT.verdict() == verdict
    rows = [row("loader", 2, [200.0], [400.0])]
    assert BenchReport("/", 8, 1, 1.0, rows, 16, 450.0).verdict() == (
        f"{verdict}. The machine was busy: the loader had 25% of its cores"
    )
    with pytest.raises(ValueError, match="the loader gave nothing: OSError: x"):
        BenchReport("/", 8, 1, 1.0, [row("loader", 1, [], absent="OSError: x")], 16, 450.0).lines()


@pytest.fixture(scope="module")
def photos(tmp_path_factory, make_photo):
    """Nine images in three forms, and one that is none."""
    root = tmp_path_factory.mktemp("photos")
    for k, form in enumerate(["jpg", "png", "webp"] * 3):
        (root / f"class {k % 2}").mkdir(exist_ok=True)
        Image.fromarray(make_photo(40, 50, k)).save(root / f"class {k % 2}" / f"{k}.{form}")
    (root / "class 0" / "broken.jpg").write_bytes(b"no image")
    return root


def test_providers_take_turns_on_the_same_files(photos):
    names = ("loader", "torchvision v2, decode_jpeg", "DALI's file reader", "no such")
    report = bench(open_index(photos), 32, per_gpu=10, cores=(1, 1000), turns=2, seconds=0.05, batch=4, providers=names)
    assert report.images == 9 and report.total == len(os.sched_getaffinity(0))
    assert [(r.provider, r.cores) for r in report.rows] == [(name, 1) for name in names]
    for measured in report.rows[:3]:
        assert not measured.absent and len(measured.rates) == 2 and 0 < min(measured.rates) < math.inf
    assert "KeyError" in report.rows[3].absent and report.rows[3].ratio(report.rows[0]) is None
    assert "GPUs at 10 images/s each" in report.lines()[-1]


@pytest.mark.parametrize("changes, name", [({"per_gpu": 0}, "per_gpu 0"), ({"seconds": math.nan}, "seconds nan"),
                                           ({"turns": -1}, "turns -1"), ({"images": 0}, "images 0")])  # fmt: skip
def test_impossible_numbers_are_refused(photos, changes, name):
    with pytest.raises(ValueError, match=f"{name} must be above 0"):
        bench(open_index(photos), 32, **({"per_gpu": 450} | changes))


def test_cores_that_there_are_not_are_refused(photos):
    with pytest.raises(ValueError, match=r"cores 0, 100000: this process may use 1 to \d+"):
        bench(open_index(photos), 32, per_gpu=450, cores=(0, 100_000))


def test_nothing_to_decode_is_refused(photos, tmp_path):
    pack(photos, tmp_path / "packed", 16)
    with pytest.raises(ValueError, match="is packed: nothing is decoded there"):
        bench(open_index(tmp_path / "packed"), 16, per_gpu=450)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 images of .*bad can be read"):
        bench(open_index(tmp_path / "bad"), 16, per_gpu=450)


def test_the_command_takes_a_root_or_a_configuration(photos, monkeypatch, capsys):
    asked = []

    def recorded(index, size, *, per_gpu, cores, turns, seconds, images):
        assert cores == [1, 2]
        asked.append((len(index), size, round(per_gpu), turns, seconds, images))
        return REPORT

    monkeypatch.setattr(bench_file, "bench", recorded)
    config = "configs/pixeldit_xl_256.yaml"
    assert main(["data", "bench", str(photos), "--turns", "2"]) == 0
    assert main(["data", "bench", config, "--images", "7", f"data.root={photos}"]) == 0
    assert main(["data", "bench", config, f"data.root={photos}", "--size", "64", "--per-gpu", "99"]) == 0
    assert "| loader | 1 | 100 |" in capsys.readouterr().out
    # PixelDiT-XL takes 311.19 GFLOPs an image, three times that in training
    per_gpu = round(0.43 * 989e12 / (3 * 311.19e9))
    assert asked == [(10, 256, 450, 2, 1.0, 1024), (10, 256, per_gpu, 5, 1.0, 7), (10, 64, 99, 5, 1.0, 1024)]
    assert main(["data", "bench", str(photos), "data.root=x"]) == 2
    assert "overrides go with a configuration" in capsys.readouterr().err


def test_what_a_model_trains_is_told_from_its_flops():
    small, large = (cfg.load(f"configs/pixeldit_{name}_256.yaml", [], model_schema) for name in ("b", "xl"))
    rates = np.array([commands._trained(small), commands._trained(large)])
    assert rates / rates[1] == pytest.approx([311.19 / 75.43, 1], rel=0.01)
