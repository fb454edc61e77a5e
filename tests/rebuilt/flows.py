"""PixelDiT, JiT and DeCo: output, loss and every gradient of the public constructor's model."""

from __future__ import annotations

from collections.abc import Iterator

from rebuilt import Comparison, GoldenFile

from pixelgen_fast import interop


def rebuild(file: GoldenFile) -> Iterator[Comparison]:
    module = interop.from_reference(file.config["system"], file.config, file.state())
    x = file["x"].clone().requires_grad_()
    output = module(x, file["t"], file["y"])
    loss = (output * file["w"]).mean()
    loss.backward()
    yield "output", output, file["output"]
    yield "loss", loss, file["loss"]
    yield "grad_x", x.grad, file["grad_x"]
    yield from file.gradients(dict(module.named_parameters()))


SYSTEMS = dict.fromkeys(("pixeldit", "jit", "deco"), rebuild)
