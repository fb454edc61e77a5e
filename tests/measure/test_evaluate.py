"""`pixelgen evaluate`: one set of images, stopped and gone on with, and what stands beside its numbers."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from support.inception import POOLED, register_pooled
from support.runs import train

from pixelgen_fast.cli import main
from pixelgen_fast.data.roots import open_root
from pixelgen_fast.eval.features import FeatureNetworks
from pixelgen_fast.eval.fid import evaluate_fid
from pixelgen_fast.measure import judges
from pixelgen_fast.measure.evaluate import choose_labels, labels_in_words
from pixelgen_fast.measure.parts import Parts
from pixelgen_fast.runs import draw
from pixelgen_fast.signals import Stopped


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(train(folder, 16, "optimizer.warmup_images=0", "model.patch_depth=1")) == 0
    return folder


@pytest.fixture
def pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge by pooled pixels: what is tested does not depend on the features."""
    register_pooled()
    small = lambda weights, dino, device: FeatureNetworks(POOLED, weights, dino, device)  # noqa: E731
    monkeypatch.setattr(judges, "FeatureNetworks", small)


def test_a_stopped_evaluation_goes_on_to_the_same_report(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = ["evaluate", str(run), "--samples", "20", "--batch", "6", "--out"]
    assert main([*command, str(tmp_path / "whole.json")]) == 0
    write, written = Parts.write, []

    def stopped(self: Parts, batch: int, *rest: object) -> None:
        if len(written) == 2:
            raise Stopped("SIGTERM")
        written.append(batch)
        write(self, batch, *rest)

    monkeypatch.setattr(Parts, "write", stopped)
    (tmp_path / "broken").mkdir()
    assert main([*command, str(tmp_path / "broken" / "e.json")]) == 75
    assert written == [0, 1] and not (tmp_path / "broken" / "e.json").exists()
    monkeypatch.setattr(Parts, "write", lambda self, batch, *rest: (written.append(batch), write(self, batch, *rest)))
    assert main([*command, str(tmp_path / "broken" / "e.json")]) == 0
    assert written == [0, 1, 2, 3] and "2 of 4 batches are there" in capsys.readouterr().out
    whole, broken = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "broken/e.json"))
    assert whole | {"drawing": 0} == broken | {"drawing": 0}
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["e.json"], "nothing else is left"


def test_every_number_is_of_one_set_of_images(
    run: Path, tmp_path: Path, pooled: None, capsys: pytest.CaptureFixture
) -> None:
    """The figures of the images that `draw` gives, against the digits as a reference, by whatever way it is named."""
    labels = torch.arange(30) % 10
    images = draw.load(run).draw(labels)
    root = open_root("digits").root
    wanted = evaluate_fid(images, root, extractor=POOLED).figures()
    command = ["evaluate", str(run), "--samples", "30", "--reference", str(root), "--out", str(tmp_path / "e.json")]
    assert main(command) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "e.json").read_text())
    names = {"FID": "fid", "IS": "inception_score", "precision": "precision", "recall": "recall"}
    for name, key in names.items():
        assert found["report"][key] == pytest.approx(wanted[name], rel=1e-6), name
    for name in ("FID", "precision", "recall"):
        line = next(line for line in said.splitlines() if line.startswith(name))
        assert "30 images against 1,797 images of digits, crop adm to 16, sha256 " in line
    assert found["images"] == {"count": 30, "labels": "30 images, 3 of each class", "rounding": judges.ROUNDING}
    assert "3 of each class; uint8 = 127.5 (x + 1), rounded to the nearest whole number" in said


def test_numbers_are_rounded_as_the_report_says() -> None:
    """127.5 (x + 1), to the nearest whole number and not below it, in [0, 255]."""
    x = torch.linspace(-1.2, 1.2, 3 * 997).view(1, 3, 1, 997)
    found = draw.to_uint8(x).numpy().transpose(0, 3, 1, 2)
    wanted = np.clip(np.floor(127.5 * (x.double().numpy() + 1) + 0.5), 0, 255)
    assert np.mean(found == wanted) > 0.999 and np.abs(found - wanted).max() <= 1  # float32 at the halves


@pytest.mark.parametrize("count", [20, 23, 7])
def test_labels_are_balanced(count: int) -> None:
    shares = Counter(choose_labels(count, 10, "balanced").tolist())
    assert max(shares.values()) - min([shares[c] for c in range(10)]) <= 1 and sum(shares.values()) == count


def test_labels_in_words() -> None:
    assert labels_in_words(23, 10, "balanced") == "23 images, 2 of each class and one more of 3"
    assert labels_in_words(23, 10, "random") == "23 images, classes at random"
    at_random = choose_labels(10_000, 10, "random")
    counts = torch.bincount(at_random, minlength=10)
    assert (counts - 1000).abs().max() < 180 and counts.unique().numel() > 1  # six standard deviations of 30


def test_what_does_not_fit_is_named(run: Path, tmp_path: Path, pooled: None, capsys: pytest.CaptureFixture) -> None:
    def refused(*options: str) -> str:
        assert main(["evaluate", str(run), *options]) == 2
        return capsys.readouterr().err

    assert "none.npz does not exist; `pixelgen data reference ROOT" in refused(
        "--reference", str(tmp_path / "none.npz")
    )
    (tmp_path / "bad.npz").write_bytes(b"PK\3\4")
    assert "bad.npz is no .npz file that can be read" in refused("--reference", str(tmp_path / "bad.npz"))
    assert "is not a folder of images" in refused("--reference", str(tmp_path / "none"))
    assert "--samples is 1" in refused("--samples", "1")
    assert f"--out {tmp_path} is a folder" in refused("--out", str(tmp_path))
    few = refused("--samples", "9", "--reference", str(tmp_path / "none.npz"))
    assert "--samples is 9; the Inception Score needs at least 10 images" in few
