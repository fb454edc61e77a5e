"""FID and its companions through torch-fidelity, with a small extractor registered there and with its real Inception.

No weights are downloaded: the small extractor pools the pixels, and Inception is given random weights from a file.
"""

import hashlib
import sys
import tarfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from scipy.special import softmax
from support.inception import POOLED, PooledPixels, register_pooled
from torch_fidelity import feature_extractor_inceptionv3 as inception

from pixelgen_fast.data.crop import centre_crop
from pixelgen_fast.data.pack import pack
from pixelgen_fast.eval.features import INCEPTION, FeatureNetworks
from pixelgen_fast.eval.fid import check_reference, evaluate_fid, write_statistics
from pixelgen_fast.eval.frechet import frechet_distance


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_pooled()


def draw(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 120 + 60 * seed, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)


def pooled(images: torch.Tensor) -> np.ndarray:
    return rearrange(images.double(), "n (i h) (j w) c -> n (c i j) h w", i=2, j=2).mean(dim=(2, 3)).numpy()


def folder(path, images):
    for i, image in enumerate(images):
        (path / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(path / str(i % 2) / f"{i:03}.png")
    return path


def test_figures_against_their_definitions():
    """FID by our own Fréchet distance, the Inception Score by its formula over ten splits of a fixed permutation."""
    images, reference = draw(60, 1), draw(50, 2)
    report = evaluate_fid(images, reference, extractor=POOLED, batch=16)
    assert report.fid == pytest.approx(frechet_distance(pooled(images), pooled(reference)), rel=1e-5)
    p = softmax(pooled(images) / 20, axis=1)[np.random.RandomState(2020).permutation(60)]
    scores = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in np.split(p, 10)]
    assert report.inception_score == pytest.approx(np.mean(scores), rel=1e-5)
    assert report.inception_score_std == pytest.approx(np.std(scores), rel=1e-3)
    assert (report.generated_count, report.reference["count"]) == (60, 50)


def test_a_set_against_itself_and_against_a_far_one():
    images = draw(40, 1)
    same, far = (evaluate_fid(images, other, extractor=POOLED) for other in (images, images // 2 + 130))
    assert abs(same.fid) < 1e-2 and same.precision == same.recall == 1
    assert far.fid > 1e4 and far.precision == far.recall == 0


def test_folder_and_statistics_file_give_the_same_fid(tmp_path):
    """The file stands for the folder, and the report names it with crop, count and checksum beside each number."""
    images, reference = draw(40, 1), draw(50, 2)
    in_folder = folder(tmp_path / "real", reference)
    file = tmp_path / "real.npz"
    write_statistics(in_folder, file, FeatureNetworks(POOLED))
    expected = evaluate_fid(images, reference, extractor=POOLED)
    of_folder = evaluate_fid(folder(tmp_path / "drawn", images), in_folder, extractor=POOLED)
    of_file = evaluate_fid(images, file, extractor=POOLED)
    assert of_folder.fid == pytest.approx(expected.fid, rel=1e-9)
    assert (of_folder.precision, of_folder.recall) == (expected.precision, expected.recall)
    assert of_file.fid == pytest.approx(expected.fid, rel=1e-9)
    assert (of_file.precision, of_file.recall) == (expected.precision, expected.recall)
    pixels = hashlib.sha256(np.stack([np.asarray(Image.open(p)) for p in sorted(in_folder.rglob("*.png"))]).tobytes())
    beside = f"40 images against 50 images of real (real.npz), not cropped, sha256 {pixels.hexdigest()[:16]}"
    lines = of_file.lines()
    for name in ("FID", "precision", "recall"):
        assert next(line for line in lines if line.startswith(name)).endswith(beside)
    assert f"reference  {beside.removeprefix('40 images against ')}" in lines
    assert "sFID is left out: this extractor has no block mixed_6" in lines and POOLED in "".join(lines)
    assert "FD-DINOv2 is left out: --dino names no file of DINOv2 ViT-L/14" in lines
    assert set(of_file.as_dict()) >= {"fid", "inception_score", "reference", "extractor"}


def test_a_file_with_moments_alone_gives_their_numbers(tmp_path):
    """As others write them: precision and recall are left out with the reason, and count and crop are unstated."""
    images, real = draw(40, 1), pooled(draw(50, 2))
    np.savez(tmp_path / "adm.npz", mu=real.mean(0), sigma=np.cov(real.T))
    report = evaluate_fid(images, tmp_path / "adm.npz", extractor=POOLED)
    assert report.fid == pytest.approx(frechet_distance(pooled(images), real), rel=1e-5)
    assert report.precision is None and report.recall is None
    text = "\n".join(report.lines())
    digest = hashlib.sha256((tmp_path / "adm.npz").read_bytes()).hexdigest()[:16]
    assert f"an unstated number of images of adm.npz, crop unstated, sha256 {digest}" in text
    assert "precision and recall are left out: adm.npz holds no features of single images" in text


def test_inception_reads_its_weights_from_a_file(tmp_path, monkeypatch):
    """The real network, with random weights: statistics have its 2048 features. Other files are refused by name."""
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = inception.FeatureExtractorInceptionV3(INCEPTION, ["2048"])
    weights = tmp_path / inception.URL_INCEPTION_V3.rsplit("/", 1)[1]
    torch.save(network.state_dict(), weights)
    write_statistics(draw(10, 1), tmp_path / "stats.npz", FeatureNetworks(weights=weights))
    file = np.load(tmp_path / "stats.npz")
    expected = network(rearrange(draw(10, 1), "n h w c -> n c h w"))[0].double()
    assert file["sigma"].shape == (2048, 2048)
    np.testing.assert_allclose(file["mu"], expected.mean(0), rtol=1e-4, atol=1e-6)

    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold the weights of inception-v3-compat"):
        evaluate_fid(draw(10, 1), draw(10, 2), weights=tmp_path / "other.pth")
    torch.save(PooledPixels("code", ["pool"]), tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth is not a file of tensors; get"):
        evaluate_fid(draw(10, 1), draw(10, 2), weights=tmp_path / "code.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth do not exist; get them from https://"):
        evaluate_fid(draw(10, 1), draw(10, 2), weights=tmp_path / "nowhere.pth")


def test_without_network_the_fix_is_named(monkeypatch):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(inception, "load_state_dict_from_url", offline)
    with pytest.raises(ConnectionError, match=r"cannot download.*weights-inception-2015-12-05-6726825d\.pth.*weights="):
        evaluate_fid(draw(10, 1), draw(10, 2))


def test_without_torch_fidelity_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pip install 'pixelgen_fast\[eval\]'"):
        evaluate_fid(draw(10, 1), draw(10, 2))


def test_a_reference_is_checked_before_images_are_drawn(tmp_path):
    """What evaluate_fid refuses about its reference or weights, without images; a good reference passes in silence."""
    networks = FeatureNetworks(POOLED)
    for reference, error in {"none.npz": "none\\.npz does not exist", "folder": "is not a folder of images"}.items():
        with pytest.raises(FileNotFoundError, match=error):
            check_reference(tmp_path / reference, networks)
    check_reference(draw(10, 1), networks)
    write_statistics(draw(10, 1), tmp_path / "s.npz", networks)
    check_reference(tmp_path / "s.npz", networks, size=8)
    with pytest.raises(ValueError, match=r"s\.npz\) is of images of 8 x 8 pixels, and these have 16 x 16"):
        check_reference(tmp_path / "s.npz", networks, size=16)


def as_webp(path, images):
    for name in folder(path, images).rglob("*.png"):
        Image.open(name).save(name.with_suffix(".webp"), lossless=True)
        name.unlink()
    return path


def as_links(path, images):
    path.mkdir()
    for entry in folder(path.with_name("store"), images).iterdir():
        (path / entry.name).symlink_to(entry)
    (path / "1" / "@eaDir").mkdir()
    Image.new("RGB", (3, 3)).save(path / "1" / "@eaDir" / "thumb.png")
    return path


def as_packed(path, images):
    pack(folder(path.with_name("unpacked"), images), path, 8)
    return path


def as_tar(path, images):
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        archive.add(folder(path, images), ".")
    return path.with_suffix(".tar")


@pytest.mark.parametrize("form", [as_webp, as_links, as_packed, as_tar])
def test_a_reference_may_be_whatever_training_reads(tmp_path, monkeypatch, form):
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "cache"))
    images, reference = draw(40, 1), draw(50, 2)
    path = form(tmp_path / "real", reference)
    check_reference(path, FeatureNetworks(POOLED), size=8)
    report = evaluate_fid(images, path, extractor=POOLED)
    assert report.reference["count"] == 50
    assert report.fid == pytest.approx(evaluate_fid(images, reference, extractor=POOLED).fid, rel=1e-9)


def test_a_reference_of_photographs_is_cropped_as_for_training(tmp_path):
    images, path = draw(12, 1), tmp_path / "photos" / "a"
    path.mkdir(parents=True)
    for k in range(12):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (20 + k, 30, 3), dtype=np.uint8)).save(
            path / f"{k:02}.png"
        )
    check_reference(path.parent, FeatureNetworks(POOLED), size=8)
    cropped = torch.from_numpy(np.stack([np.asarray(centre_crop(Image.open(p), 8)) for p in sorted(path.iterdir())]))
    report = evaluate_fid(images, path.parent, extractor=POOLED)
    assert report.fid == pytest.approx(evaluate_fid(images, cropped, extractor=POOLED).fid, rel=1e-9)
    assert "of photos, crop adm to 8, sha256" in report.lines()[0]


def test_an_unreadable_image_of_a_reference_is_found_before_images_are_drawn(tmp_path):
    path = folder(tmp_path / "real", draw(12, 1))
    (path / "1" / "007.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1/007\.png of .*the file is empty"):
        check_reference(path, FeatureNetworks(POOLED), size=8)


def test_bad_input_is_named(tmp_path):
    images = draw(12, 1)

    def against(reference, images=images, **arguments):
        return evaluate_fid(images, reference, **({"extractor": POOLED} | arguments))

    with pytest.raises(ValueError, match=r"images must be uint8 \[N, H, W, 3\], got torch.float32"):
        against(images, images.float())
    with pytest.raises(ValueError, match=r"at least 10 images are needed.*found 3"):
        against(images[:3])
    with pytest.raises(FileNotFoundError, match="is not a folder of images"):
        against(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"statistics file .*none\.npz does not exist"):
        against(tmp_path / "none.npz")
    np.savez(tmp_path / "arr.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds \['arr_0'\]; a statistics file needs mu and sigma"):
        against(tmp_path / "arr.npz")
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.zeros(3))
    with pytest.raises(ValueError, match=r"sigma \[D, D\], got \[3\] and \[3\]"):
        against(tmp_path / "bad.npz")
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="holds 2048 features, pooled-pixels layer pool has 12"):
        against(tmp_path / "wide.npz")
    with pytest.raises(ValueError, match=r"'resnet' is unknown; torch-fidelity has .*inception-v3-compat"):
        against(images, extractor="resnet")
    mixed = folder(tmp_path / "mixed", images)
    Image.new("RGB", (9, 9)).save(mixed / "0" / "big.png")
    for look in (lambda: against(images, mixed), lambda: check_reference(mixed, FeatureNetworks(POOLED))):
        with pytest.raises(ValueError, match="images must have one size, found 8x8, 9x9"):
            look()
    with pytest.raises(ValueError, match=r"a statistics file is named \.npz"):
        write_statistics(images, tmp_path / "stats.pt", FeatureNetworks(POOLED))
