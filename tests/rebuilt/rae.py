"""RAE: the encoder, the decoder, the discriminator with its losses and the adaptive weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import timm
import torch
from rebuilt import Comparison, GoldenFile
from torch import Tensor, nn
from torch.func import functional_call

from pixelgen_fast.dino.names import to_timm
from pixelgen_fast.rae import names
from pixelgen_fast.rae.autoencoder import Autoencoder
from pixelgen_fast.rae.decoder import Decoder, DecoderSettings
from pixelgen_fast.rae.discriminator import (
    Backbone,
    Discriminator,
    adaptive_weight,
    hinge_fake,
    hinge_real,
    quantised,
)
from pixelgen_fast.rae.encoder import Encoder, resized_positions
from pixelgen_fast.rae.files import Statistics

# of the decoder in a discriminator's file, which does not say it
_DECODER_HEADS = 4
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def leaves(file: GoldenFile, prefix: str = "", keys: str = "keys") -> dict[str, Tensor]:
    """The file's weights as tensors that take a gradient."""
    return {name: value.requires_grad_() for name, value in file.state(prefix, keys).items()}


def called(module: nn.Module, state: Mapping[str, Tensor], function: Callable[[nn.Module], Tensor]) -> Tensor:
    """function(module) with these weights in the place of its own, through which gradients pass."""

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self) -> Tensor:
            return function(self.inner)

    return functional_call(Caller(), {f"inner.{name}": value for name, value in state.items()})


def encoder(file: GoldenFile) -> Iterator[Comparison]:
    c, state = file.config, leaves(file)
    patch = file.keys["embeddings.patch_embeddings.projection.weight"][-1]
    size = dict(embed_dim=c["hidden_size"], depth=c["depth"], num_heads=c["num_heads"], patch_size=patch)
    size["reg_tokens"] = file.keys["embeddings.register_tokens"][1]
    size["mlp_ratio"] = file.keys["encoder.layer.0.mlp.fc1.weight"][0] / c["hidden_size"]
    network = timm.create_model(
        "vit_base_patch14_reg4_dinov2", num_classes=0, img_size=c["pos_image_size"], pretrained_cfg_overlay=IMAGENET,
        dynamic_img_size=False, **size,
    )  # fmt: skip
    before, grid = c["pos_image_size"] // patch, c["encoder_input"] // patch
    native = to_timm(state, network, str(file.path))
    native["pos_embed"] = resized_positions(native["pos_embed"], (before, before), grid, 0)
    rae = Autoencoder(Encoder(network, grid), None, Statistics(file["latent_mean"], file["latent_var"]))
    x = file["x"].clone().requires_grad_()
    output = called(
        rae.encoder, {f"network.{name}": value for name, value in native.items()}, lambda e: rae.standardise(e(x))
    )
    yield from _weighted(file, output, x, state)


def decoder(file: GoldenFile) -> Iterator[Comparison]:
    c, state = file.config, leaves(file)
    settings = DecoderSettings(c["decoder_hidden_size"], c["depth"], c["num_heads"], c["ffn"], c["patch_size"])
    module = Decoder(settings, c["latent_dim"], c["grid"], **IMAGENET)
    rae = Autoencoder(None, module, Statistics(file["latent_mean"], file["latent_var"]))
    x = file["x"].clone().requires_grad_()
    output = called(module, names.decoder_to_native(state), lambda m: (rae.decode(x) + 1) / 2)
    yield from _weighted(file, output, x, state)


def _weighted(file: GoldenFile, output: Tensor, x: Tensor, state: Mapping[str, Tensor]) -> Iterator[Comparison]:
    loss = (output * file["w"]).mean()
    loss.backward()
    yield "output", output, file["output"]
    yield "loss", loss, file["loss"]
    yield "grad_x", x.grad, file["grad_x"]
    yield from file.gradients(state)


def discriminator(file: GoldenFile) -> Iterator[Comparison]:
    c, shapes = file.config, file.texts["dino_keys"]
    kwargs = dict(embed_dim=c["embed_dim"], depth=c["depth"], num_heads=c["num_heads"], patch_size=c["patch_size"])
    kwargs["img_size"] = c["patch_size"] * round((shapes["pos_embed"][1] - 1) ** 0.5)
    kwargs["mlp_ratio"] = shapes["blocks.0.mlp.fc1.weight"][0] / c["embed_dim"]
    network = timm.create_model("vit_small_patch8_224.dino", num_classes=0, pretrained_cfg_overlay=IMAGENET, **kwargs)
    network.load_state_dict(file.state(c["dino_key_prefix"], "dino_keys"))
    module = Discriminator(Backbone(network, c["key_depths"]), c["ks"])
    state = file.state()
    vectors = {name for name in state if name.endswith(("weight_u", "weight_v"))}
    state = {n: v / v.norm() if n in vectors else v.requires_grad_() for n, v in state.items()}
    heads = names.heads_to_native(state)
    x = file["x"].clone().requires_grad_()
    yield from _weighted(file, functional_call(module, heads, (x,)), x, state)

    module.load_state_dict({name: value.detach() for name, value in heads.items()})
    yield from _adversary(file, module)


def _adversary(file: GoldenFile, module: Discriminator) -> Iterator[Comparison]:
    """The losses of both sides on a small decoder, and the weight between them."""
    state, z, target = leaves(file, keys="dec_keys"), file["z"], file["target"]
    grid, hidden = round(z.shape[1] ** 0.5), state["decoder_layers.0.intermediate.dense.bias"].numel()
    depth = len({name.split(".")[1] for name in state if name.startswith("decoder_layers.")})
    settings = DecoderSettings(file.config["dec"]["D"], depth, _DECODER_HEADS, hidden, file.config["dec"]["p"])
    decoder = Decoder(settings, z.shape[2], grid, **IMAGENET)
    latent = z.transpose(1, 2).unflatten(2, (grid, grid))
    rec = called(decoder, names.decoder_to_native(state), lambda m: m(latent))
    l1, gan = (rec - target).abs().mean(), -module(2 * rec - 1).mean()
    last = state["decoder_pred.weight"]
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (l1, gan)]
    weight = adaptive_weight(*norms)
    yield "rec", rec, file["rec"]
    yield "l1", l1, file["l1"]
    yield "gan_loss", gan, file["gan_loss"]
    yield "grad_norm_rec", norms[0], file["grad_norm_rec"]
    yield "grad_norm_gan", norms[1], file["grad_norm_gan"]
    yield "adaptive_weight", weight, file["adaptive_weight"]
    yield "total_loss", l1 + 0.75 * weight * gan, file["total_loss"]
    fake = quantised(2 * rec.detach() - 1)
    module.renew()
    loss = hinge_fake(module(fake))
    module.renew()
    loss = 0.5 * (loss + hinge_real(module(2 * target - 1)))
    yield "rec_quantised", fake, file["rec_quantised"]
    yield "d_hinge", loss, file["d_hinge"]


SYSTEMS = {"rae_encoder_dinov2_reg": encoder, "rae_decoder": decoder, "rae_disc": discriminator}
