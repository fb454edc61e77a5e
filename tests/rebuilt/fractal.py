"""FractalGen: the loss told the real patches, with every gradient, and the guided logits of a color."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rebuilt import Comparison, GoldenFile
from torch import Tensor

from pixelgen_fast.interop.fractal import FORM
from pixelgen_fast.models.fractal import Fractal, build
from pixelgen_fast.models.fractal_levels import neighbours
from pixelgen_fast.models.fractal_pixel import PixelNetwork, guided, pixel_loss, to_values

NEIGHBOURS = ("middle", "top", "right", "bottom", "left")


def fractal(file: GoldenFile) -> Iterator[Comparison]:
    settings, size, classes = FORM.config(file.config)
    public = {name: value.requires_grad_() for name, value in file.state().items()}
    native = FORM.to_native(public, settings)
    model = build(settings, size, classes)
    model.load_state_dict(native)

    seen: list[Tensor] = []
    model.levels[0].register_forward_hook(lambda level, inputs, z: seen.append(z))
    x = file["x"].clone().requires_grad_()
    stages = list(model.predictions(x, file["y"], lambda depth, rows: mask_of(file, model, depth)))
    losses = torch.stack([pixel_loss(s.logits, s.values, settings.red_weight).mean() for s in stages])
    losses.sum().backward()
    # the gradients of packed weights, led back to those that they were packed of
    weights = dict(model.named_parameters())
    torch.autograd.backward(list(native.values()), [weights[name].grad for name in native])

    yield "loss", losses.sum(), file["loss"]
    yield "pixel_losses", losses, file["pixel_losses"]
    yield "grad_x", x.grad, file["grad_x"]
    yield "logits_last", stages[-1].logits[: len(file["logits_last"])], file["logits_last"]
    if model.masked:
        for name, found in zip(NEIGHBOURS, neighbours(seen[0]).unbind(2), strict=True):
            yield f"cond0_{name}", found, file[f"cond0_{name}"]
    yield from file.gradients(public)


def mask_of(file: GoldenFile, model: Fractal, depth: int) -> tuple[Tensor | None, Tensor | None]:
    if not model.masked:
        return None, None
    masked = file[f"mask{depth}"].bool()
    return masked, masked.flatten().nonzero()[:, 0]


def fractal_cfg(file: GoldenFile) -> Iterator[Comparison]:
    c = file.config
    network = PixelNetwork(c["c_channels"], c["width"], c["depth"], c["num_heads"])
    public = {f"next_fractal.{name}": value for name, value in file.state().items()}
    settings = FORM.config(dict(img_size_list=[1, 1], embed_dim_list=[c["c_channels"], c["width"]],
                                num_blocks_list=[1, c["depth"]], num_heads_list=[1, c["num_heads"]],
                                generator_type_list=["mar", "ar"]))[0]  # fmt: skip
    native = FORM.to_native(public, settings)
    network.load_state_dict({name.removeprefix("pixels."): value for name, value in native.items()})
    values = to_values(file["pixels"])
    logits = network(file["cond"], torch.cat([values, values])[:, :2])
    yield "logits", logits, file["logits"]
    found = guided(*(c["temperature"] * logits).chunk(2), c["cfg"], c["filter_threshold"])
    yield "guided", found, file["guided"]


SYSTEMS = {"fractal": fractal, "fractal_cfg": fractal_cfg}
