"""Published PixelDiT weights: the reference numbers, the file formats, and what is refused."""

from pathlib import Path

import pytest
import torch
from golden_reference import Golden, relative

from pixelgen_fast import interop
from pixelgen_fast.cli import main
from pixelgen_fast.engine import generator


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("pixeldit")


@pytest.mark.parametrize("body", ["reference", "triton"])
def test_output_loss_and_every_gradient_match_the_published_code(
    golden: Golden, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIXELGEN_OPS", body)
    module = interop.from_reference("pixeldit", golden.config, golden.state)
    x = golden.x.clone().requires_grad_()
    output = module(x, golden.t, golden.y)
    loss = (output * golden.w).mean()
    loss.backward()
    assert relative(output, golden.output) < 1e-5
    assert loss.item() == pytest.approx(golden.loss, rel=1e-5)
    assert relative(x.grad, golden.grad_x) < 1e-5
    parameters = dict(module.named_parameters())
    assert parameters.keys() == golden.grad_norms.keys()
    for name, norm in golden.grad_norms.items():
        assert parameters[name].grad.double().norm().item() == pytest.approx(norm, rel=1e-5), name


def test_native_model_gives_the_same_output(golden: Golden) -> None:
    state, config, num_classes = interop.native("pixeldit", golden.state)
    model = interop.pixeldit.build(config, golden.config["image_size"], num_classes)
    model.load_state_dict(state)
    assert relative(model(golden.x, golden.t, golden.y), golden.output) < 1e-5


def test_state_dict_keeps_the_public_names(golden: Golden) -> None:
    module = interop.from_reference("pixeldit", golden.config, golden.state)
    state = module.state_dict()
    assert state.keys() == golden.state.keys()
    assert all(torch.equal(state[name], golden.state[name]) for name in state)


def test_post_modulation_slots_follow_the_public_rows() -> None:
    """Row pixel * 4C + slot * C + channel of the public weight is slot `slot` of that pixel."""
    config = interop.pixeldit.Config(hidden_size=24, num_heads=2, patch_depth=1, patch_size=2, pixel_depth=1,
                                     pixel_hidden_size=4, post_modulation=True)  # fmt: skip
    shapes = interop.pixeldit_public_shapes(config, 3)
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    native = interop.pixeldit_to_native(state, config)
    public = state["pixel_blocks.0.adaLN_modulation.0.weight"]
    assert torch.equal(native["pixel_blocks.0.modulation_mlp.weight"], public)
    assert not any("modulation_attn" in name for name in native)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("s_embedder.proj.bias"), "missing s_embedder.proj.bias"),
        (lambda s: s.update(strange=torch.zeros(2)), "extra strange"),
        (
            lambda s: s.update({"pixel_embedder.proj.bias": torch.zeros(3)}),
            r"pixel_embedder.proj.bias is \[3\], wanted \[16\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(golden: Golden, change, message: str) -> None:
    state = dict(golden.state)
    change(state)
    with pytest.raises(ValueError, match=message):
        interop.from_reference("pixeldit", golden.config, state)


def test_unknown_config_key_is_named(golden: Golden) -> None:
    with pytest.raises(ValueError, match="unknown patchsize"):
        interop.from_reference("pixeldit", golden.config | {"patchsize": 8}, golden.state)


@pytest.mark.parametrize("prefixes", [("ema_denoiser.",), ("denoiser.",), ("denoiser.", "ema_denoiser.")])
def test_import_of_lightning_files(golden: Golden, tmp_path: Path, prefixes: tuple[str, ...]) -> None:
    """Either prefix or both, beside the projector of the alignment loss; what is drawn is the reference output."""
    state = {}
    for prefix in prefixes:
        scale = 0.5 if prefix == "denoiser." and len(prefixes) == 2 else 1.0
        state |= {prefix + name: value * scale for name, value in golden.state.items()}
    state["diffusion_trainer.proj.0.0.weight"] = torch.zeros(4, 4)
    torch.save({"state_dict": state, "epoch": 3, "global_step": 17}, tmp_path / "published.ckpt")
    out = tmp_path / "imported"
    command = ["import", str(tmp_path / "published.ckpt"), str(out), "--system", "pixeldit", "--image-size", "32"]
    assert main(command) == 0
    loaded = generator.load(out)
    assert relative(loaded.model(golden.x, golden.t, golden.y), golden.output) < 1e-5


def test_import_names_what_is_wrong(golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "broken.ckpt"

    def refused() -> str:
        assert main(["import", str(file), str(tmp_path / "out"), "--system", "pixeldit"]) == 2
        return capsys.readouterr().err

    assert "no such file" in refused()
    file.write_bytes(b"not a checkpoint")
    assert "not a readable PyTorch checkpoint" in refused()
    torch.save({"model": {}}, file)
    assert "'state_dict'" in refused()
    torch.save({"state_dict": {"encoder.weight": torch.zeros(1)}}, file)
    assert "no key begins with denoiser." in refused()
    state = {"ema_denoiser." + name: value for name, value in golden.state.items()}
    del state["ema_denoiser.patch_blocks.1.attn.qkv.weight"]
    torch.save({"state_dict": state}, file)
    assert "missing patch_blocks.1.attn.qkv.weight" in refused()
    assert not (tmp_path / "out").exists()
