"""The loader against PIL (pixels) and against the formula of the image number written out here (order)."""

import io
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from pixelgen_kernels import philox
from support.loading import SEED, joined, loader_of, same, take

from pixelgen_fast.data.crop import centre_crop
from pixelgen_fast.data.encoded import to_rgb
from pixelgen_fast.data.order import position


def by_index(root, size, count, **settings) -> np.ndarray:
    """The images of the first epoch in index order, as numpy."""
    batch = take(root, 1, image_size=size, global_batch=count, micro_batch=count, **settings)[0]
    order = [position(SEED, n, count) for n in range(count)]
    images = np.empty_like(batch.images.numpy())
    images[order] = batch.images.numpy()
    return images


# --- which image stands where


def test_numbers_labels_and_images_follow_the_formula_over_epochs(small_tree):
    got = joined(take(small_tree, 6, start=3))
    assert got.images.dtype == torch.uint8 and got.images.shape == (24, 12, 12, 3)
    assert got.labels.dtype == got.numbers.dtype == torch.int64
    assert got.numbers.tolist() == list(range(3, 27))
    index = [position(5, n, 11) for n in range(3, 27)]
    assert got.labels.tolist() == [0 if i < 4 else 1 for i in index]
    assert torch.equal(got.images[:, 0, 0, 0], torch.tensor([20 * i for i in index], dtype=torch.uint8))
    assert sorted(index[8:19]) == list(range(11))


@pytest.mark.parametrize("world, micro", [(1, 2), (2, 3), (3, 1), (3, 4)])
def test_ranks_and_micro_batches_cut_one_global_batch(small_tree, world, micro):
    whole = take(small_tree, 2, global_batch=12, micro_batch=12, flip=True)
    each = 12 // world // micro
    cut = [take(small_tree, 2 * each, global_batch=12, micro_batch=micro, rank=r, world=world, flip=True)
           for r in range(world)]  # fmt: skip
    for step in range(2):
        parts = [joined(rank[step * each : (step + 1) * each]) for rank in cut]
        assert same(joined(parts), whole[step])


def test_resumed_batches_are_bit_identical(small_tree):
    through = take(small_tree, 5, flip=True)
    resumed = take(small_tree, 2, flip=True, start=12)
    assert same(joined(resumed), joined(through[3:]))


def test_one_class_fewer_images_than_a_batch(small_tree):
    got = take(small_tree / "a", 1, global_batch=10, micro_batch=10)[0]
    assert got.labels.tolist() == [0] * 10
    assert got.images[:, 0, 0, 0].tolist() == [20 * position(5, n, 4) for n in range(10)]


def test_flip_mirrors_the_images_whose_number_says_so(tmp_path, make_photo):
    Image.fromarray(make_photo(12, 12)).save(tmp_path / "one.png")
    upright, flipped = (take(tmp_path, 1, global_batch=64, micro_batch=64, flip=f)[0] for f in (False, True))
    mirrored = philox.uniform(5, torch.arange(64), philox.FLIP, 1)[:, 0] < 0.5
    assert 20 < mirrored.sum() < 44
    assert torch.equal(flipped.images[~mirrored], upright.images[~mirrored])
    assert np.array_equal(flipped.images[mirrored].numpy(), upright.images[mirrored].numpy()[:, :, ::-1])


def test_batches_stay_as_they_were_when_more_are_drawn(small_tree):
    with loader_of(small_tree) as loader:
        first = next(loader)
        kept = first.images.clone()
        for _ in range(6):
            next(loader)
        assert torch.equal(first.images, kept)
        assert loader.wait_seconds > 0
    with pytest.raises(ValueError, match="closed"):
        next(loader)


# --- pixels

SIZE = 64
# height x width: enlarged, shrunk, of the size already; then halved 1, 2, 3 and 4 times with even sides on the way
EVEN = [(40, 50), (75, 100), (127, 127), (64, 64), (130, 200), (128, 128), (256, 300), (512, 648), (1104, 1280)]
# an odd side is halved once or more
ODD = [(129, 161), (131, 200), (301, 420), (703, 901)]


def bilinear(image):
    return _adm_like(image, Image.Resampling.BILINEAR)


def lanczos(image):
    return _adm_like(image, Image.Resampling.LANCZOS)


def nearest(image):
    return _adm_like(image, Image.Resampling.NEAREST)


def _adm_like(image, resample, halve=True):
    while halve and min(image.size) >= 2 * SIZE:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = SIZE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample)
    x, y = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return image.crop((x, y, x + SIZE, y + SIZE))


@pytest.fixture(scope="module")
def cropped(tmp_path_factory, make_photo):
    """For each size: the image, the loader's crop of it and the reference, the crops as int arrays."""
    root = tmp_path_factory.mktemp("sizes")
    images = {}
    for k, (height, width) in enumerate(EVEN + ODD):
        images[height, width] = Image.fromarray(make_photo(height, width, k))
        images[height, width].save(root / f"{k:02d}.png", compress_level=1)
    got = by_index(root, SIZE, len(images), crop="adm").astype(int)
    return {s: (im, got[k], np.asarray(centre_crop(im, SIZE), dtype=int)) for k, (s, im) in enumerate(images.items())}


@pytest.mark.parametrize("size", EVEN, ids=str)
def test_crop_is_adms_to_a_quarter_grey_level(cropped, size):
    # Measured: mean 0 to 0.22, max 1 (4 beside saturated edges): between the two directions of the bicubic filter PIL
    # rounds and clips, and DALI does not.
    _, got, expected = cropped[size]
    error = np.abs(got - expected)
    assert error.mean() <= 0.25
    assert error.max() <= 4


@pytest.mark.parametrize("size", ODD, ids=str)
def test_crop_is_adms_but_for_one_row_and_column_when_odd_sides_are_halved(cropped, size):
    # PIL's box filter averages three pixels in the middle of an odd side, the loader two. The bicubic filter spreads
    # that over at most 4 pixels to each side of the image's middle, which the crop keeps in its own middle.
    # Measured: mean 0.14 to 0.48 over all, and the bounds of even sides away from the middle.
    _, got, expected = cropped[size]
    error = np.abs(got - expected)
    assert error.mean() <= 0.5
    apart = np.abs(np.arange(SIZE) + 0.5 - SIZE / 2) > 5
    assert error[apart][:, apart].mean() <= 0.25
    assert error[apart][:, apart].max() <= 4


def test_the_bound_tells_wrong_filters_apart(cropped):
    for size in ((75, 100), (127, 127), (130, 200)):
        image, _, expected = cropped[size]
        for wrong in (bilinear, lanczos, nearest):
            assert np.abs(np.asarray(wrong(image), dtype=int) - expected).mean() > 0.25, (size, wrong)
    for size in ((130, 200), (128, 128), (256, 300), (512, 648), (1104, 1280)):
        image, _, expected = cropped[size]
        once = np.asarray(_adm_like(image, Image.Resampling.BICUBIC, halve=False), dtype=int)
        assert np.abs(once - expected).mean() > 0.9, size


def png16(pixels: np.ndarray) -> bytes:
    """A 16-bit PNG, grey [H, W] or RGB [H, W, 3], written from the format's definition (PIL writes no 16-bit RGB)."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def exotic_files(image: Image.Image) -> dict[str, bytes]:
    def saved(im, format, **options):
        file = io.BytesIO()
        im.save(file, format, **options)
        return file.getvalue()

    rng = np.random.default_rng(1)
    alpha = Image.fromarray(rng.integers(0, 256, (image.height, image.width), dtype=np.uint8))
    rgba, grey_alpha = image.copy(), image.convert("L")
    rgba.putalpha(alpha)
    grey_alpha.putalpha(alpha)
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = image.quantize(40)
    frames = [image.rotate(90 * k) for k in range(3)]
    return {
        "progressive.jpg": saved(image, "JPEG", progressive=True),
        "full-chroma.jpg": saved(image, "JPEG", subsampling=0, quality=95),
        "grey.jpg": saved(image.convert("L"), "JPEG"),
        "cmyk.jpg": saved(image.convert("CMYK"), "JPEG"),
        "sideways.jpg": saved(image, "JPEG", exif=turned),
        "trailing.jpg": saved(image, "JPEG") + bytes(3000),
        "gif-named.jpg": saved(image, "GIF"),
        "grey.png": saved(image.convert("L"), "PNG"),
        "bits.png": saved(image.convert("1"), "PNG"),
        "palette.png": saved(palette, "PNG"),
        "palette-clear.png": saved(palette, "PNG", transparency=3),
        "colour-key.png": saved(image, "PNG", transparency=image.getpixel((3, 3))),
        "alpha.png": saved(rgba, "PNG"),
        "grey-alpha.png": saved(grey_alpha, "PNG"),
        "sideways.png": saved(image, "PNG", exif=turned),
        "moving.png": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "lossy.webp": saved(image, "WEBP"),
        "lossless.webp": saved(image, "WEBP", lossless=True),
        "alpha.webp": saved(rgba, "WEBP", lossless=True),
        "sideways.webp": saved(image, "WEBP", exif=turned),
        "moving.webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
    }


def test_every_kind_of_file_decodes_to_pils_rgb(tmp_path, make_photo):
    files = exotic_files(Image.fromarray(make_photo(48, 48)))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    got = by_index(tmp_path, 48, len(files))
    for pixels, name in zip(got, sorted(files), strict=True):
        expected = np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB"))
        assert np.array_equal(pixels, expected), name


def test_16_bit_files_keep_their_high_byte(tmp_path, make_photo):
    deep = make_photo(48, 48).astype(np.uint16) * 256 + 201
    (tmp_path / "a.png").write_bytes(png16(deep[..., 0]))
    (tmp_path / "b.png").write_bytes(png16(deep))
    grey, rgb = by_index(tmp_path, 48, 2)
    assert np.array_equal(grey, np.repeat(deep[..., :1] >> 8, 3, axis=2))
    assert np.array_equal(rgb, deep >> 8)
    assert np.array_equal(grey, np.asarray(to_rgb(Image.open(tmp_path / "a.png"))))


def test_large_exotic_files_are_cropped_alike(tmp_path, make_photo):
    image = Image.fromarray(make_photo(300, 420)).convert("CMYK")
    image.save(tmp_path / "large.jpg", quality=95)
    got = by_index(tmp_path, SIZE, 1, crop="adm")[0]
    expected = np.asarray(centre_crop(Image.open(tmp_path / "large.jpg").convert("RGB"), SIZE))
    assert np.abs(got.astype(int) - expected).mean() <= 0.3


ORPHAN = """
import multiprocessing, os, sys
if __name__ == "__main__":
    from pixelgen_fast.config import Data
    from pixelgen_fast.data.dali import Loader
    from pixelgen_fast.data.index import open_index
    from pixelgen_fast.data.order import Order
    settings = Data(image_size=12, crop="none", workers=1)
    loader = Loader(open_index(sys.argv[1]), Order(seed=0, global_batch=2, micro_batch=2), settings)
    next(loader)
    print(multiprocessing.active_children()[0].pid, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_readers_end_with_a_killed_trainer(small_tree, tmp_path):
    (tmp_path / "trainer.py").write_text(ORPHAN)
    command = [sys.executable, str(tmp_path / "trainer.py"), str(small_tree)]
    # The reader holds the trainer's output streams too, so this returns only when both have ended.
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert int(done.stdout) > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_crop_none_names_the_image_of_another_size(small_tree, workers):
    Image.new("RGB", (12, 13)).save(small_tree / "b" / "07.png")
    with pytest.raises(ValueError, match=r"07.png has 13 x 12 pixels, not 12 x 12: crop 'none'"):
        take(small_tree, 3, workers=workers)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"global_batch": 10, "micro_batch": 4}, "global_batch 10 is not a multiple of micro_batch 4 x 1 ranks = 4"),
        ({"global_batch": 4, "micro_batch": 4, "world": 2}, "4 x 2 ranks = 8"),
        ({"rank": 1}, "rank 1 must lie from 0 to 0"),
        ({"start": -1}, "start -1"),
        ({"image_size": 0}, "image_size 0"),
        ({"crop": "left"}, "crop 'left' is none of adm, none"),
        ({"workers": -1}, "workers -1 must be at least 0"),
        ({"decoder": "gpu"}, "neither 'cpu' nor 'mixed'"),
        ({"decoder": "mixed"}, "needs a GPU"),
    ],
)
def test_impossible_settings_are_refused_at_once(small_tree, settings, message):
    with pytest.raises(ValueError, match=message):
        take(small_tree, 0, **settings)


@pytest.mark.gpu
def test_gpu_batches_are_close_to_the_cpus(tmp_path, make_photo):
    for k in range(8):
        Image.fromarray(make_photo(150 + 40 * k, 200, k)).save(tmp_path / f"{k}.jpg", quality=95)
    settings = {"image_size": SIZE, "crop": "adm", "global_batch": 8, "micro_batch": 4, "flip": True}
    cpu = joined(take(tmp_path, 2, **settings))
    for decoder, bound in (("cpu", 1.0), ("mixed", 2.0)):
        gpu = joined(take(tmp_path, 2, **settings, device="cuda", decoder=decoder))
        assert all(part.device.type == "cuda" for part in gpu)
        assert torch.equal(gpu.labels.cpu(), cpu.labels) and torch.equal(gpu.numbers.cpu(), cpu.numbers)
        error = (gpu.images.cpu().int() - cpu.images.int()).abs().float()
        assert error.mean() <= bound
