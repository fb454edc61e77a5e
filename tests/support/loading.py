"""Batches of a data set, and the settings that the loader's tests share."""

import torch

from pixelgen_fast.config import Data
from pixelgen_fast.data import Batch
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.order import Order

SEED = 5
PLAIN = {"image_size": 12, "crop": "none", "workers": 0, "threads": 1}
ORDER = {"seed": SEED, "global_batch": 4, "micro_batch": 4}


def loader_of(root, device="cpu", decoder=None, **changes) -> Loader:
    """A loader over a data set; changes: of its order and of its settings."""
    order = {key: changes.pop(key, value) for key, value in (ORDER | dict(rank=0, world=1, start=0)).items()}
    return Loader(open_index(root), Order(**order), Data(**(PLAIN | changes)), device, decoder)


def take(root, count, **changes) -> list[Batch]:
    with loader_of(root, **changes) as loader:
        return [next(loader) for _ in range(count)]


def joined(batches) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
