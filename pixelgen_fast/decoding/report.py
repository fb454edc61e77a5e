"""What a decoder's run says of itself: rows of metrics, grids of images beside what becomes of them, its folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.order import Order
from pixelgen_fast.decoding import step
from pixelgen_fast.decoding.objective import NO_LOSSES
from pixelgen_fast.decoding.perceptual import NO_LPIPS
from pixelgen_fast.decoding.schema import DECODER, ENCODER
from pixelgen_fast.diffusion.path import to_fractions
from pixelgen_fast.diffusion.solver import to_uint8
from pixelgen_fast.engine.report import Report
from pixelgen_fast.eval.grid import save_grid
from pixelgen_fast.rae.decoder import Decoder
from pixelgen_fast.rae.files import save_decoder
from pixelgen_fast.runs.checkpoint import ema_key

_COLUMNS = 8


class DecoderReport(Report):
    """Its grids: rows of the run's first images, and under each what the average of the decoder makes of its latent."""

    images: Tensor | None = None

    def rate(self, nimg: int) -> float:
        return step.plan(self.parts.config, nimg, self.parts.total).decoder_lr

    def column(self, part: str) -> str:
        return part if part in NO_LOSSES else super().column(part)

    def sharding(self) -> str:
        return ""

    def finish(self, nimg: int, seconds: float, requested: Callable[[], bool]) -> bool:
        if self.parts.rank == 0:
            self.publish(nimg)
        return super().finish(nimg, seconds, requested)

    def publish(self, nimg: int) -> Path:
        """Write the decoder's folder: the first average of the weights, and a copy of the encoder."""
        p, c = self.parts, self.parts.config
        weights = ema_key(c.optimizer.ema[0])
        about = {
            "encoder": {"network": c.encoder.network, "layers": list(c.encoder.layers)},
            "data": {"root": c.data.root, "image_size": c.data.image_size, "crop": c.data.crop},
            "vgg": c.objective.vgg if c.objective.perceptual_weight else NO_LPIPS,
            "weights": weights,
            "nimg": nimg,
        }
        folder = p.folder.root / DECODER
        save_decoder(folder, self._averaged(p.engine.state_dict(weights)), about, encoder=p.folder.root / ENCODER)
        return folder

    @torch.no_grad()
    def _draw(
        self, state: dict[str, Tensor], weights: str, nimg: int, before_pass: Callable[[], object]
    ) -> tuple[Tensor, Tensor]:
        before_pass()
        images, objective = self._first_images(), self.parts.objective
        z = objective.encode(to_fractions(images))
        decoder = self._averaged(state).to(self.parts.device)
        return torch.stack([images, to_uint8(2 * decoder(z) - 1)]).cpu(), torch.empty(0)

    def _save_grid(self, images: Tensor, labels: Tensor, path: Path) -> None:
        columns = min(_COLUMNS, images.shape[1])
        rows = [part[k : k + columns] for k in range(0, images.shape[1], columns) for part in images]
        whole = [row for row in rows if len(row) == columns]
        titles = ["image", "decoded"] * (len(whole) // 2)
        save_grid(torch.cat(whole).numpy(), path, columns=columns, row_titles=titles)

    def _first_images(self) -> Tensor:
        """The first images of the run, cropped to the decoder's size: uint8 [n, S, S, 3] on the device."""
        if self.images is None:
            p, count = self.parts, self.parts.config.sample.grid_images
            settings = replace(p.config.data, workers=0)
            order = Order(p.config.run.seed, count, count)
            with Loader(p.index, order, settings, p.device) as loader:
                self.images = next(loader).images
        return self.images

    def _averaged(self, state: dict[str, Tensor]) -> Decoder:
        """A decoder with these weights, on the CPU."""
        own = self.parts.objective.decoder
        channels = (own.mean.flatten().tolist(), own.std.flatten().tolist())
        decoder = Decoder(own.settings, own.latent_dim, own.grid, *channels)
        decoder.load_state_dict(state)
        return decoder.eval()
