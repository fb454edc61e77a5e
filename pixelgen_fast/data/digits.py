"""The embedded images: scikit-learn's 1,797 real handwritten digits as PNG files, class by class.

load_digits gives 8x8 images with values 0 to 16 (Alpaydin and Kaynak, UCI "Optical Recognition of Handwritten Digits").
Each becomes 16x16 RGB:
    v -> round(255 v / 16), then a bicubic enlargement by 2 (PIL), the same in all three channels.
`to_8x8` goes back by the mean over 2x2 pixels and the channels, times 16/255; the bicubic filter makes the way there
and back inexact by 0.67 levels of 16 on average, alike for real and generated digits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from einops import rearrange, reduce
from PIL import Image

from pixelgen_fast.data.cache import cache_root, locked, published_folder
from pixelgen_fast.errors import InputError

COUNT = 1797
SIZE = 16
_PER_CLASS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)


def load_real() -> tuple[np.ndarray, np.ndarray]:
    """The real digits in scikit-learn's order: images uint8 [1797, 16, 16, 3], labels int64 [1797], 0 to 9."""
    # Imported here: it takes a second, and a run that finds its tree written needs none of it.
    from sklearn.datasets import load_digits

    source = load_digits()
    levels = np.round(source.images * (255 / 16)).astype(np.uint8)
    enlarged = [np.asarray(Image.fromarray(a).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for a in levels]
    return np.repeat(np.stack(enlarged)[..., None], 3, axis=-1), source.target.astype(np.int64)


def to_8x8(images: np.ndarray) -> np.ndarray:
    """Images uint8 [N, 16, 16, 3] -> float64 [N, 64] in 0 to 16, the scale and row order of load_digits.

    Raises ValueError for another shape or dtype.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
        raise InputError(f"digits must be uint8 [N, {SIZE}, {SIZE}, 3], got {images.dtype} {list(images.shape)}")
    small = reduce(images.astype(np.float64), "n (h a) (w b) c -> n h w", "mean", a=2, b=2)
    return rearrange(small, "n h w -> n (h w)") * (16 / 255)


def write_digits(cache_dir: str | Path | None = None) -> Path:
    """Write the digits as <cache>/digits/<class>/<number>.png unless they are there already; return that folder.

    cache_dir: None for the cache directory (see cache.py). Safe to call from several processes at once: one writes, the
    others wait. A tree with a file too few, too many or empty is written anew.
    """
    cache = Path(cache_dir).expanduser().absolute() if cache_dir is not None else cache_root()
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / "digits"
    with locked(cache / "digits.lock"):
        if not _complete(target):
            images, labels = load_real()
            with published_folder(target) as folder:
                for k in range(len(_PER_CLASS)):
                    (folder / str(k)).mkdir()
                for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                    Image.fromarray(image).save(folder / str(label) / f"{number:04d}.png")
    return target


def _complete(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    expected = {str(k): count for k, count in enumerate(_PER_CLASS)}
    present = {p.name: [f.stat().st_size for f in p.iterdir()] for p in folder.iterdir() if p.is_dir()}
    return {k: len(sizes) for k, sizes in present.items()} == expected and all(min(s) > 0 for s in present.values())
