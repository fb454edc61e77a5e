"""The teacher's preprocessing and features against timm and a resize by hand, and weights under Meta's names."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from support.golden import relative
from torch import Tensor, nn

from pixelgen_fast import models
from pixelgen_fast.dino.network import load_dino, save_teacher, to_timm
from pixelgen_fast.dino.teacher import Teacher, cast_network

SMALL = dict(embed_dim=48, depth=2, num_heads=2)
MEAN, STD = [0.2, 0.4, 0.6], [0.3, 0.25, 0.5]
V2, V3 = "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"


def small(name: str, seed: int = 1, **changes) -> nn.Module:
    """A timm model of little width with no weight at a special value."""
    network = timm.create_model(name, num_classes=0, **SMALL, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return network.eval()


def saved(folder: Path, name: str, seed: int = 1, **kwargs) -> Path:
    save_teacher(folder, small(name, seed, **kwargs), architecture=name, kwargs=SMALL | kwargs, mean=MEAN, std=STD)
    return folder


def images(side: int, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def cubic_matrix(source: int, target: int) -> np.ndarray:
    """[target, source] weights of Keys' cubic convolution with a = -0.75, pixel centres at half integers."""
    a, matrix = -0.75, np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for k in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d = abs(centre - k)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(k, 0), source - 1)] += near if d <= 1 else far
    return matrix


def prepared(pixels: Tensor, side: int) -> Tensor:
    """Normalised and resized in float64: [B, 3, side, side]."""
    x = (pixels.numpy().astype(np.float64) / 255 - MEAN) / STD
    matrix = cubic_matrix(pixels.shape[1], side)
    return torch.from_numpy(np.einsum("ih,jw,bhwc->bcij", matrix, matrix, x))


@pytest.mark.parametrize(
    ("name", "kwargs", "pixels", "grid"),
    [(V2, {"img_size": 42}, 24, 4), (V3, {"patch_size": 4, "img_size": 16}, 16, 4), (V3, {"img_size": 64}, 20, 3)],
)
def test_features_are_those_of_timm(name: str, kwargs: dict, pixels: int, grid: int, tmp_path: Path) -> None:
    """Patch tokens after the last norm, of an image resized by hand, with timm's own position tables of any size."""
    teacher = Teacher(load_dino(name, str(saved(tmp_path / "teacher", name, **kwargs))), grid, "cpu")
    reference = small(name, **kwargs, dynamic_img_size=True).double()
    raw = images(pixels)
    x = prepared(raw, teacher.side)
    assert teacher.side == grid * reference.patch_embed.patch_size[0]
    assert relative(teacher.preprocess(raw).double(), x) < 1e-6
    expected = reference.forward_features(x)[:, reference.num_prefix_tokens :]
    found = teacher(raw)
    assert found.shape == (2, grid**2, 48) and teacher.width == 48
    assert relative(found.double(), expected) < 1e-5


def test_an_image_of_the_right_size_is_not_resampled(tmp_path: Path) -> None:
    teacher = Teacher(load_dino(V3, str(saved(tmp_path / "t", V3, patch_size=4, img_size=16))), 4, "cpu")
    raw = images(16)
    network = small(V3, patch_size=4, img_size=16, dynamic_img_size=False)
    x = (raw.permute(0, 3, 1, 2).float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(teacher.preprocess(raw), x)
    assert torch.equal(teacher(raw), network.forward_features(x)[:, network.num_prefix_tokens :])


def meta_dinov3(state: dict[str, Tensor], bias: float | None) -> dict[str, Tensor]:
    """timm's names turned into Meta's, with all that Meta's files hold. bias: of q and v where timm has none."""
    table = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma",
             "fc1_g": "w1", "fc1_x": "w2"}  # fmt: skip
    swiglu = any("fc1_g" in name for name in state)
    meta: dict[str, Tensor] = {"mask_token": torch.ones(1, 48), "rope_embed.periods": torch.ones(6)}
    for name, value in state.items():
        if name.endswith(("q_bias", "v_bias")):
            continue
        for old, new in (table | ({"fc2": "w3"} if swiglu else {})).items():
            name = name.replace(old, new)
        meta[name] = value
    for i in range(2):
        attention = f"blocks.{i}.attn."
        own = bias is None
        q, v = (state[f"{attention}{x}_bias"] if own else torch.full((48,), bias) for x in "qv")
        meta[f"{attention}qkv.bias"] = torch.cat([q, torch.full((48,), torch.nan), v])
        mask = torch.ones(144)
        mask[48:96] = 0
        meta[f"{attention}qkv.bias_mask"] = mask
    return meta


@pytest.mark.parametrize(
    "name", [f"{V3}_qkvb", V3, "vit_small_plus_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb"]
)
def test_dinov3_under_metas_names(name: str, tmp_path: Path) -> None:
    """The same features, bit for bit, from a file of either kind of names; biases are split where there are any."""
    kwargs = {"img_size": 32}
    folder = saved(tmp_path / "teacher", name, **kwargs)
    raw = images(24)
    expected = Teacher(load_dino(name, str(folder)), 3, "cpu")(raw)
    state = load_dino(name, str(folder)).state_dict()
    meta = meta_dinov3(state, None if "qkvb" in name else 0.0)
    assert meta.keys() - state.keys() and "storage_tokens" in meta
    (folder / "model.safetensors").unlink()
    save_file({key: value.contiguous() for key, value in meta.items()}, folder / "model.safetensors")
    loaded = load_dino(name, str(folder))
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(Teacher(loaded, 3, "cpu")(raw), expected)


def test_biases_are_never_dropped() -> None:
    state = small(V3).state_dict()
    with pytest.raises(ValueError, match=r"here: blocks.0.attn.qkv.bias is not zero .* _qkvb after dinov3"):
        to_timm(meta_dinov3(state, 0.5), small(V3), "here")
    qkvb = small(f"{V3}_qkvb")
    meta = meta_dinov3(qkvb.state_dict(), None)
    meta["blocks.1.attn.qkv.bias"] = torch.ones(144)
    assert to_timm(meta, qkvb, "here")["blocks.1.attn.q_bias"].sum() == 48
    del meta["blocks.1.attn.qkv.bias_mask"]
    with pytest.raises(ValueError, match="here: blocks.1.attn.qkv.bias has a bias of the keys"):
        to_timm(meta, qkvb, "here")


def test_dinov2_under_metas_names() -> None:
    """Meta adds a position to the class token and none to the registers: by hand, then by the renamed weights."""
    network = small(V2, img_size=28).double()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    position = torch.randn(1, 1, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    meta = {name: value for name, value in state.items() if name != "reg_token"}
    meta |= {"register_tokens": state["reg_token"], "mask_token": torch.zeros(1, 48)}
    meta["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    x = prepared(images(28), 28)

    patches = network.patch_embed(x)
    start = torch.cat([meta["cls_token"].expand(2, -1, -1), patches], dim=1) + meta["pos_embed"]
    tokens = torch.cat([start[:, :1], meta["register_tokens"].expand(2, -1, -1), start[:, 1:]], dim=1)
    expected = network.norm(network.blocks(tokens))

    renamed = to_timm(meta, network, "here")
    assert renamed.keys() == state.keys()
    network.load_state_dict(renamed)
    assert torch.allclose(network.forward_features(x), expected, rtol=0, atol=1e-12)


def hugging_face(meta: dict[str, Tensor], version: int) -> dict[str, Tensor]:
    """Meta's names turned into those of transformers 4 (DINOv2's files) or 5, which DINOv3's files have."""
    found: dict[str, Tensor] = {}
    old, encoder = version == 4, "encoder.layer." if version == 4 or "pos_embed" in meta else "model.layer."
    heads = [f"attention.{x}" if old else f"{x[0]}_proj" for x in ("query", "key", "value")]
    place = "embeddings.patch_embeddings" + (".projection" if "pos_embed" in meta else "")
    table = {
        "patch_embed.proj": place, "pos_embed": "embeddings.position_embeddings", "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token", "blocks.": encoder, "register_tokens": "embeddings.register_tokens",
        "storage_tokens": "embeddings.register_tokens", ".ls1.gamma": ".layer_scale1.lambda1",
        ".ls2.gamma": ".layer_scale2.lambda1", ".attn.proj": f".attention.{'output.dense' if old else 'o_proj'}",
    }  # fmt: skip
    table |= {".mlp.w12": ".mlp.weights_in", ".mlp.w3": ".mlp.weights_out"} if old else {}
    for name, value in meta.items():
        if name.endswith("bias_mask") or name == "rope_embed.periods":
            continue
        for key, replacement in table.items():
            name = name.replace(key, replacement)
        name = f"layernorm{name[4:]}" if "pos_embed" in meta and name.startswith("norm.") else name
        parts = {name: value}
        if ".attn.qkv." in name:
            parts = {name.replace("attn.qkv", f"attention.{x}"): v for x, v in zip(heads, value.chunk(3), strict=True)}
        elif ".mlp.w12." in name:
            parts = {name.replace("w12", x): v for x, v in zip(("gate_proj", "up_proj"), value.chunk(2), strict=True)}
        found |= parts
    if old:
        return found
    gated = any(".w3." in name for name in found)
    names = {".w1.": ".gate_proj.", ".w2.": ".up_proj.", ".w3.": ".down_proj."} if gated else {}
    names |= {} if gated or "pos_embed" in meta else {".fc1.": ".up_proj.", ".fc2.": ".down_proj."}
    for key, replacement in names.items():
        found = {name.replace(key, replacement): value for name, value in found.items()}
    dinov3 = "pos_embed" not in meta
    return {name: value for name, value in found.items() if not (dinov3 and name.endswith("k_proj.bias"))}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", [V2, "vit_giant_patch14_reg4_dinov2"])
def test_dinov2_under_hugging_faces_names(name: str, version: int) -> None:
    network = small(name, img_size=28)
    state = network.state_dict()
    meta = {key: value for key, value in state.items() if key != "reg_token"}
    meta |= {"register_tokens": state["reg_token"], "mask_token": torch.zeros(1, 48)}
    meta["pos_embed"] = torch.cat([torch.ones(1, 1, 48), state["pos_embed"]], dim=1)
    if "giant" in name:
        meta = {key.replace(".fc1.", ".w12.").replace(".fc2.", ".w3."): value for key, value in meta.items()}
    expected, found = to_timm(meta, network, "here"), to_timm(hugging_face(meta, version), network, "here")
    assert found.keys() == expected.keys() == state.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("name", [f"{V3}_qkvb", "vit_small_plus_patch16_dinov3_qkvb"])
def test_dinov3_under_hugging_faces_names(name: str) -> None:
    network = small(name, img_size=32)
    state = network.state_dict()
    renamed = hugging_face(meta_dinov3(state, None), 5)
    assert any("q_proj.bias" in key for key in renamed) and not any("k_proj.bias" in key for key in renamed)
    found = to_timm({f"dinov3_vit.{key}": value for key, value in renamed.items()}, network, "here")
    assert found.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in found.items())


def test_plain_files_in_both_kinds_of_names(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_dinov3_qkvb"
    network = load_dino(name, "random")
    assert torch.equal(load_dino(name, "random").patch_embed.proj.weight, network.patch_embed.proj.weight)
    state = network.state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    meta = {key.replace("reg_token", "storage_tokens").replace("gamma_", "ls"): v for key, v in state.items()}
    meta = {key + ".gamma" if key.endswith(("ls1", "ls2")) else key: v for key, v in meta.items()}
    for i in range(len(network.blocks)):
        q, v = meta.pop(f"blocks.{i}.attn.q_bias") + 1, meta.pop(f"blocks.{i}.attn.v_bias") + 2
        meta[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    torch.save({"state_dict": meta}, tmp_path / "meta.pth")
    for file in ("timm.safetensors", "meta.pth"):
        loaded = load_dino(name, str(tmp_path / file)).state_dict()
        for key, value in state.items():
            shift = {"q_bias": 1, "v_bias": 2}.get(key.rpartition(".")[2], 0) if file == "meta.pth" else 0
            assert torch.equal(loaded[key], value + shift), key


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "teacher", V3)
    state = load_dino(V3, str(folder)).state_dict()
    del state["norm.bias"]
    state |= {"extra.weight": torch.ones(1), "norm.weight": torch.ones(7)}
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"3 weights .* missing norm.bias .*; extra extra.weight .*; norm.weight is \[7\]"
    ):
        load_dino(V3, str(folder))
    with pytest.raises(ValueError, match=f"holds a {V3}, not a {V2}"):
        load_dino(V2, str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks architecture, kwargs, mean, std"):
        load_dino(V3, str(folder))
    (tmp_path / "bad.pth").write_text("text")
    with pytest.raises(ValueError, match="bad.pth: not a readable file of weights"):
        load_dino(V3, str(tmp_path / "bad.pth"))
    with pytest.raises(ValueError, match="no such file or folder"):
        load_dino(V3, str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="'vit_small_dinov3' is not a model of timm .*vit_small_patch16_dinov3"):
        load_dino("vit_small_dinov3", "random")
    with pytest.raises(ValueError, match="not a vision transformer"):
        load_dino("convnext_tiny", "random")


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    saved(tmp_path / "teacher", V3)
    with pytest.raises(ValueError, match="is not empty"):
        saved(tmp_path / "teacher", V3)
    with pytest.raises(ValueError, match="to be saved as .* do not fit"):
        save_teacher(tmp_path / "other", small(V3), architecture=V3, kwargs={}, mean=MEAN, std=STD)
    assert not (tmp_path / "other").exists()


def test_it_is_frozen_and_no_system() -> None:
    teacher = Teacher(small(V3), 2, "cpu")
    assert not teacher.train().training and not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher(images(8)).requires_grad
    assert "teacher" not in models.systems()


def test_rotary_tables_keep_their_digits() -> None:
    network = small(V3, dynamic_img_size=False)
    before = dict(network.rope.named_buffers())
    cast = cast_network(network, torch.device("cpu"), torch.bfloat16)
    after = dict(cast.rope.named_buffers())
    assert before.keys() == after.keys() and len(after) == 2
    assert all(torch.equal(after[name], table) for name, table in before.items())
    assert cast.forward_features(torch.zeros(1, 3, 256, 256, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_fingerprint_tells_weights_and_settings_apart(tmp_path: Path) -> None:
    first = saved(tmp_path / "a", V3, seed=1)
    second = saved(tmp_path / "b", V3, seed=2)
    prints = [Teacher(load_dino(V3, str(f)), grid, "cpu").fingerprint() for f, grid in
              [(first, 2), (first, 2), (first, 3), (second, 2)]]  # fmt: skip
    assert prints[0] == prints[1] and len(set(prints)) == 3
