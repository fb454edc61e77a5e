"""The DINO that reads noised images, against the teacher that it starts as, and PixelDiT with it inside."""

import functools
from pathlib import Path

import pytest
import timm
import torch
from einops import rearrange
from support.golden import relative
from torch import Tensor, nn

from pixelgen_fast import models
from pixelgen_fast.diffusion.loss import flow_loss
from pixelgen_fast.diffusion.path import add_noise
from pixelgen_fast.diffusion.time import noise
from pixelgen_fast.dino.network import load_dino, save_teacher
from pixelgen_fast.dino.noisy import NoisyDino
from pixelgen_fast.dino.teacher import Teacher
from pixelgen_fast.engine.parallel import wrap_blocks
from pixelgen_fast.layers import Noising
from pixelgen_fast.models import dino_student

V3, V3B, V2 = (
    "vit_small_patch16_dinov3.lvd1689m",
    "vit_small_patch16_dinov3_qkvb.lvd1689m",
    "vit_small_patch14_reg4_dinov2.lvd142m",
)
SMALL = dict(embed_dim=64, depth=2, num_heads=2, patch_size=4, img_size=16)
MEAN, STD = [0.2, 0.4, 0.6], [0.3, 0.25, 0.5]
TINY = dict(hidden_size=24, num_heads=2, patch_depth=2, patch_size=4, pixel_hidden_size=8, pixel_depth=2)
TRUNK = dict(role="trunk", patch_depth=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Teachers of little width with no weight at a special value, by name."""
    base, generator = tmp_path_factory.mktemp("teachers"), torch.Generator().manual_seed(1)
    for name in (V3, V3B, V2):
        network = timm.create_model(name, pretrained=False, num_classes=0, **SMALL)
        for p in network.parameters():
            nn.init.normal_(p, std=0.2, generator=generator)
        save_teacher(base / name, network, architecture=name, kwargs=SMALL, mean=MEAN, std=STD)
    return {name: base / name for name in (V3, V3B, V2)}


def student(folders: dict[str, Path], name: str = V3, grid: int = 4, **changes) -> NoisyDino:
    torch.manual_seed(0)
    return NoisyDino(load_dino(name, str(folders[name])), grid, **changes)


def tiny(folders: dict[str, Path], name: str = V3, randomise: bool = True, **changes) -> dino_student.DinoStudent:
    """A model whose trainable weights have no special value."""
    torch.manual_seed(0)
    config = dino_student.Settings(**(TINY | {"dino": name, "weights": str(folders[name])} | changes))
    model = dino_student.build(config, 16, num_classes=3)
    if randomise:
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)
    return model


def batch(count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    z, t = torch.randn(count, 3, 16, 16, generator=generator), torch.rand(count, generator=generator)
    return z, t, torch.arange(count)


@pytest.mark.parametrize(("name", "size", "grid"), [(V3, 16, 4), (V3B, 16, 4), (V2, 16, 4), (V3, 24, 4), (V2, 16, 3)])
def test_a_student_blind_to_time_is_the_teacher(name: str, size: int, grid: int, folders: dict) -> None:
    """On clean images, z = x at t = 1: at the teacher's size, at a larger image, at another grid."""
    raw = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    z = rearrange(raw, "B H W C -> B C H W") / 127.5 - 1
    expected = Teacher(load_dino(name, str(folders[name])), grid, "cpu")(raw)
    found = student(folders, name, grid, time_token="masked")(z, torch.ones(2))
    assert found.shape == (2, grid**2, 64)
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("name", [V3, V3B, V2])
def test_the_time_token_is_one_more_prefix_token(name: str, folders: dict) -> None:
    """Hidden from all others by a bias of -inf, it leaves the teacher's features: places and rotations have not moved.
    Seen, it changes them, and with its MLP differently at every t."""
    dino = student(folders, name)
    z, t, _ = batch()
    teacher = load_dino(name, str(folders[name])).eval()
    expected = teacher.forward_features(dino.preprocess(z))[:, teacher.num_prefix_tokens :]
    start = dino(z, t)
    assert torch.equal(start, dino(z, 1 - t))
    assert 1e-4 < relative(start, expected) < 1
    nn.init.normal_(dino.time.mlp[2].weight)
    assert relative(dino(z, t), dino(z, 1 - t)) > 1e-4
    bias = torch.zeros(dino.prefix + 16)
    bias[teacher.num_prefix_tokens] = -torch.inf
    for block in dino.network.blocks:
        block.forward = functools.partial(block.forward, attn_mask=bias.expand(1, 1, len(bias), -1))
    assert relative(dino(z, t), expected) < 1e-6


@pytest.mark.parametrize("name", [V3, V3B])
def test_published_counts_of_lora_and_time(name: str) -> None:
    """Rank 16 on the four products of 12 blocks: 16 (384 + 1152 + 2 384 + 2 (384 + 1536)) each. 256 -> 384 -> 384."""
    with torch.device("meta"):
        dino = NoisyDino(load_dino(name, None), 16, tuning="lora")
    trained = {name: p.numel() for name, p in dino.named_parameters() if p.requires_grad}
    assert sum(n for name, n in trained.items() if "lora_" in name) == 1_179_648
    assert sum(n for name, n in trained.items() if name.startswith("time.")) == 246_528
    assert sum(trained.values()) == 1_179_648 + 246_528


@pytest.mark.parametrize("name", [V3, V3B, V2])
def test_adapters_of_every_product_learn(name: str, folders: dict) -> None:
    """With timm's separate biases of queries and values too, whose usual path goes past the adapter of qkv."""
    dino = student(folders, name, tuning="lora", lora_rank=2)
    z, t, _ = batch()
    whole = student(folders, name)
    assert relative(dino(z, t), whole(z, t)) < 1e-6  # B is zero
    adapters = {n: p for n, p in dino.named_parameters() if "lora_" in n}
    for parameter in adapters.values():
        nn.init.normal_(parameter, std=0.2)
    dino(z, t).square().sum().backward()
    assert len(adapters) == 2 * 4 * 2
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.values())
    assert all(p.grad is None for n, p in dino.named_parameters() if n.startswith("network.") and n not in adapters)
    if name == V3B:
        dino.zero_grad()
        for block in dino.network.blocks:
            block.attn.qkv_bias_separate = False
        dino(z, t).square().sum().backward()
        assert {n.split(".attn.")[1] for n, p in adapters.items() if p.grad is None} == {
            "qkv.lora_A.default.weight",
            "qkv.lora_B.default.weight",
        }


@pytest.mark.parametrize("tuning", ["full", "lora", "frozen"])
@pytest.mark.parametrize("role", [{}, TRUNK], ids=["input", "trunk"])
@pytest.mark.parametrize("name", [V3, V2])
def test_gradients_reach_all_that_is_trained(name: str, role: dict, tuning: str, folders: dict) -> None:
    model = tiny(folders, name, tuning=tuning, **role)
    z, t, y = batch()
    model(z, t, y).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().max() > 0) == p.requires_grad, name
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (tuning != "full") and all(name.startswith("dino.network.") for name in frozen)


@pytest.mark.parametrize("role", [{}, TRUNK], ids=["input", "trunk"])
def test_first_output_is_zero(role: dict, folders: dict) -> None:
    assert torch.equal(tiny(folders, randomise=False, **role)(*batch()), torch.zeros(2, 3, 16, 16))


def test_taps(folders: dict) -> None:
    """0 is the DINO's own tokens; k are those after patch block k, which a trunk has none of."""
    model = tiny(folders)
    z, t, y = batch()
    for tap, width in ((0, 64), (1, 24), (2, 24)):
        prediction, tokens = model(z, t, y, tap=tap)
        assert torch.equal(prediction, model(z, t, y))
        assert tokens.shape == (2, 16, width) and model.tap_width(tap) == width
        if tap == 0:
            assert torch.equal(tokens, model.dino(z, t))
    with pytest.raises(ValueError, match="tap 3"):
        model(z, t, y, tap=3)
    trunk = tiny(folders, **TRUNK)
    assert trunk.tap_depth == 0 and trunk(z, t, y, tap=0)[1].shape == (2, 16, 64)
    with pytest.raises(ValueError, match="tap 1"):
        trunk(z, t, y, tap=1)


def test_a_trunk_learns_the_class(folders: dict) -> None:
    model = tiny(folders, **TRUNK)
    z, t, _ = batch()
    assert relative(model(z, t, torch.tensor([0, 1])), model(z, t, torch.tensor([3, 1]))) > 1e-3


@pytest.mark.parametrize("role", [{}, TRUNK], ids=["input", "trunk"])
def test_velocity_loss_is_that_of_the_noised_images(role: dict, folders: dict) -> None:
    model = tiny(folders, **role)
    raw = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    numbers, (_, t, y), weight = torch.tensor([7, 9]), batch(), torch.tensor([0.5, 2.0])
    x = rearrange(raw, "B H W C -> B C H W") / 127.5 - 1
    e = noise(3, numbers, (3, 16, 16))
    prediction, tokens = model(add_noise(x, e, t, 1.5), t, y, tap=0)
    expected = weight * flow_loss(prediction, x, e, t, predict="v", loss_space="v", noise_scale=1.5)
    found, tapped = model.velocity_loss(raw, y, Noising(numbers, t, 3, 1.5), weight, tap=0)
    assert relative(found, expected) < 1e-5 and relative(tapped, tokens) < 1e-5


@pytest.mark.parametrize("tuning", ["lora", "frozen"])
def test_what_is_trained_and_the_teacher_restore_the_model(tuning: str, folders: dict, tmp_path: Path) -> None:
    model = tiny(folders, tuning=tuning)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.save(trained, tmp_path / "trained.pt")
    torch.manual_seed(5)
    fresh = tiny(folders, tuning=tuning, randomise=False)
    missing, extra = fresh.load_state_dict(torch.load(tmp_path / "trained.pt"), strict=False)
    assert not extra and set(missing) == model.state_dict().keys() - trained.keys()
    assert torch.equal(fresh(*batch()), model(*batch()))


def test_names_of_adapters_are_documented_ones(folders: dict) -> None:
    names = set(tiny(folders, tuning="lora").state_dict())
    layer = "dino.network.blocks.1.attn.qkv"
    wanted = {f"{layer}.{leaf}.weight" for leaf in ("base_layer", "lora_A.default", "lora_B.default")}
    assert wanted | {"dino.time.mlp.0.weight", "dino.network.patch_embed.proj.weight"} <= names


def test_tables_keep_float32_when_the_model_is_cast(folders: dict) -> None:
    model = tiny(folders, tuning="lora")
    (z, t, y), rope = batch(), model.dino.rope.clone()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expected = model(z.bfloat16().float(), t, y)
    model.bfloat16()
    assert torch.equal(model.dino.rope, rope) and torch.equal(model.dino.mean.flatten(), torch.tensor(MEAN))
    found = model(z.bfloat16(), t, y)
    assert found.dtype == torch.bfloat16
    # a bf16 digit (2^-9) through some two dozen roundings
    assert relative(found.float(), expected) < 24 * 2**-9


@pytest.mark.parametrize("recompute", ["operators", "blocks"])
def test_recomputation_changes_no_name_and_no_gradient(recompute: str, folders: dict) -> None:
    plain, wrapped = (tiny(folders, V3B, tuning="lora") for _ in range(2))
    wrap_blocks(wrapped.blocks(), recompute=recompute, compile_blocks=False)
    assert len(wrapped.blocks()) == 2 + 2 + 2 and list(plain.state_dict()) == list(wrapped.state_dict())
    for model in (plain, wrapped):
        model(*batch()).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad), name


def test_blocks_of_the_dino_are_one_graph(folders: dict) -> None:
    """torch.compile(fullgraph=True) traces forward and backward without a break; aot_eager compiles no code."""
    torch._dynamo.reset()
    block = tiny(folders, V3B, tuning="lora").dino.network.blocks[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    tokens = torch.randn(2, 6 + 16, 64)
    rope = torch.randn(16, 64)
    assert torch.allclose(compiled(tokens, rope), block(tokens, rope), rtol=1e-4, atol=1e-5)


def test_on_the_meta_device_no_weights_are_wanted() -> None:
    """As the trainer counts FLOPs; the published weights stay where they are."""
    with torch.device("meta"):
        model = models.system_module("dino_student").build(dino_student.Settings(), 256, 1000)
        output = model(torch.empty(1, 3, 256, 256), torch.empty(1), torch.zeros(1, dtype=torch.int64))
    assert output.shape == (1, 3, 256, 256)
    assert sum(p.numel() for p in model.dino.parameters()) == 21_586_944 + 246_528


def test_settings_that_cannot_work_are_refused(folders: dict) -> None:
    with pytest.raises(ValueError, match="model.patch_depth is 2 and model.role is trunk"):
        tiny(folders, role="trunk")
    with pytest.raises(ValueError, match="model.patch_depth is 0 and model.role is input"):
        tiny(folders, patch_depth=0)
    with pytest.raises(ValueError, match="lora_rank is 0"):
        tiny(folders, tuning="lora", lora_rank=0)
    with pytest.raises(ValueError, match="tuning 'half': valid are full, lora, frozen"):
        student(folders, tuning="half")
    with pytest.raises(ValueError, match="model.weights .*nowhere"):
        tiny(folders, weights="nowhere")
    with pytest.raises(ValueError, match="model.dino 'dino_9000' is not"):
        tiny(folders, dino="dino_9000", weights="random")
