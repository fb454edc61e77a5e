"""Every figure of one pass against torch-fidelity's own command, definitions and loops, with a random Inception and a
small DINOv2: the weights that the published figures need cannot be had here."""

import hashlib
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torch_fidelity
from einops import rearrange
from PIL import Image
from support.inception import network, write_inception
from support.teachers import write_teacher
from torch.utils.data import Dataset

from pixelgen_fast.dino.network import load_dino
from pixelgen_fast.eval.features import DINO as PUBLISHED
from pixelgen_fast.eval.features import INCEPTION, FeatureNetworks, resized_positions
from pixelgen_fast.eval.fid import evaluate_fid, write_statistics
from pixelgen_fast.eval.reference import read_reference

DINO = "vit_small_patch14_dinov2"


def draw(count: int, seed: int) -> torch.Tensor:
    """Smooth images of two tones with noise: their features differ more than those of noise alone."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3 + seed, 3 + seed, generator=g)
    x = F.interpolate(coarse, size=24, mode="bilinear") + 0.1 * torch.rand(count, 3, 24, 24, generator=g)
    return rearrange((x.clamp(0, 1) * 255).to(torch.uint8), "n c h w -> n h w c").contiguous()


class Images(Dataset):
    """As torch-fidelity takes images."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = rearrange(images, "n h w c -> n c h w")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images[i]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_inception(tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("dino") / "teacher", DINO)


@pytest.fixture(scope="module")
def sets():
    return draw(14, 1), draw(12, 2)


@pytest.fixture(scope="module")
def report(sets, weights, teacher):
    return evaluate_fid(*sets, weights=weights, dino=teacher, batch=7)


def test_one_pass_agrees_with_torch_fidelity(sets, weights, report):
    """FID, the Inception Score, precision and recall of calculate_metrics on the same images, to 1e-3."""
    wanted = torch_fidelity.calculate_metrics(
        input1=Images(sets[0]),
        input2=Images(sets[1]),
        isc=True,
        fid=True,
        prc=True,
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=8,
        feature_extractor=INCEPTION,
        feature_extractor_weights_path=str(weights),
    )
    assert report.left_out == ()
    assert report.fid == pytest.approx(wanted["frechet_inception_distance"], rel=1e-3)
    assert report.inception_score == pytest.approx(wanted["inception_score_mean"], rel=1e-3)
    assert report.inception_score_std == pytest.approx(wanted["inception_score_std"], rel=1e-3, abs=1e-6)
    assert report.precision == pytest.approx(wanted["precision"], abs=1e-3)
    assert report.recall == pytest.approx(wanted["recall"], abs=1e-3)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 sqrt(A B)), the last trace by the kernel trick: of fewer images than features it is
    the sum of the singular values of the centred features' products."""
    x, y = ((f - f.mean(0)) / math.sqrt(len(f) - 1) for f in (a, b))
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + (x**2).sum() + (y**2).sum() - 2 * cross)


def test_sfid_is_of_seven_channels_of_mixed_6(sets, weights, report):
    """The features against the branch that is the first of that block, run by hand; the distance by its definition."""
    inception = network(["2048"])
    seen = {}
    inception.Mixed_6d.branch1x1.register_forward_hook(lambda block, given, out: seen.update(out=out))
    found = []
    for images in sets:
        inception(rearrange(images, "n h w c -> n c h w"))
        found.append(rearrange(seen["out"][:, :7], "n c h w -> n (h w c)").double().numpy())
    networks = FeatureNetworks(weights=weights)
    np.testing.assert_allclose(networks(sets[0])["spatial"], found[0], rtol=1e-4, atol=1e-6)
    assert found[0].shape == (14, 17 * 17 * 7)
    assert report.sfid == pytest.approx(frechet(*found), rel=1e-3)


def test_precision_and_recall_by_loops(sets, weights, report):
    """A point is in a manifold where some ball of it, reaching to its third neighbour, holds the point."""
    networks = FeatureNetworks(weights=weights)
    a, b = (networks(images)["pool"].double().numpy() for images in sets)

    def share(points, manifold):
        radii = [sorted(np.linalg.norm(x - y) for y in manifold)[3] for x in manifold]
        inside = [
            any(np.linalg.norm(p - x) <= radius * (1 + 1e-5) for x, radius in zip(manifold, radii, strict=True))
            for p in points
        ]
        return np.mean(inside)

    assert report.precision == pytest.approx(share(a, b)) and report.recall == pytest.approx(share(b, a))


def test_dino_distance_by_its_definition(sets, teacher, report):
    """Class tokens of timm's own model at its own size, on images that PIL has resized channel by channel."""
    model = load_dino(DINO, str(teacher))
    table, before = model.pos_embed.detach().clone(), model.patch_embed.grid_size[0]
    model.set_input_size(img_size=(64, 64))
    model.pos_embed.data = resized_positions(table, before)
    mean, std = 255 * 0.4, 255 * 0.3
    tokens = []
    for images in sets:
        channels = [
            [np.asarray(Image.fromarray(c).resize((64, 64), Image.Resampling.BICUBIC)) for c in image]
            for image in rearrange(images, "n h w c -> n c h w").float().numpy()
        ]
        x = (torch.tensor(np.array(channels)) - mean) / std
        with torch.no_grad():
            tokens.append(model.eval().forward_features(x)[:, 0].double().numpy())
    assert report.fd_dinov2 == pytest.approx(frechet(*tokens), rel=1e-3)


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75."""
    d, a = abs(distance), -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def test_positions_are_resized_as_meta_does():
    """Bicubic interpolation at the places (k + 1/2) 37 / 16.1 - 1/2, by the kernel's formula; the class token stays."""
    table = torch.randn(1, 1 + 37**2, 2, generator=torch.Generator().manual_seed(0))
    found = resized_positions(table, 37)
    assert found.shape == (1, 257, 2) and torch.equal(found[:, 0], table[:, 0])
    grid, resized = table[0, 1:].view(37, 37, 2), found[0, 1:].view(16, 16, 2)
    for i, j in ((0, 0), (3, 11), (7, 8), (15, 1)):
        y, x = ((k + 0.5) * 37 / 16.1 - 0.5 for k in (i, j))
        wanted = sum(
            cubic(y - v) * cubic(x - u) * grid[min(max(v, 0), 36), min(max(u, 0), 36)]
            for v in range(int(y) - 1, int(y) + 3)
            for u in range(int(x) - 1, int(x) + 3)
        )
        torch.testing.assert_close(resized[i, j], wanted, atol=1e-4, rtol=1e-4)


def test_the_published_dino_is_taken_at_224_pixels():
    """On the meta device: 257 tokens of width 1024, from a table of 37 x 37."""
    with torch.device("meta"):
        model = timm.create_model(PUBLISHED, num_classes=0)
    assert model.pos_embed.shape == (1, 1 + 37**2, 1024) and model.patch_embed.patch_size == (14, 14)


def test_a_reference_file_holds_what_every_number_needs(sets, weights, teacher, tmp_path):
    """Moments of each kind of features, and the networks' checksums, by which a file of other networks is refused."""
    networks = FeatureNetworks(weights=weights, dino=teacher)
    write_statistics(sets[1], tmp_path / "real.npz", networks, batch=9)
    file = read_reference(tmp_path / "real.npz")
    for name, values in networks(sets[1]).items():
        if name != "logits":
            mean, covariance = file.moments[name]
            np.testing.assert_allclose(mean, values.double().mean(0), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(np.diag(covariance), values.double().var(0), rtol=1e-2, atol=1e-9)
    np.testing.assert_allclose(file.manifold, networks(sets[1])["pool"], rtol=1e-4, atol=1e-6)
    assert file.about["size"] == [24, 24] and file.about["count"] == 12
    assert file.about["inception_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert file.about["dino_sha256"] == hashlib.sha256((teacher / "model.safetensors").read_bytes()).hexdigest()
    torch.save(network(["64"]).state_dict() | {"fc.bias": torch.ones(1008)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"made with other weights of inception \(sha256 .* name their file"):
        evaluate_fid(sets[0], tmp_path / "real.npz", weights=tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"--dino .*none: no such file or folder"):
        FeatureNetworks(weights=weights, dino=tmp_path / "none")
