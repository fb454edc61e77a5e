"""The page of a run: it holds all that it shows, at any time of the run, and works in a browser."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from support.browser import opened, overflow
from support.runs import train

from pixelgen_fast.cli import main
from pixelgen_fast.runs.folder import RunFolder

GRIDS = ("sample.grid_every_images=32", "sample.grid_per_class=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """96 images in two parts, a grid every 32."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    for images in (64, 96):
        assert main(train(folder, images, "optimizer.warmup_images=0", *GRIDS)) == 0
    return RunFolder(folder)


def content(page: Path) -> dict:
    """The data of a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def test_a_run_ends_with_its_page(run: RunFolder) -> None:
    data, rows = content(run.report), [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert data["columns"]["nimg"] == [row["nimg"] for row in rows] == list(range(16, 97, 16))
    assert data["columns"]["loss"] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    assert data["events"] == [[64, "resumed"]]
    assert [grid["nimg"] for grid in data["grids"]] == [32, 64, 96]
    assert not [name for row in rows for name in row if name == "begun_at" or name.endswith("_seconds")]
    drawn = {row["nimg"]: row["drawing_seconds"] for row in map(json.loads, run.pauses.read_text().splitlines())}
    assert drawn[48] > 0 and drawn[32] == 0  # the grid of image 32 is drawn after its row


def test_a_page_needs_no_other_file(run: RunFolder) -> None:
    text = run.report.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\((?!#)|@import|https?://""", text)
    assert "{{" not in text


def test_the_command_writes_it_during_a_run_and_after_an_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "r")
    folder.root.mkdir()
    assert main(["report", str(folder.root)]) == 2 and "holds no metrics.jsonl" in capsys.readouterr().err
    folder.metrics.write_text('{"nimg": 16, "loss": null, "images_per_second": 5.0}\n{"nimg": 32, "lo')
    with pytest.warns(UserWarning, match="unreadable"):
        assert main(["report", str(folder.root), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "Not evaluated yet" in text and "no config.yaml" in text and not folder.report.exists()
    folder.evaluation.write_text('{"report": {"share": 0.61, "per_class": {"<b>": 0.25}}, "settings": {"steps": 20}}')
    with pytest.warns(UserWarning, match="unreadable"):
        assert main(["report", str(folder.root)]) == 0
    assert "<td>share</td><td>0.61</td>" in folder.report.read_text() and "&lt;b&gt;: 0.25" in folder.report.read_text()


def test_a_sweep_is_on_the_page_and_one_that_is_cut_short_is_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"nimg": 16, "loss": 1.0}\n')
    points = [
        {"point": {"guidance": 1.5, "interval": None}, "figures": {"right class": 0.25}},
        {"point": {"guidance": 2.0, "interval": [0.1, 1.0]}, "figures": {"right class": 0.75, "FID": None}},
    ]
    text = json.dumps({"points": points})
    for given, shown in ((text, True), (text[:40], False), ('{"points": [1, {"point": 2}]}', False)):
        folder.sweep.write_text(given)
        assert main(["report", str(tmp_path)]) == 0
        page = folder.report.read_text()
        assert ("<td>2</td><td>0.1, 1</td><td>0.75</td><td>none</td>" in page) is shown
        assert ("Not evaluated yet" in page) is not shown
    folder.sweep.write_text(text)
    Image.new("RGB", (3, 2)).save(folder.sweep_picture)
    assert main(["report", str(tmp_path)]) == 0
    assert '<img class="sweep" alt="the same, drawn" src="data:image/png;base64,' in folder.report.read_text()


@pytest.mark.browser
def test_a_single_value_is_a_dot(tmp_path: Path) -> None:
    lines = [{"nimg": n, "loss": 1.0 / n} | ({"validation_loss": 0.5} if n == 96 else {}) for n in range(16, 97, 16)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(tmp_path)]) == 0
    with opened(RunFolder(tmp_path).report.resolve().as_uri()) as page:
        page.evaluate("const s = document.getElementById('smooth'); s.value = 0; s.dispatchEvent(new Event('input'))")
        dots = page.evaluate("[...document.querySelectorAll('.chart')].map((c) => c.querySelectorAll('circle').length)")
        assert dots == [0, 1]


def test_bad_paths_are_a_line(tmp_path: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none")]) == 2 and "no such folder" in capsys.readouterr().err
    assert main(["report", str(run.root), "--out", str(tmp_path)]) == 2 and "--out names" in capsys.readouterr().err


def test_values_of_other_types_are_none(tmp_path: Path) -> None:
    row = {"nimg": 64, "loss": "x", "images_per_second": "y", "begun_at": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"nimg": 32, "loss": 1.0}) + "\n" + json.dumps(row) + "\n")
    assert main(["report", str(tmp_path)]) == 0 and RunFolder(tmp_path).report.is_file()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 800])
def test_curves_zoom_and_the_slider_shows_each_grid(run: RunFolder, width: int) -> None:
    with opened(run.report.resolve().as_uri(), width) as page:
        assert overflow(page) == 0
        assert page.locator(".chart").count() == len(content(run.report)["panels"])
        view = lambda: page.evaluate("[view.low, view.high]")  # noqa: E731
        assert view() == [16, 96]
        box = page.locator(".chart svg").first.bounding_box()
        middle = (box["x"] + box["width"] / 2, box["y"] + 60)
        page.mouse.move(*middle)
        page.mouse.wheel(0, -300)
        page.wait_for_function("view.high - view.low < 60")
        assert "image 48" in page.locator(".chart .keys").first.inner_text()
        page.mouse.dblclick(*middle)
        assert view() == [16, 96]
        page.mouse.down()
        page.mouse.move(middle[0] + 100, middle[1])
        page.mouse.up()
        low, high = view()
        # the axes begin 64 pixels from the left of a chart and end 12 from its right
        assert low == pytest.approx(16 + 80 * (box["width"] / 2 - 64) / (box["width"] - 76), abs=1) and low < high < 96
        page.locator("#reset").click()
        assert view() == [16, 96]
        page.locator("#which").fill("0")
        assert page.locator("#when").inner_text() == "image 32"
        size = page.evaluate("document.getElementById('grid').naturalWidth")
        assert size == Image.open(run.samples(32)).size[0]


@pytest.mark.browser
def test_a_logarithmic_axis(run: RunFolder) -> None:
    with opened(run.report.resolve().as_uri()) as page:
        chart = page.locator(".chart").first
        before = chart.locator("path.mean").get_attribute("d")
        chart.get_by_role("button", name="log").click()
        assert chart.locator("path.mean").get_attribute("d") != before and "NaN" not in chart.inner_html()
