"""MAR and its diffusion's network: states, losses and every gradient of the public constructor's model."""

from __future__ import annotations

from collections.abc import Iterator

from rebuilt import Comparison, GoldenFile
from torch import Tensor, nn
from torch.func import functional_call

from pixelgen_fast.interop import mar as form
from pixelgen_fast.models.mar import Mar, build
from pixelgen_fast.models.patch_heads import MlpHead
from pixelgen_fast.weights import rename

# what a file says of how it was made, and the constructor does not take
ABOUT = ("label_drop", "mode", "num_masked")


class Teaching(nn.Module):
    """A MAR on given masks, times and noise: (states, mean loss of the hidden tokens)."""

    def __init__(self, model: Mar) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor, hidden: Tensor, t_BLK: Tensor, e_BLKd: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.tokens(x)
        z = self.model.trunk(tokens, hidden, y, int((~hidden).sum(dim=1).max()))
        # what is told is data: the public code stops the gradient there
        losses = self.model.token_losses(z, tokens.detach(), t_BLK, e_BLKd)
        return z, losses[hidden].mean()


def rebuild(file: GoldenFile) -> Iterator[Comparison]:
    settings, side, num_classes = form.config({k: v for k, v in file.config.items() if k not in ABOUT})
    public = {name: value.requires_grad_() for name, value in file.state().items()}
    native = form.to_native(public, settings)
    hidden, x = file["mask"].bool(), file["x"].clone().requires_grad_()
    (B, L), K = hidden.shape, settings.draws_per_patch
    # the file repeats the whole set of tokens K times
    t, e = (file[name].unflatten(0, (K, B, L)).movedim(0, 2) for name in ("timesteps", "noise"))
    teaching = Teaching(build(settings, side, num_classes))
    z, loss = functional_call(
        teaching, {f"model.{name}": value for name, value in native.items()}, (x, file["y"], hidden, t, e)
    )
    z.retain_grad()
    loss.backward()
    yield "z", z, file["z"]
    yield "loss", loss, file["loss"]
    yield "grad_z", z.grad, file["grad_z"]
    yield "grad_x", x.grad, file["grad_x"]
    yield from file.gradients(public)


def rebuild_head(file: GoldenFile) -> Iterator[Comparison]:
    c = file.config
    head = MlpHead(c["in_channels"], c["z_channels"], c["model_channels"], c["num_res_blocks"], out=c["out_channels"])
    public = {name: value.requires_grad_() for name, value in file.state().items()}
    native = {rename(name, form.HEAD_NAMES): value for name, value in public.items()}
    assert native.keys() == head.state_dict().keys()
    x, condition = (file[name].clone().requires_grad_() for name in ("x", "c"))
    output = functional_call(head, native, (x, file["t"], condition))
    loss = (output * file["w"]).mean()
    loss.backward()
    yield "output", output, file["output"]
    yield "loss", loss, file["loss"]
    yield "grad_x", x.grad, file["grad_x"]
    yield "grad_c", condition.grad, file["grad_c"]
    yield from file.gradients(public)


SYSTEMS = {"mar": rebuild, "mar_head": rebuild_head}
