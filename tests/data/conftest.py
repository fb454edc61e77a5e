import numpy as np
import pytest
from PIL import Image


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3] with what a photograph has: large areas, fine regular texture and noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    areas = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    y, x = np.mgrid[:height, :width]
    texture = 30 * np.sin(x / 7 + y / 11)[..., None]
    return np.clip(areas + texture + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def make_photo():
    return photo


@pytest.fixture
def small_tree(tmp_path):
    """Eleven 12 x 12 PNG images in classes a (4), b (7); image k of the index is grey of level 20 k."""
    root = tmp_path / "tree"
    for k in range(11):
        folder = root / ("a" if k < 4 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 12, 3), 20 * k, dtype=np.uint8)).save(folder / f"{k:02d}.png")
    return root


@pytest.fixture
def mixed(tmp_path, make_photo):
    """Two readable and two unreadable images in class a, one sideways in b."""
    root = tmp_path / "mixed"
    (root / "a").mkdir(parents=True)
    (root / "b").mkdir()
    Image.fromarray(make_photo(40, 60)).save(root / "a" / "1.png")
    Image.fromarray(make_photo(300, 260, 1)).convert("L").save(root / "a" / "2.jpg")
    (root / "a" / "3.jpg").write_bytes((root / "a" / "2.jpg").read_bytes()[:5000])
    (root / "a" / "4.webp").write_bytes(b"")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(make_photo(49, 30, 2)).save(root / "b" / "5.webp", lossless=True, exif=exif)
    return root
