"""The same images as a folder, a tar, WebDataset's pairs and Parquet shards: nothing that is done with them differs.

Each form goes through all commands on data: index, scan, pack, bench, train, and as the reference of an evaluation.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from support.inception import POOLED, register_pooled
from support.runs import rows, train

from pixelgen_fast.cli import main
from pixelgen_fast.config import Data
from pixelgen_fast.data.bench import bench
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.pack import pack
from pixelgen_fast.data.scan import scan
from pixelgen_fast.eval.fid import evaluate_fid

CLASSES = {"cat": 10, "dog": 14}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the forms are; the tables of tars' members are kept there too."""
    root = tmp_path_factory.mktemp("forms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIXELGEN_CACHE", str(root / "cache"))
        yield root


@pytest.fixture(scope="module")
def tree(folder: Path, make_photo: Callable[..., np.ndarray]) -> Path:
    """JPEG images of two classes in a folder each, numbered through, sides of 20 to 43 pixels."""
    root = folder / "tree"
    for k in range(sum(CLASSES.values())):
        place = root / ("cat" if k < CLASSES["cat"] else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_photo(20 + k, 43 - k, k)).save(place / f"{k:03d}.jpg", quality=95)
    return root


def files(tree: Path) -> list[tuple[str, str, bytes]]:
    """(class, name, bytes) of the images of a tree, in the order of an index."""
    return [(path.parent.name, path.stem, path.read_bytes()) for path in sorted(tree.rglob("*.jpg"))]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def as_tar(tree: Path, out: Path) -> Path:
    with tarfile.open(out.with_suffix(".tar"), "w") as archive:
        for kind, name, data in files(tree):
            add(archive, f"{kind}/{name}.jpg", data)
    return out.with_suffix(".tar")


def as_pairs(tree: Path, out: Path, beside: Callable[[str], tuple[str, bytes]]) -> Path:
    """WebDataset's shards: an image and what names its class, in two files."""
    out.mkdir()
    images = files(tree)
    for number, part in enumerate((images[:7], images[7:])):
        with tarfile.open(out / f"shard-{number:06d}.tar", "w") as archive:
            for kind, name, data in part:
                ending, text = beside(kind)
                add(archive, f"{name}.jpg", data)
                add(archive, f"{name}.{ending}", text)
    return out


def as_cls(tree: Path, out: Path) -> Path:
    return as_pairs(tree, out, lambda kind: ("cls", kind.encode()))


def as_json(tree: Path, out: Path) -> Path:
    return as_pairs(tree, out, lambda kind: ("json", json.dumps({"label": kind, "width": 1}).encode()))


def as_parquet(tree: Path, out: Path) -> Path:
    """Hugging Face's image shards: structures of bytes and path, labels with their names in the metadata."""
    out.mkdir()
    names, images = sorted(CLASSES), files(tree)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    info = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", image), ("label", pa.int64())], info)
    for number, part in enumerate((images[:9], images[9:])):
        held = [{"bytes": data, "path": f"{name}.jpg"} for _, name, data in part]
        table = pa.table({"image": held, "label": [names.index(kind) for kind, *_ in part]}, schema)
        parquet.write_table(table, out / f"train-{number:05d}-of-00002.parquet", row_group_size=4)
    return out


FORMS = {"tar": as_tar, "pairs with .cls": as_cls, "pairs with .json": as_json, "parquet": as_parquet}


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest, tree: Path, folder: Path) -> Path:
    return FORMS[request.param](tree, folder / request.param.replace(" ", "-"))


@pytest.fixture(scope="module")
def as_a_tree(tree: Path, folder: Path) -> SimpleNamespace:
    """What the commands leave of the folder itself: report, packed folder, losses of a run, FID as a reference."""
    return everything(tree, folder / "of-tree")


def everything(root: Path, out: Path) -> SimpleNamespace:
    report = scan(root, out=out.with_suffix(".json"), workers=0)
    pack(root, out / "packed", 16, workers=0)
    own = ["model.patch_depth=1", "optimizer.warmup_images=0", "data.crop=adm", "data.num_classes=null"]
    assert main(train(out / "run", 48, *own, f"data.root={root}")) == 0
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (24, 16, 16, 3), generator=generator, dtype=torch.uint8)
    register_pooled()
    judged = evaluate_fid(drawn, root, extractor=POOLED)
    return SimpleNamespace(
        report=json.loads(out.with_suffix(".json").read_text()),
        classes=report.classes,
        packed=[(out / "packed" / name).read_bytes() for name in ("images.npy", "labels.npy")],
        losses=[row["loss"] for row in rows(out / "run")],
        judged=(judged.fid, judged.reference["count"]),
    )


def test_an_image_number_means_the_same_image_and_class(form: Path, tree: Path) -> None:
    index, folder = open_index(form), open_index(tree)
    assert index.classes == folder.classes == ["cat", "dog"]
    assert [(index.read(i), index.label(i)) for i in range(len(index))] == [
        (folder.read(i), folder.label(i)) for i in range(len(folder))
    ]


def test_batches_are_the_same_over_epochs_with_balanced_classes_too(form: Path, tree: Path) -> None:
    order = Order(seed=3, global_batch=8, micro_batch=8)
    for balanced in (False, True):
        settings = Data(image_size=16, workers=0, threads=1, flip=True, class_balanced=balanced)
        with Loader(open_index(tree), order, settings) as here, Loader(open_index(form), order, settings) as there:
            for _ in range(5):
                expected, found = next(here), next(there)
                assert np.array_equal(expected.images, found.images)
                assert np.array_equal(expected.labels, found.labels)


def test_nothing_that_is_done_with_it_differs(form: Path, folder: Path, as_a_tree: SimpleNamespace) -> None:
    """Scanned and packed, bit for bit; trained on, to the same losses; a reference of the same distance."""
    found = everything(form, folder / f"of-{form.stem}")
    assert found.classes == CLASSES
    for key in as_a_tree.report.keys() - {"root", "kind"}:
        assert found.report[key] == as_a_tree.report[key], key
    for what in ("packed", "losses", "judged"):
        assert getattr(found, what) == getattr(as_a_tree, what), what


def test_its_index_and_its_loader_are_described(form: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "index", str(form)]) == 0
    assert "24 images in 2 classes" in capsys.readouterr().out
    report = bench(open_index(form), 16, per_gpu=450, cores=[1], turns=1, seconds=0.05, providers=["loader"])
    assert (report.root, report.images) == (str(form), 24)
    assert report.rows[0].rates[0] > 0
