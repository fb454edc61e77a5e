"""PixelDiT2 against its formulas in plain float64 PyTorch, its counts, and the DINO that it keeps outside."""

import copy
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from support.golden import relative
from torch import Tensor, nn

from pixelgen_fast.dino.network import load_dino, save_teacher
from pixelgen_fast.engine.parallel import wrap_blocks
from pixelgen_fast.models import pixeldit2

V3 = "vit_small_patch16_dinov3_qkvb.lvd1689m"
SMALL = dict(embed_dim=32, depth=2, num_heads=2, patch_size=4, img_size=16)
MEAN, STD = [0.2, 0.4, 0.6], [0.3, 0.25, 0.5]
TINY = dict(hidden_size=24, num_heads=2, depth=4, patch_size=4, context_length=3, context_start=1, dino=V3)
B = dict(hidden_size=768, num_heads=12, depth=12, context_start=4)
L = dict(hidden_size=1024, num_heads=16, depth=24)
H = dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = timm.create_model(V3, pretrained=False, num_classes=0, **SMALL)
    for p in network.parameters():
        nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("teacher") / "small"
    save_teacher(path, network, architecture=V3, kwargs=SMALL, mean=MEAN, std=STD)
    return path


def tiny(folder: Path, randomise: bool = True, **changes) -> pixeldit2.PixelDiT2:
    torch.manual_seed(0)
    model = pixeldit2.build(pixeldit2.Settings(**(TINY | {"weights": str(folder)} | changes)), 16, num_classes=3)
    if randomise:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    z, t = torch.randn(3, 3, 16, 16, generator=generator), torch.rand(3, generator=generator)
    return z.to(dtype), t, torch.tensor([0, 3, 1])


class Reference:
    """The formulas on a state dict, token by token: every norm, rotation and softmax written out. Float64."""

    def __init__(self, model: pixeldit2.PixelDiT2, folder: Path) -> None:
        self.w = {name: p.detach().double() for name, p in model.state_dict().items()}
        self.dino = load_dino(V3, str(folder)).double().eval()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"{name}.weight"]

    def time(self, name: str, t: Tensor) -> Tensor:
        angle = t.double()[:, None] * 10.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        embedding = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.linear(f"{name}.mlp.2", F.silu(self.linear(f"{name}.mlp.0", embedding)))

    def block(self, name: str, x: Tensor, modulation: Tensor, context: int) -> Tensor:
        """x [B, N, D], modulation [B, N, 6 D], the first `context` tokens not rotated."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        h = self.norm(f"{name}.norm1", x) * (1 + scale1) + shift1
        q, k, v = rearrange(self.linear(f"{name}.attn.qkv", h), "B N (s H d) -> s B H N d", s=3, H=2)
        q, k = (self.rotate(self.norm(f"{name}.attn.{n}_norm", y), context) for n, y in (("q", q), ("k", k)))
        out = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + gate1 * self.linear(f"{name}.attn.proj", rearrange(out, "B H N d -> B N (H d)"))
        h = self.norm(f"{name}.norm2", x) * (1 + scale2) + shift2
        a, b = self.linear(f"{name}.mlp.w13", h).chunk(2, dim=-1)
        return x + gate2 * self.linear(f"{name}.mlp.w2", F.silu(a) * b)

    @staticmethod
    def rotate(x: Tensor, context: int) -> Tensor:
        """Pairs (x0, y0, x1, y1, ...) of a patch in column c and row r turn by c f and r f, f = 10^4^(-k / d)."""
        d, place = x.shape[-1], torch.linspace(0, 16, 4, dtype=torch.float64)
        f = 1e4 ** (-torch.arange(0, d, 4, dtype=torch.float64) / d)
        angles = torch.stack([place.repeat(4)[:, None] * f, place.repeat_interleave(4)[:, None] * f], -1).flatten(1)
        turn = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(x[..., context:, :].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([x[..., :context, :], torch.view_as_real(pairs * turn).flatten(-2)], dim=-2)

    def __call__(self, z: Tensor, t: Tensor, y: Tensor, ground: list[bool]) -> tuple[Tensor, list[Tensor]]:
        pixels = ((z.double() + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        with torch.no_grad():
            g = self.linear("grounding.enter", self.dino.forward_features(pixels)[:, 5:])
        own = self.linear("grounding.block.modulation", F.silu(self.time("grounding.t_embed", t)))
        g = self.linear("grounding.leave", self.block("grounding.block", g, own[:, None].expand(-1, 16, -1), 0))
        label = self.w["y_embed.weight"][y]
        c = F.silu(g * torch.tensor(ground)[:, None, None] + (self.time("t_embed", t) + label)[:, None])

        x = self.linear("patch_embed", rearrange(z.double(), "B C (h p) (w q) -> B (h w) (C p q)", p=4, q=4))
        taps, context, here = [], 0, c
        for number in range(4):
            if number == 1:
                context = 3
                x = torch.cat([label[:, None] + self.w["context_position"], x], dim=1)
                here = torch.cat([c.mean(1, keepdim=True).expand(-1, 3, -1), c], dim=1)
            name = f"patch_blocks.{number}"
            x = self.block(name, x, self.linear(f"{name}.modulation", F.silu(here)), context)
            taps.append(x[:, context:])
        shift, scale = self.linear("head.modulation", F.silu(c)).chunk(2, dim=-1)
        out = self.linear("head.linear", self.norm("head.norm", x[:, 3:]) * (1 + scale) + shift)
        return rearrange(out, "B (h w) (p q C) -> B C (h p) (w q)", h=4, p=4, q=4), taps


@pytest.mark.parametrize("body", [None, "reference"])
def test_output_and_taps_are_those_of_the_formulas(
    body: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the operators of this machine, and by their definitions."""
    if body:
        monkeypatch.setenv("PIXELGEN_OPS", body)
    model = tiny(folder).eval()
    z, t, y = batch()
    expected, taps = Reference(model, folder)(z, t, y, [True, False, True])
    for tap, tokens in enumerate(taps, start=1):
        prediction, tapped = model(z, t, y, tap=tap)
        assert relative(prediction.double(), expected) < 1e-5
        assert relative(tapped.double(), tokens) < 1e-5
    assert torch.equal(model(z, t, y), prediction)


def test_gradient_is_that_of_finite_differences(folder: Path) -> None:
    """In float64, along a random direction in all parameters at once; without dropout."""
    model = tiny(folder, dropout=0.0).double()
    z, t, y = batch(torch.float64)
    ground = torch.tensor([True, False, True])
    w = torch.randn_like(z)
    (model(z, t, y, ground=ground) * w).sum().backward()
    direction = [torch.randn_like(p) for p in model.parameters()]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), direction, strict=True))
    assert all(p.grad.abs().max() > 0 for p in model.parameters())

    def moved(h: float) -> float:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p, d in zip(other.parameters(), direction, strict=True):
                p.add_(d, alpha=h)
            return float((other(z, t, y, ground=ground) * w).sum())

    h = 1e-6
    assert (moved(h) - moved(-h)) / (2 * h) == pytest.approx(slope, rel=1e-6)


def test_whom_the_dino_grounds(folder: Path) -> None:
    """All images in training, all with a class in evaluation, and those that `ground` says in either mode."""
    model = tiny(folder, dropout=0.0)
    z, t, y = batch()

    def given(*ground: bool) -> Tensor:
        return model(z, t, y, ground=torch.tensor(ground))

    assert torch.equal(model(z, t, y), given(True, True, True))
    model.eval()
    assert torch.equal(model(z, t, y), given(True, False, True))
    changed = (given(True, False, True) - given(True, True, False)).abs().amax(dim=(1, 2, 3)) > 1e-4
    assert changed.tolist() == [False, True, True]


def test_the_dino_is_no_part_of_the_model_yet_follows_it(folder: Path) -> None:
    model = tiny(folder)
    inside = model._dino[0]
    assert not any(inside is module for module in model.modules())
    assert not any("dino" in name for name in model.state_dict())
    assert not any(p.requires_grad for p in inside.parameters())
    rope = inside.rope.clone()
    model.bfloat16()
    assert inside.network.patch_embed.proj.weight.dtype == torch.bfloat16 and torch.equal(inside.rope, rope)
    z, t, y = batch(torch.bfloat16)
    assert model(z, t, y).dtype == torch.bfloat16
    assert model.train() and not inside.network.training
    assert {p.device.type for p in model.to("meta")._dino[0].parameters()} == {"meta"}


def test_first_output_is_zero(folder: Path) -> None:
    assert torch.equal(tiny(folder, randomise=False)(*batch()), torch.zeros(3, 3, 16, 16))


def test_dropout_acts_in_the_middle_half_and_in_training_alone(folder: Path) -> None:
    model = tiny(folder)
    assert [block.attn.dropout for block in model.patch_blocks] == [0.0, 0.2, 0.2, 0.0]
    assert [block.mlp.dropout for block in model.patch_blocks] == [0.0, 0.2, 0.2, 0.0]
    assert model.draws and not tiny(folder, dropout=0.0).draws
    assert not torch.equal(model(*batch()), model(*batch()))
    model.eval()
    assert torch.equal(model(*batch()), model(*batch()))


@pytest.mark.parametrize(("size", "billions"), [(B, None), (L, None), (H, 0.99)])
def test_parameter_counts(size: dict, billions: float | None) -> None:
    """A block has 4 D^2 + D of attention, 3 D h of SwiGLU, 6 D^2 + 6 D of modulation, two norms of D and two of d.
    H has about 0.99 B (facts of its sizes; nothing more exact is published)."""
    config = pixeldit2.Settings(**size)
    with torch.device("meta"):
        model = pixeldit2.build(config, 256, 1000)
    D, d, h = config.hidden_size, config.hidden_size // config.num_heads, int(8 * config.hidden_size / 3)
    block = 10 * D * D + 3 * D * h + 9 * D + 2 * d
    time = 257 * D + (D + 1) * D
    grounding = 385 * D + block + (D + 1) * D + time
    ends = 769 * D + (2 * D * D + 2 * D) + D + 768 * (D + 1)
    expected = config.depth * block + grounding + ends + time + 1001 * D + 32 * D
    found = sum(p.numel() for p in model.parameters())
    assert found == expected
    if billions:
        assert found / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("recompute", ["operators", "blocks"])
def test_recomputation_changes_no_name_and_no_gradient(recompute: str, folder: Path) -> None:
    plain, wrapped = (tiny(folder) for _ in range(2))
    wrap_blocks(wrapped.blocks(), recompute=recompute, compile_blocks=False)
    assert list(plain.state_dict()) == list(wrapped.state_dict())
    for model in (plain, wrapped):
        torch.manual_seed(3)
        model(*batch()).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_settings_that_cannot_work_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="model.context_start 4 is not one of the blocks 0 to 3"):
        tiny(folder, context_start=4)
    with pytest.raises(ValueError, match="model.grounding_drop is 1.5"):
        tiny(folder, grounding_drop=1.5)
    with pytest.raises(ValueError, match="model.weights nowhere: no such file"):
        tiny(folder, weights="nowhere")
    with pytest.raises(ValueError, match="tap 5"):
        tiny(folder)(*batch(), tap=5)
    with pytest.raises(ValueError, match="built for images"):
        tiny(folder)(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
