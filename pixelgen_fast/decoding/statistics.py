"""Mean and variance of each element of an encoder's latents over a data set, exact.

Every image counts once, mirrored as well where data.flip is set, and the sums of parts a and b are joined as
(Chan, Golub and LeVeque, 1983), in float64:

    n = n_a + n_b,   d = mean_b - mean_a,   mean = mean_a + d n_b / n,   M = M_a + M_b + d^2 n_a n_b / n,   var = M / n

The published statistics are those of a batch norm instead: running averages of momentum 0.1 over one epoch, begun at
mean 0 and variance 1, of the variances within batches. They weigh the last batches most and change with the order;
their authors' own second run differs from the released variances by 0.008 on average, these do not.
Shapes: B images, C latent channels, n x n latents; N images of the data set.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pixelgen_fast import errors
from pixelgen_fast.atomic import replaced
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.roots import open_root
from pixelgen_fast.decoding.schema import LATENTS, DecoderConfig
from pixelgen_fast.device import choose_device
from pixelgen_fast.diffusion.path import to_fractions
from pixelgen_fast.errors import InputError
from pixelgen_fast.rae.encoder import Encoder, load_encoder
from pixelgen_fast.rae.files import Statistics, statistics_about, write_statistics
from pixelgen_fast.signals import StopRequest


@dataclass
class Moments:
    """Sums of `count` latents. mean, squares: [C, n, n] in float64, the latter of the differences from the mean, M."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def none(cls, shape: tuple[int, ...], device: torch.device) -> Moments:
        zeros = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.clone())

    def add(self, z: Tensor) -> None:
        """Join the latents z [B, C, n, n], none of which is in yet."""
        z = z.double()
        mean, count = z.mean(dim=0), len(z)
        both, d = self.count + count, mean - self.mean
        self.squares += (z - mean).square().sum(dim=0) + d.square() * (self.count * count / both)
        self.mean += d * (count / both)
        self.count = both

    def statistics(self) -> Statistics:
        return Statistics(self.mean, self.squares / self.count)


class Summing:
    """A pass over the data set that goes on from the file `partial`, where that is of the same images and encoder.

    seen: images summed so far, in the order of the run.
    """

    def __init__(self, config: DecoderConfig, index: ImageIndex, encoder: Encoder, out: Path) -> None:
        self.config, self.index, self.encoder = config, index, encoder
        self.about = {
            "encoder": encoder.fingerprint(),
            "network": config.encoder.network,
            "layers": list(config.encoder.layers),
            "image_size": config.data.image_size,
            "crop": config.data.crop,
            "mirrored": config.data.flip,
            "images": len(index),
            "data": index.fingerprint,
        }
        self.partial = out.with_name(f".{out.name}.partial")
        self.device = choose_device(config.run.device)
        shape = (encoder.width, encoder.grid, encoder.grid)
        self.seen, self.moments = 0, Moments.none(shape, self.device)
        self.encoder.to(self.device)
        if self.partial.is_file():
            self._resume()

    def run(self, stop: StopRequest) -> bool:
        """Sum what is left; returns whether that is all, False where a signal came first."""
        batch, every, total = self.config.latents.batch, self.config.latents.save_every_images, len(self.index)
        order = Order(self.config.run.seed, batch, batch, start=self.seen)
        settings = replace(self.config.data, flip=False, class_balanced=False)  # every image once
        with (
            Loader(self.index, order, settings, self.device, asked=lambda: stop.requested) as loader,
            tqdm(total=total, initial=self.seen, unit="img", unit_scale=True, desc="latents") as bar,
        ):
            while self.seen < total and not stop.requested:
                images, _, numbers = next(loader)
                self.add(images[numbers < total])  # the last batch goes on with the next epoch
                before, self.seen = self.seen, min(self.seen + batch, total)
                bar.update(self.seen - before)
                if self.seen // every > before // every or stop.requested:
                    self._keep()
            self.about["unreadable"] = len(loader.replaced)
        return self.seen == total

    @torch.no_grad()
    def add(self, images: Tensor) -> None:
        """Sum the latents of images uint8 [B, S, S, 3]."""
        x = to_fractions(images)
        for view in [x, x.flip(3)] if self.config.data.flip else [x]:
            self.moments.add(self.encoder(view))

    def finish(self, out: Path) -> str:
        """Write the statistics; returns what to say of them."""
        statistics = self.moments.statistics()
        write_statistics(out, statistics, self.about | {"count": self.moments.count})
        self.partial.unlink(missing_ok=True)
        deviation = statistics.var.sqrt()
        return (
            f"{out}: mean and variance of latents {list(statistics.mean.shape)} over {self.moments.count:,} views of "
            f"{len(self.index):,} images; deviations from {deviation.min():.3g} to {deviation.max():.3g}"
        )

    def _keep(self) -> None:
        tensors = {"mean": self.moments.mean.cpu(), "squares": self.moments.squares.cpu()}
        state = {"about": self.about, "seen": self.seen, "count": self.moments.count}
        with replaced(self.partial) as work:
            save_file(tensors, work, metadata={"state": json.dumps(state)})

    def _resume(self) -> None:
        try:
            with safe_open(self.partial, framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                sums = [file.get_tensor(name).to(self.device) for name in ("mean", "squares")]
            if state["about"] == self.about and all(value.shape == self.moments.mean.shape for value in sums):
                self.seen, self.moments = int(state["seen"]), Moments(int(state["count"]), *sums)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.partial}: cannot be gone on from ({error}); remove it to begin anew") from error
        what = f"goes on at image {self.seen:,}" if self.seen else "begins anew: its images or encoder were others"
        print(f"{self.partial}: {what}")


def compute(config: DecoderConfig) -> str | None:
    """Write the statistics file; returns what to say of it, None where a signal stopped the work.

    The same command goes on from where it was stopped or killed. Raises InputError for a file of other statistics in
    that place, and for settings and data that do not fit.
    """
    out = Path(config.latents.out) if config.latents.out else Path(config.run.dir) / LATENTS
    e = config.encoder
    index = open_root(config.data.root, expected_classes=config.data.num_classes)
    summing = Summing(config, index, load_encoder(e.network, e.weights, config.grid, e.layers), out)
    if out.exists():
        _check_same(statistics_about(out), summing.about, out)
        return f"{out}: is there already, of the same images and encoder"
    out.parent.mkdir(parents=True, exist_ok=True)
    errors.begin()
    with StopRequest() as stop:
        return summing.finish(out) if summing.run(stop) else None


def _check_same(found: dict[str, Any], wanted: dict[str, Any], out: Path) -> None:
    changed = [f"{key} {found.get(key)} -> {value}" for key, value in wanted.items() if found.get(key) != value]
    if changed:
        raise InputError(f"{out} holds other statistics: {'; '.join(changed)}; name another file in latents.out")
