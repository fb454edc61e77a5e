"""Published weights: the reference numbers, the file formats, and what is refused."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.golden import Golden, position_table, relative

from pixelgen_fast import interop
from pixelgen_fast.cli import main
from pixelgen_fast.models import jit, pixeldit
from pixelgen_fast.runs import draw


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("pixeldit")


@pytest.mark.parametrize("system", ["pixeldit", "jit", "deco"])
@pytest.mark.parametrize("body", ["reference", "triton"])
def test_output_loss_and_every_gradient_match_the_published_code(
    system: str, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIXELGEN_OPS", body)
    golden = Golden(system)
    module = interop.from_reference(system, golden.config, golden.state)
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
    model = pixeldit.build(config, golden.config["image_size"], num_classes)
    model.load_state_dict(state)
    assert relative(model(golden.x, golden.t, golden.y), golden.output) < 1e-5


@pytest.mark.parametrize("system", ["pixeldit", "jit"])
def test_state_dict_keeps_the_public_names(system: str) -> None:
    golden = Golden(system)
    module = interop.from_reference(system, golden.config, golden.state)
    state = module.state_dict()
    assert state.keys() == golden.state.keys()
    assert all(torch.equal(state[name], golden.state[name]) for name in state)


def test_post_modulation_slots_follow_the_public_rows() -> None:
    """Row pixel * 4C + slot * C + channel of the public weight is slot `slot` of that pixel."""
    form = interop.public("pixeldit")
    config = pixeldit.Settings(hidden_size=24, num_heads=2, patch_depth=1, patch_size=2, pixel_depth=1,
                                     pixel_hidden_size=4, post_modulation=True)  # fmt: skip
    shapes = form.public_shapes(config, 8, 3)
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    native = form.to_native(state, config)
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


def test_a_position_table_that_the_model_does_not_compute_is_refused() -> None:
    golden = Golden("jit")
    swapped = golden.state["pos_embed"].unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    with pytest.raises(ValueError, match="pos_embed is not the table that the model computes"):
        interop.from_reference("jit", golden.config, golden.state | {"pos_embed": swapped})


@pytest.mark.parametrize("system", ["pixeldit", "jit"])
def test_unknown_config_key_is_named(system: str) -> None:
    golden = Golden(system)
    with pytest.raises(ValueError, match="unknown patchsize"):
        interop.from_reference(system, golden.config | {"patchsize": 8}, golden.state)
    with pytest.raises(ValueError, match="in_channels must be 3"):
        interop.from_reference(system, golden.config | {"in_channels": 4}, golden.state)
    config = {key: value for key, value in golden.config.items() if key != "hidden_size"}
    with pytest.raises(ValueError, match="missing hidden_size"):
        interop.from_reference(system, config, golden.state)


def test_unknown_system_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="no public layout for 'dit'; valid: pixeldit, jit, deco"):
        interop.from_reference("dit", {}, {})


@pytest.mark.parametrize("prefixes", [("ema_denoiser.",), ("denoiser.",), ("denoiser.", "ema_denoiser.")])
def test_import_of_lightning_files(
    golden: Golden, tmp_path: Path, caplog: pytest.LogCaptureFixture, prefixes: tuple[str, ...]
) -> None:
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
    assert ("holds no ema weights" in caplog.text) == (prefixes == ("denoiser.",))
    loaded = draw.load(out)
    assert relative(loaded.model(golden.x, golden.t, golden.y), golden.output) < 1e-5


def small_jit() -> tuple[jit.Settings, dict[str, torch.Tensor]]:
    """JiT with the depth of B and random weights under the published names, for images of 16 pixels and 3 classes."""
    config = jit.Settings(hidden_size=16, num_heads=2, patch_size=4, bottleneck=6, context_length=2)
    generator = torch.Generator().manual_seed(0)
    shapes = interop.public("jit").public_shapes(config, 16, 3)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return config, state | {"pos_embed": position_table(4, 16)}


@pytest.mark.parametrize(("weights", "scale"), [("ema", 1.0), ("ema2", 1.1), ("raw", 0.9)])
def test_import_of_jit_files(tmp_path: Path, weights: str, scale: float) -> None:
    """Three sets of weights, and the command line as a Namespace; size and classes are read from the weights."""
    config, state = small_jit()

    def entry(factor: float) -> dict[str, torch.Tensor]:
        return {f"net.{name}": value * (1.0 if name == "pos_embed" else factor) for name, value in state.items()}

    content = {"model": entry(0.9), "model_ema1": entry(1.0), "model_ema2": entry(1.1), "epoch": 2}
    torch.save(content | {"args": argparse.Namespace(model="JiT-B/16", lr=None)}, tmp_path / "checkpoint-last.pth")
    command = ["import", str(tmp_path / "checkpoint-last.pth"), str(tmp_path / "out"), "--system", "jit"]
    assert main([*command, "--weights", weights]) == 0
    loaded = draw.load(tmp_path / "out")
    assert loaded.config.data.image_size == 16 and len(loaded.classes) == 3 and loaded.config.model == config
    assert (loaded.config.objective.predict, loaded.config.objective.noise_scale) == ("x", 16 / 256)
    z, t, y = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 3])
    public = {"hidden_size": 16, "depth": 12, "num_heads": 2, "patch_size": 4, "bottleneck_dim": 6, "num_classes": 3}
    public |= {"input_size": 16, "in_context_len": 2, "in_context_start": 4}
    scaled = {name: value if name == "pos_embed" else value * scale for name, value in state.items()}
    expected = interop.from_reference("jit", public, scaled)(z, t, y)
    assert relative(loaded.model(z, t, y), expected) < 1e-5


def test_import_of_jit_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "checkpoint-last.pth"

    def refused(*arguments: str) -> str:
        assert main(["import", str(file), str(tmp_path / "out"), "--system", "jit", *arguments]) == 2
        return capsys.readouterr().err

    torch.save({"state_dict": {}}, file)
    assert "one of model_ema1, model_ema2, model" in refused()
    _, state = small_jit()
    torch.save({"model": {f"net.{name}": value for name, value in state.items()}}, file)
    assert "was made for 16 pixels" in refused("--image-size", "32")
    less = {f"net.{name}": value for name, value in state.items() if not name.startswith("blocks.11")}
    torch.save({"model": less}, file)
    assert "a JiT of 11 blocks: where its context tokens enter is known for 12, 24, 32, 40 blocks only" in refused()
    assert not (tmp_path / "out").exists()


def test_import_names_what_is_wrong(golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "broken.ckpt"

    def refused(*arguments: str) -> str:
        assert main(["import", str(file), str(tmp_path / "out"), "--system", "pixeldit", *arguments]) == 2
        return capsys.readouterr().err

    assert "no such file" in refused()
    assert "a pixeldit file has no 'ema2'; valid: ema, raw" in refused("--weights", "ema2")
    file.write_bytes(b"not a checkpoint")
    assert "not a readable PyTorch checkpoint" in refused()
    torch.save({"model": {}}, file)
    assert "'state_dict'" in refused()
    torch.save({"state_dict": {"encoder.weight": torch.zeros(1)}}, file)
    assert "no key begins with ema_denoiser. or denoiser." in refused()
    state = {"ema_denoiser." + name: value for name, value in golden.state.items()}
    del state["ema_denoiser.patch_blocks.1.attn.qkv.weight"]
    torch.save({"state_dict": state}, file)
    assert "missing patch_blocks.1.attn.qkv.weight" in refused()
    assert not (tmp_path / "out").exists()


FORMS = ("plain", "legacy", "ddp", "compiled", "numpy", "half", "safetensors", "alone", "bare")


def written(form: str, system: str, state: dict[str, torch.Tensor], file: Path) -> None:
    """A checkpoint in one of the forms that people have. The raw weights are not those of the average."""
    wrapper = {"ddp": "module.", "compiled": "_orig_mod."}.get(form, "")
    state = {name: value.bfloat16() if form == "half" else value for name, value in state.items()}
    raw = {name: value if name == "pos_embed" else value + 1 for name, value in state.items()}
    if system == "jit":
        sets = {"model": raw, "model_ema1": state}
        content = {key: {f"{wrapper}net.{name}": v for name, v in one.items()} for key, one in sets.items()}
        alone = content["model_ema1"]
    else:
        sets = {"denoiser.": raw, "ema_denoiser.": state}
        alone = {f"{prefix}{wrapper}{name}": v for prefix, one in sets.items() for name, v in one.items()}
        content = {"state_dict": alone, "epoch": 3}
    if form == "numpy":
        content["best_fid"] = np.float64(4.2)
    if form == "safetensors":
        save_file({name: value.clone() for name, value in alone.items()}, file)
    else:
        content = {"alone": alone, "bare": state}.get(form, content)
        torch.save(content, file, _use_new_zipfile_serialization=form != "legacy")


@pytest.mark.parametrize("system", ["pixeldit", "jit"])
@pytest.mark.parametrize("form", FORMS)
def test_weights_come_as_people_have_them(golden: Golden, tmp_path: Path, system: str, form: str) -> None:
    state = golden.state if system == "pixeldit" else small_jit()[1]
    written(form, system, state, tmp_path / "file")
    found = interop.read_published(tmp_path / "file", system)
    assert found.keys() == state.keys()
    assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in found.items())
    interop.native(system, found)


def test_values_among_the_weights_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {"denoiser.a": torch.ones(1), "denoiser.b": 3}}, tmp_path / "file")
    with pytest.raises(ValueError, match="file: denoiser.b are no weights by name"):
        interop.read_published(tmp_path / "file", "pixeldit")
