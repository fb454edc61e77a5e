"""The section `data.validation`: images that a run never trains on, whose loss it measures now and then."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pixelgen_fast.settings import SEEDS, ConfigError, above, within


@dataclass
class Validation:
    # the share of data.root that is held out, chosen by the images' names and this seed, which is not run.seed: runs of
    # other seeds are measured on the same images and noise; 0: none
    share: float = within(0, 1, open_high=True, default=0.0)
    seed: int = within(*SEEDS, default=0)
    # another data set of the same classes, instead of a share
    root: str | None = None
    # how many of the images are looked at, and how often; they stay in memory as bytes
    images: int = above(0, default=512, most=1_000_000)
    every_images: int = above(0, default=256_000)
    # images of one forward pass
    batch: int = above(0, default=64, most=65_536)

    @property
    def on(self) -> bool:
        return self.share > 0 or self.root is not None

    def check(self) -> None:
        """Raise ConfigError for settings that contradict each other or are of no use."""
        if self.share > 0 and self.root is not None:
            raise ConfigError(
                f"data.validation.share is {self.share:g} and data.validation.root {self.root}; leave out one of them"
            )
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if given and not self.on:
            raise ConfigError(
                f"data.validation.{given[0]} is given, but nothing is held out; set data.validation.share or .root"
            )
