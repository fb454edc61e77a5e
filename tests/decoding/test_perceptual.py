"""LPIPS by its formula on torchvision's VGG-16, weights from a file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from support.golden import relative

from pixelgen_fast.decoding.perceptual import Perceptual
from pixelgen_fast.errors import InputError

TAPS = (3, 8, 15, 22, 29)  # relu1_2, 2_2, 3_3, 4_3, 5_3 among VGG-16's layers


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(3)
    network = torchvision.models.vgg16()
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({name: v for name, v in network.state_dict().items() if name.startswith("features.")}, path)
    return path, network


def test_it_is_the_published_distance(vgg: tuple[Path, torch.nn.Module]) -> None:
    path, network = vgg
    perceptual = Perceptual(str(path))
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    heads = [p for name, p in perceptual.network.named_parameters() if name.startswith("lin") and name.count(".") == 3]
    maps = []
    for x in (a, b):
        h, found = ((x - shift[:, None, None]) / scale[:, None, None]).double(), []
        for number, layer in enumerate(network.features.double()):
            h = layer(h)
            if number in TAPS:
                found.append(h / (h.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        maps.append(found)
    parts = [(w.double() * (x - y).square()).sum(dim=1).mean(dim=(1, 2)) for w, x, y in zip(heads, *maps, strict=True)]
    assert [len(w.flatten()) for w in heads] == [64, 128, 256, 512, 512]
    assert relative(perceptual(a, b), sum(parts)) < 1e-5
    assert torch.equal(perceptual(a, a), torch.zeros(2))


def test_a_random_one_is_the_same_each_time_and_carries_gradients() -> None:
    a, b = (torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    before = torch.get_rng_state()
    first = Perceptual("random")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first(a, b), Perceptual("random").train()(a, b)) and float(first(a, b)) > 0
    a.requires_grad_()
    first(a, b).sum().backward()
    assert float(a.grad.abs().sum()) > 0 and not any(p.requires_grad for p in first.parameters())


def test_files_that_are_no_vgg(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="objective.vgg .*no such file"):
        Perceptual(str(tmp_path / "none.pth"))
    torch.save({"features.0.weight": torch.ones(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="is no VGG-16 of torchvision: missing 0.bias"):
        Perceptual(str(tmp_path / "other.pth"))
