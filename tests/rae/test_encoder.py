"""RAE's encoder: MAE, SigLIP and DINOv3 against transformers in float64 or of timm, and what is refused.

DINOv2 is held to the published code by golden/rae_encoder.npz.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.golden import relative
from support.teachers import write_teacher
from torch import Tensor

from pixelgen_fast.dino.network import load_dino
from pixelgen_fast.errors import InputError
from pixelgen_fast.rae import encoder as module
from pixelgen_fast.rae.encoder import Encoder, load_encoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
D, HEADS, PATCH, TABLE, GRID = 32, 2, 16, 3, 4
SMALL = dict(embed_dim=D, depth=2, num_heads=HEADS, img_size=TABLE * PATCH)
MAE, SIGLIP, V3 = "vit_base_patch16_224.mae", "vit_base_patch16_siglip_256.v2_webli", "vit_large_patch16_dinov3"


def images(count: int = 2, side: int = GRID * PATCH) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


class Published:
    """A vision transformer of Hugging Face, its weights drawn anew, and its tokens in float64.

    The position table of TABLE x TABLE patches is resized bicubically without antialiasing, as its code does.
    """

    def __init__(self, mae: bool) -> None:
        self.mae, self.generator, self.w = mae, torch.Generator().manual_seed(1), {}
        self.eps = 1e-12 if mae else 1e-6
        self.front = "vit." if mae else "vision_model."
        embed = "embeddings.patch_embeddings.projection" if mae else "embeddings.patch_embedding"
        self.draw(f"{embed}.weight", D, 3, PATCH, PATCH)
        self.draw(f"{embed}.bias", D)
        if mae:
            self.draw("embeddings.cls_token", 1, 1, D)
            self.draw("embeddings.position_embeddings", 1, TABLE**2 + 1, D)
        else:
            self.draw("embeddings.position_embedding.weight", TABLE**2, D)
        for i in range(2):
            for part in ("query", "key", "value", "out"):
                self.draw(f"{self.attention(i, part)}.weight", D, D)
                self.draw(f"{self.attention(i, part)}.bias", D)
            for part, shape in (("fc1", (4 * D, D)), ("fc2", (D, 4 * D))):
                self.draw(f"{self.mlp(i, part)}.weight", *shape)
                self.draw(f"{self.mlp(i, part)}.bias", shape[0])
            for k in (1, 2):
                self.draw(f"{self.norm(i, k)}.weight", D)
                self.draw(f"{self.norm(i, k)}.bias", D)
        self.embed = embed

    def draw(self, name: str, *shape: int) -> None:
        self.w[self.front + name] = 0.2 * torch.randn(shape, generator=self.generator)

    def attention(self, i: int, part: str) -> str:
        if self.mae:
            return f"encoder.layer.{i}.attention." + ("output.dense" if part == "out" else f"attention.{part}")
        return f"encoder.layers.{i}.self_attn.{part if part == 'out' else part[0]}_proj"

    def mlp(self, i: int, part: str) -> str:
        if self.mae:
            return f"encoder.layer.{i}." + ("intermediate.dense" if part == "fc1" else "output.dense")
        return f"encoder.layers.{i}.mlp.{part}"

    def norm(self, i: int, k: int) -> str:
        if self.mae:
            return f"encoder.layer.{i}.layernorm_" + ("before" if k == 1 else "after")
        return f"encoder.layers.{i}.layer_norm{k}"

    def of(self, name: str) -> Tensor:
        return self.w[self.front + name].double()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.of(f"{name}.weight"), self.of(f"{name}.bias"))

    def normed(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), self.of(f"{name}.weight"), self.of(f"{name}.bias"), self.eps)

    def positions(self) -> Tensor:
        table = self.of("embeddings.position_embedding" + ("s" if self.mae else ".weight")).view(-1, D)
        patches = table[-(TABLE**2) :].T.reshape(1, D, TABLE, TABLE)
        resized = F.interpolate(patches, size=(GRID, GRID), mode="bicubic", align_corners=False)[0].flatten(1).T
        return torch.cat([table[: -(TABLE**2)], resized])

    def tokens(self, x: Tensor) -> Tensor:
        patches = F.conv2d(x, self.of(f"{self.embed}.weight"), self.of(f"{self.embed}.bias"), stride=PATCH)
        h = patches.flatten(2).transpose(1, 2)
        if self.mae:
            h = torch.cat([self.of("embeddings.cls_token").expand(len(h), -1, -1), h], dim=1)
        h = h + self.positions()
        for i in range(2):
            n = self.normed(h, self.norm(i, 1))
            q, k, v = (
                self.linear(self.attention(i, part), n).unflatten(2, (HEADS, -1)).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            scores = (q @ k.transpose(2, 3) / (D / HEADS) ** 0.5).softmax(dim=-1)
            h = h + self.linear(self.attention(i, "out"), (scores @ v).transpose(1, 2).flatten(2))
            n = self.normed(h, self.norm(i, 2))
            inner = F.gelu(self.linear(self.mlp(i, "fc1"), n), approximate="none" if self.mae else "tanh")
            h = h + self.linear(self.mlp(i, "fc2"), inner)
        return F.layer_norm(h, (D,), eps=self.eps)[:, int(self.mae) :]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders of the named architectures, of little width."""
    monkeypatch.setattr(
        module, "load_dino", lambda *args, **kwargs: load_dino(*args, **SMALL | kwargs)
    )  # fmt: skip


@pytest.mark.parametrize(("name", "mean", "std"), [(MAE, MEAN, STD), (SIGLIP, (0.5,) * 3, (0.5,) * 3)])
def test_published_weights_of_mae_and_siglip(name: str, mean: tuple, std: tuple, small: None, tmp_path: Path) -> None:
    """Under Hugging Face's names, beside weights that pre-training alone needs, without a last norm."""
    published = Published(name == MAE)
    beside = {"decoder.decoder_norm.weight": torch.ones(4)}
    if not published.mae:
        beside = {"logit_scale": torch.ones(1), "text_model.head.weight": torch.ones(2, 2)}
        beside["vision_model.head.probe"] = torch.ones(3)
    save_file(published.w | beside, tmp_path / "model.safetensors")
    encoder = load_encoder(name, str(tmp_path / "model.safetensors"), GRID)
    x = images()
    found = encoder(x)
    normalised = (x.double() - torch.tensor(mean)[:, None, None].double()) / torch.tensor(std)[:, None, None].double()
    assert found.shape == (2, D, GRID, GRID)
    assert relative(found.flatten(2).transpose(1, 2), published.tokens(normalised)) < 1e-5


@pytest.mark.parametrize("layers", [(), (0, 2)])
def test_a_mean_of_layers_and_of_the_last_tokens(layers: tuple, tmp_path: Path) -> None:
    """RAEv2's latent, and the last block's alone, by timm's own intermediate features of a DINOv3."""
    kwargs = dict(embed_dim=D, depth=3, num_heads=HEADS, patch_size=4, img_size=16)
    network = timm.create_model(V3, num_classes=0, **kwargs).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)
    x = images(side=16)
    normalised = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    maps = network.forward_intermediates(normalised, indices=3, norm=False, intermediates_only=True)
    normed = [F.layer_norm(m.double().movedim(1, -1), (D,), eps=network.norm.eps).movedim(-1, 1) for m in maps]
    expected = normed[-1]
    if layers:
        expected = (normed[0] + normed[2]) / 2 + normed[2].mean(dim=(2, 3), keepdim=True)
    assert relative(Encoder(network, 4, layers)(x), expected) < 1e-5


def test_images_of_another_size_are_resized_without_antialiasing(tmp_path: Path) -> None:
    encoder = load_encoder(V3, str(write_teacher(tmp_path / "t", V3)), 4)
    x = images(side=24)
    expected = F.interpolate(x.double(), size=(16, 16), mode="bicubic", align_corners=False, antialias=False)
    assert relative(encoder.preprocess(x), (expected - 0.4) / 0.3) < 1e-6
    assert relative(encoder(x), encoder(encoder.preprocess(x) * 0.3 + 0.4)) < 1e-5


def test_it_is_frozen_and_known_by_its_weights(tmp_path: Path) -> None:
    a, b = (load_encoder(V3, str(write_teacher(tmp_path / str(seed), V3, seed)), 4) for seed in (0, 1))
    again = load_encoder(V3, str(tmp_path / "0"), 4)
    assert not any(p.requires_grad for p in a.parameters()) and not a.train().training
    assert a.fingerprint() == again.fingerprint() != b.fingerprint()
    assert again.fingerprint() != load_encoder(V3, str(tmp_path / "0"), 4, layers=(0, 1)).fingerprint()
    with pytest.raises(InputError, match="encoder.layers has 2, and the encoder has blocks 0 to 1"):
        load_encoder(V3, str(tmp_path / "0"), 4, layers=(0, 2))
    with pytest.raises(InputError, match="encoder.weights .*no such file"):
        load_encoder(V3, str(tmp_path / "none"), 4)
