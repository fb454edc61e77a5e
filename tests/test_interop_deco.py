"""Published DeCo weights: the reference numbers, their files, and what is refused."""

from pathlib import Path

import pytest
import torch
from support.golden import Golden, relative

from pixelgen_fast import interop
from pixelgen_fast.cli import main
from pixelgen_fast.models import deco
from pixelgen_fast.runs import draw


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("deco")


def test_names_and_shapes_are_the_public_ones_in_their_order(golden: Golden) -> None:
    module = interop.from_reference("deco", golden.config, golden.state)
    assert all(torch.equal(value, golden.state[name]) for name, value in module.state_dict().items())
    config, image_size, num_classes = interop.public("deco").config(golden.config)
    shapes = interop.public("deco").public_shapes(config, image_size, num_classes)
    assert list(shapes.items()) == [(name, tuple(value.shape)) for name, value in golden.state.items()]


def test_the_size_is_read_from_the_weights(golden: Golden) -> None:
    state, config, num_classes = interop.native("deco", golden.state)
    assert (config, 32, num_classes) == interop.public("deco").config(golden.config)
    model = deco.build(config, 32, num_classes)
    model.load_state_dict(state)
    assert relative(model(golden.x, golden.t, golden.y), golden.output) < 1e-5


def test_import_of_a_lightning_file(golden: Golden, tmp_path: Path) -> None:
    """The average is taken, beside raw weights and the projector; what is loaded gives the reference output."""
    state = {"ema_denoiser." + name: value for name, value in golden.state.items()}
    state |= {"denoiser." + name: value * 0.5 for name, value in golden.state.items()}
    state["diffusion_trainer.proj.0.0.weight"] = torch.zeros(4, 4)
    torch.save({"state_dict": state, "epoch": 3, "global_step": 17}, tmp_path / "published.ckpt")
    out = tmp_path / "imported"
    assert main(["import", str(tmp_path / "published.ckpt"), str(out), "--system", "deco", "--image-size", "32"]) == 0
    loaded = draw.load(out)
    assert relative(loaded.model(golden.x, golden.t, golden.y), golden.output) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("dec_net.cond_embed.bias"), "missing dec_net.cond_embed.bias"),
        (lambda s: s.update(strange=torch.zeros(2)), "extra strange"),
        (
            lambda s: s.update({"x_embedder.embedder.0.weight": torch.zeros(16, 3)}),
            r"x_embedder.embedder.0.weight is \[16, 3\], wanted \[16, 67\]",
        ),
        (lambda s: s.pop("dec_net.input_proj.weight"), "not a DeCo state dict: missing dec_net.input_proj.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(golden: Golden, change, message: str) -> None:
    state = dict(golden.state)
    change(state)
    with pytest.raises(ValueError, match=message):
        interop.native("deco", state)


def test_unknown_config_key_is_named(golden: Golden) -> None:
    with pytest.raises(ValueError, match="unknown patchsize"):
        interop.from_reference("deco", golden.config | {"patchsize": 8}, golden.state)
