"""The loader and what it is compared with on the same image files: each gives micro-batches of crops without end.

    loader                        ours, read in process
    torchvision v2                transforms.v2 on what PIL decodes, in a DataLoader
    torchvision v2, decode_jpeg   the same on what torchvision.io decodes
    PIL                           the crop of crop.py, in a DataLoader
    DALI's file reader            fn.readers.file, DALI's decoder, resize and crop

`serve` is one of them in a process of its own, which may use some cores only and works while it is asked to. Libraries
are imported there, since some count the cores when they are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_WARM, _DRAINED = 3, 6  # micro-batches before the first measurement; and that may lie ready before each


@dataclass(frozen=True)
class Job:
    """root: folder of image files. size: pixels a side. batch: images of a micro-batch. cores: that may be used."""

    root: str
    size: int
    batch: int
    cores: tuple[int, ...]

    @property
    def files(self) -> list[str]:
        return sorted(str(path) for path in Path(self.root).rglob("*.*"))


def serve(pipe: Connection, name: str, job: Job) -> None:
    """Answer each number of seconds with (images, seconds, seconds of processor time); text instead says why not."""
    os.sched_setaffinity(0, job.cores)
    try:
        import torch

        torch.set_num_threads(len(job.cores))
        batches = PROVIDERS[name](job)
        for _ in range(_WARM):
            next(batches)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send("")
    try:
        while True:
            pipe.send(_measure(batches, job.batch, pipe.recv()))
    except (EOFError, ConnectionError):
        os._exit(0)  # processes of a DataLoader end by themselves with this one


def _measure(batches: Iterator[Any], batch: int, seconds: float) -> tuple[int, float, float]:
    for _ in range(_DRAINED):
        next(batches)
    images, busy, began = 0, _processor_seconds(), time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        next(batches)
        images += batch
    return images, took, _processor_seconds() - busy


def _processor_seconds() -> float:
    """Of this process and the living ones below it."""
    parents, ticks = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        parents[int(folder.name)], ticks[int(folder.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    mine = {os.getpid()}
    while below := {process for process, parent in parents.items() if parent in mine} - mine:
        mine |= below
    return sum(ticks.get(process, 0) for process in mine) / os.sysconf("SC_CLK_TCK")


def _loader(job: Job) -> Iterator[Any]:
    from pixelgen_fast.config import Data
    from pixelgen_fast.data.dali import Loader
    from pixelgen_fast.data.index import open_index
    from pixelgen_fast.data.order import Order

    settings = Data(image_size=job.size, workers=0, threads=len(job.cores))
    order = Order(seed=0, global_batch=job.batch, micro_batch=job.batch)
    return iter(Loader(open_index(job.root), order, settings, kept_bytes=0))


def _dali(job: Job) -> Iterator[Any]:
    from pixelgen_fast.data.pipeline import file_pipeline

    pipeline = file_pipeline(job.files, job.size, batch_size=job.batch, num_threads=len(job.cores), device_id=None)
    pipeline.build()
    while True:
        yield pipeline.run()[0].as_tensor()


def _torchvision(job: Job) -> Iterator[Any]:
    from PIL import Image
    from torchvision.transforms import v2

    steps = v2.Compose([v2.ToImage(), *_resize(job.size)])
    return data_loader(job.files, lambda file: steps(Image.open(file).convert("RGB")), job.batch, len(job.cores))


def _torchvision_io(job: Job) -> Iterator[Any]:
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    steps = v2.Compose(_resize(job.size))
    return data_loader(job.files, lambda file: steps(decode_image(file, ImageReadMode.RGB)), job.batch, len(job.cores))


def _resize(size: int) -> list[Callable]:
    from torchvision.transforms import v2

    return [v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)]


def _pil(job: Job) -> Iterator[Any]:
    return data_loader(job.files, lambda file: cropped_by_pil(file, job.size), job.batch, len(job.cores))


def cropped_by_pil(file: str, size: int) -> torch.Tensor:
    """The crop of crop.py of an image file, uint8 [size, size, 3]."""
    import numpy as np
    import torch

    from pixelgen_fast.data.crop import centre_crop
    from pixelgen_fast.data.encoded import decode

    return torch.from_numpy(np.array(centre_crop(decode(Path(file).read_bytes()), size)))


def data_loader(
    files: list[str], load: Callable[[str], torch.Tensor], batch: int, workers: int
) -> Iterator[torch.Tensor]:
    """PyTorch's DataLoader over image files in a random order, without end."""
    from torch.utils.data import DataLoader, Dataset, RandomSampler

    class Images(Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> torch.Tensor:
            return load(files[i])

    images = Images()
    order = RandomSampler(images, replacement=True, num_samples=2**40)
    return iter(DataLoader(images, batch, sampler=order, num_workers=workers, multiprocessing_context="fork"))


PROVIDERS: dict[str, Callable[[Job], Iterator[Any]]] = {
    "loader": _loader,
    "torchvision v2": _torchvision,
    "torchvision v2, decode_jpeg": _torchvision_io,
    "PIL": _pil,
    "DALI's file reader": _dali,
}
