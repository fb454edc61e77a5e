"""`pixelgen data reference`: the same from a folder, packed data and tars, whole or not at all, and what it says."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.inception import POOLED, register_pooled

from pixelgen_fast.cli import main
from pixelgen_fast.data.crop import centre_crop
from pixelgen_fast.eval import features, reference
from pixelgen_fast.eval.features import FeatureNetworks
from pixelgen_fast.eval.fid import evaluate_fid
from pixelgen_fast.eval.reference import read_reference


@pytest.fixture(autouse=True)
def pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    register_pooled()
    monkeypatch.setattr(features, "FeatureNetworks", lambda **given: FeatureNetworks(POOLED, **given))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(24):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (18 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return tmp_path / "photos"


def make(root: Path, out: Path, *options: str) -> list[str]:
    return ["data", "reference", str(root), str(out), "--size", "8", "--device", "cpu", *options]


def test_folder_packed_and_tar_give_one_reference(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Moments, features and checksum are of the pixels as they are judged, wherever they lie."""
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "cache"))
    assert main(["data", "pack", str(root), str(tmp_path / "packed"), "--size", "8"]) == 0
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(root, ".")
    found = []
    for kind in (root, tmp_path / "packed", tmp_path / "photos.tar"):
        out = tmp_path / f"{kind.name}.npz"
        assert main(make(kind, out)) == 0
        found.append(read_reference(out))
        assert f"24 images of {kind.name}, crop adm to 8, sha256 " in capsys.readouterr().out
    assert len({file.about["sha256"] for file in found}) == 1
    for file in found[1:]:
        np.testing.assert_array_equal(file.moments["pool"][1], found[0].moments["pool"][1])
        assert torch.equal(file.manifold, found[0].manifold)
    crops = [np.asarray(centre_crop(Image.open(p), 8)) for p in sorted(root.rglob("*.png"))]
    images = torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8)
    direct = evaluate_fid(images, torch.from_numpy(np.stack(crops)), extractor=POOLED)
    by_file = evaluate_fid(images, tmp_path / "photos.npz", extractor=POOLED)
    for name in ("FID", "IS", "precision", "recall"):
        assert by_file.figures()[name] == pytest.approx(direct.figures()[name], rel=1e-6), name


def test_features_of_many_images_are_spread_evenly(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 images, 7 are kept, every third or fourth; the count for precision and recall is theirs."""
    monkeypatch.setattr(reference, "MANIFOLD", 7)
    assert main(make(root, tmp_path / "real.npz")) == 0
    file = read_reference(tmp_path / "real.npz")
    crops = [np.asarray(centre_crop(Image.open(p), 8)) for p in sorted(root.rglob("*.png"))]
    whole = FeatureNetworks(POOLED)(torch.from_numpy(np.stack(crops)))["pool"]
    assert torch.allclose(file.manifold, whole[[0, 3, 6, 10, 13, 17, 20]])
    lines = evaluate_fid(torch.from_numpy(np.stack(crops)), tmp_path / "real.npz", extractor=POOLED).lines()
    assert "against 24 images of photos" in lines[0]
    assert next(line for line in lines if line.startswith("recall")).count("against 7 images of photos") == 1


def test_what_cannot_be_read_leaves_no_file(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "a" / "00.png").write_bytes(b"")
    assert main(make(root, tmp_path / "real.npz")) == 2
    assert "a/00.png of" in capsys.readouterr().err
    assert main(make(root, tmp_path / "real.pt")) == 2
    assert "a statistics file is named .npz" in capsys.readouterr().err
    assert main([*make(root, tmp_path / "real.npz")[:4], "--size", "0"]) == 2
    assert "--size is 0" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_images_of_another_size_are_not_cropped_unasked(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(make(root, tmp_path / "real.npz", "--crop", "none")) == 2
    assert "images must have one size" in capsys.readouterr().err


def test_a_reference_that_is_there_stays(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It may be a published one."""
    (tmp_path / "real.npz").write_bytes(b"of others")
    assert main(make(root, tmp_path / "real.npz")) == 2
    assert "real.npz exists; name another file" in capsys.readouterr().err
    assert (tmp_path / "real.npz").read_bytes() == b"of others"
