"""MAR's published files: names, strictness, and what is drawn with them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixelgen_fast import interop
from pixelgen_fast.cli import main
from pixelgen_fast.config import Objective
from pixelgen_fast.interop import mar as form
from pixelgen_fast.models import mar
from pixelgen_fast.runs import draw

# the published width, because heads are told by it, and little else
SMALL = mar.Settings(
    hidden_size=768, num_heads=12, depth=1, decoder_depth=1, patch_size=4, class_tokens=2, head_width=16, head_depth=1
)
CLASSES, SIDE = 3, 8


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = form.public_shapes(SMALL, SIDE, CLASSES)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_published_names_are_complete() -> None:
    """As the public code lists them for B on latents: 364 tensors, and no number without a name."""
    shapes = form.public_shapes(mar.Settings(patch_size=1, channels=16), 16, 1000)
    assert len(shapes) == 2 * 12 * 12 + 6 * 8 + 28 == 364
    assert shapes["z_proj.weight"] == (768, 16) and shapes["encoder_pos_embed_learned"] == (1, 320, 768)
    assert shapes["diffloss.net.final_layer.linear.weight"] == (32, 1024)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 207_924_768


def test_import_and_back(state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The average is taken, all of it, and goes back under the published names bit for bit."""
    file, out = tmp_path / "checkpoint-last.pth", tmp_path / "imported"
    raw = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"model": raw, "model_ema": state, "optimizer": {}, "epoch": 399}, file)
    assert main(["import", str(file), str(out), "--system", "mar"]) == 0, capsys.readouterr().err
    loaded = draw.load(out)
    assert loaded.model.image_size == SIDE and loaded.model.num_classes == CLASSES
    assert loaded.config.sample.passes == 256 and loaded.config.sample.guidance == 2.9
    public = tmp_path / "back.pth"
    assert main(["export", str(out), str(public), "--format", "public"]) == 0, capsys.readouterr().err
    back = torch.load(public, weights_only=True)
    assert list(back) == list(state) and all(torch.equal(back[name], state[name]) for name in state)
    assert loaded.draw(torch.tensor([0, 2]), steps=2).shape == (2, SIDE, SIDE, 3)
    assert main(["sample", str(out), "--steps", "2", "--per-class", "1", "--temperature", "0.9", "--passes", "3"]) == 0


def test_gradients_arrive_under_the_published_names(state: dict[str, Tensor]) -> None:
    arguments = dict(encoder_embed_dim=768, encoder_depth=1, encoder_num_heads=12, decoder_embed_dim=768)
    arguments |= dict(decoder_depth=1, decoder_num_heads=12, diffloss_d=1, diffloss_w=16, buffer_size=2, dropout=0.0)
    arguments |= dict(img_size=SIDE, patch_size=4, channels=3, class_num=CLASSES)
    module = interop.from_reference("mar", arguments, state)
    assert module.state_dict().keys() == state.keys()
    # so many images that one of them hides less than all of its four patches
    images, y = torch.zeros(16, SIDE, SIDE, 3, dtype=torch.uint8), torch.arange(16) % (CLASSES + 1)
    module(images, y, torch.arange(16), 7, Objective())["loss"].sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())


def test_weights_that_do_not_fit_are_named(state: dict[str, Tensor]) -> None:
    for change, said in (
        ({"mask_token": None}, "missing mask_token"),
        ({"strange": torch.zeros(2)}, "extra strange"),
        ({"z_proj.bias": torch.zeros(3)}, r"z_proj.bias is \[3\], wanted \[768\]"),
    ):
        changed = {name: value for name, value in (state | change).items() if value is not None}
        with pytest.raises(ValueError, match=said):
            interop.native("mar", changed)
    with pytest.raises(ValueError, match="not a MAR state dict: missing z_proj.weight"):
        interop.native("mar", {"class_emb.weight": torch.zeros(3, 768)})


def test_a_width_of_no_published_size_is_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="a MAR of width 24 and 768: not a published size"):
        interop.native("mar", state | {"z_proj.weight": torch.zeros(24, 48)})


def test_a_bare_state_dict_is_read_and_another_file_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "bare.pth")
    assert interop.read_published(tmp_path / "bare.pth", "mar").keys() == state.keys()
    torch.save({"weights": state}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="a MAR checkpoint has one of model_ema, model, this file has none"):
        interop.read_published(tmp_path / "other.pth", "mar")


def test_the_publics_arguments_are_translated() -> None:
    arguments = dict(encoder_embed_dim=768, encoder_depth=12, encoder_num_heads=12, decoder_embed_dim=768)
    arguments |= dict(decoder_depth=12, decoder_num_heads=12, diffloss_d=6, diffloss_w=1024)
    settings, side, classes = form.config(arguments | dict(img_size=256, vae_stride=16))
    assert (side, classes) == (16, 1000) and (settings.channels, settings.patch_size) == (16, 1)
    assert settings.class_tokens == 64 and settings.mask_low == 0.7 and settings.draws_per_patch == 4
    with pytest.raises(ValueError, match="unknown vae_strid"):
        form.config(arguments | dict(vae_strid=16))
