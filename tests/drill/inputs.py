"""Bad input of every kind: each must give a result, or one line that names the place.

A kind is a strategy of hypothesis for inputs, what the product does with one, and words that an error must contain.
"""

from __future__ import annotations

import functools
import io
import json
import resource
import shutil
import signal
import tarfile
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from pixelgen_fast import config as cfg
from pixelgen_fast import interop, models
from pixelgen_fast.cli import main
from pixelgen_fast.data.encoded import decode
from pixelgen_fast.data.index import open_index
from pixelgen_fast.errors import InputError, UserError, line, printable
from pixelgen_fast.models import pixeldit
from pixelgen_fast.models.system import System
from pixelgen_fast.runs import draw
from tests.drill.damage import CHANGES, Change, changed, damaged

DIGITS = Path(__file__).resolve().parents[2] / "configs" / "digits.yaml"
SECONDS = 20  # a single input that takes longer hangs
MEMORY = 6 * 2**30  # bytes that one may need beside what is loaded


@dataclass(frozen=True)
class Kind:
    """examples: of inputs. attempt(example, folder): use one; folder is empty. place(example): words, one of which must
    be in an error's line."""

    name: str
    examples: st.SearchStrategy
    attempt: Callable[[Any, Path], None]
    place: Callable[[Any], tuple[str, ...]]


def verdict(kind: Kind, example: Any, folder: Path) -> str:
    """Empty where the outcome is a result or one line that names the place; else what is wrong with it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with _limits():
            kind.attempt(example, folder)
    except UserError as error:
        if not str(error).strip():
            return f"{type(error).__name__} without a word"
        text = line(error)
        if not text.isprintable():
            return f"not one printable line: {text[:200]!r}"
        if not any(word in text for word in kind.place(example)):
            return f"does not name the place ({' or '.join(kind.place(example))}): {text[:300]}"
    except FileNotFoundError as error:
        return "" if str(folder) in str(error) else f"does not name the place: {error}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:200]}"
    return ""


class Hang(BaseException):
    """An input took longer than SECONDS."""


@contextmanager
def _limits() -> Iterator[None]:
    def hang(*_: object) -> None:
        raise Hang(f"longer than {SECONDS} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


# --- settings ---


def keys(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings and sections of a tree of dataclasses."""
    hints, found = get_type_hints(schema), []
    for entry in fields(schema):
        name, kind = f"{prefix}{entry.name}", hints[entry.name]
        found.append(name)
        if is_dataclass(kind):
            found += keys(kind, f"{name}.")
    return found


def all_keys() -> list[str]:
    own = [f"model.{name}" for system in models.systems() for name in keys(models.model_schema(system))]
    return sorted({*keys(cfg.Config), *own})


NUMBERS = st.one_of(
    st.sampled_from(["0", "-1", "1", "2", "3", "7", "16", "1e9", "1000000000", "-0.0", "1e-300", "1e400", "0x10"]),
    st.sampled_from([str(2**62), str(2**63 - 1), str(2**63), str(10**400)]),
    st.sampled_from([".inf", "-.inf", ".nan", "inf", "nan", "1_000", "1.5", "0.5", "007", "+1", "1e", "٣"]),
    st.integers().map(str),
    st.floats().map(str),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "null", "~", "true", "false", "yes", "None", "[]", "{}", "[1, 2]", "[0.5, .nan]", "{a: 1}"]
    ),
    st.sampled_from(
        ["${", "${x}", "${run.dir}", "${oc.env:HOME}", "!!python/object:os.system", "&a [*a]", "*a", "- x", "a: b: c"]
    ),
    st.sampled_from(
        [
            "'",
            '"',
            "'a",
            "#",
            " # b",
            "\x00",
            "\x1b[2J",
            "a\nb",
            "\t",
            "\ud800",
            "é",
            "…",
            "a" * 5000,
            "../x",
            "~/x",
            "/",
        ]
    ),
    st.text(max_size=20),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=5)), max_size=3).map(str),
)
VALUES = st.one_of(NUMBERS, TEXTS)


def overrides() -> st.SearchStrategy:
    key = st.one_of(st.sampled_from(all_keys()), st.text(max_size=12))
    return st.lists(st.tuples(key, VALUES).map(lambda pair: f"{pair[0]}={pair[1]}"), min_size=1, max_size=3)


def use_settings(given: list[str], folder: Path) -> None:
    config = cfg.load(DIGITS, [f"run.dir={folder}/run", *given], models.model_schema)
    cfg.to_yaml(config)
    cfg.from_dict(cfg.to_dict(config), models.model_schema)
    with torch.device("meta"):
        model = models.build_model(config, config.data.num_classes or 10)
    assert isinstance(model, System)


def settings_named(given: list[str]) -> tuple[str, ...]:
    """Of an override its key's last part or its section."""
    found = [text.split("=", 1)[0] for text in given]
    words = {printable(word) for key in found for word in (key.split(".")[0], key.rsplit(".", 1)[-1])}
    return (*sorted(words - {""}), "write key.sub=value")


def files() -> st.SearchStrategy:
    """A configuration with lines changed, bytes replaced, or anything at all."""
    original = DIGITS.read_bytes()
    return st.one_of(
        damaged(original),
        st.binary(max_size=60),
        st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")),
    )


def use_file(data: bytes, folder: Path) -> None:
    path = folder / "given.yaml"
    path.write_bytes(data)
    config = cfg.load(path, [f"run.dir={folder}/run"], models.model_schema)
    with torch.device("meta"):
        models.build_model(config, config.data.num_classes or 10)


# --- data ---


def encoded_images() -> list[bytes]:
    """One of each form that people have."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    forms = [("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "CMYK", {}), ("JPEG", "L", {})]
    forms += [("PNG", mode, {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
    forms += [
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
    ]
    found = []
    for form, mode, options in forms:
        image = Image.fromarray(pixels)
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        elif mode != "RGB":
            image = image.convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        found.append(buffer.getvalue())
    return found


def use_image(data: bytes, folder: Path) -> None:
    if decode(data).mode != "RGB":
        raise AssertionError("an image that is not RGB")


def tar_of_images() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, data in enumerate(encoded_images()[:3]):
            info = tarfile.TarInfo(f"class{number % 2}/{number}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read_all(root: Path) -> None:
    index = open_index(root)
    for i in range(len(index)):
        try:
            decode(index.read(i))
        except (InputError, OSError) as error:  # of one image, which training replaces
            if not str(error).strip():
                raise AssertionError("an error without a word") from error
        if not 0 <= index.label(i) < len(index.classes):
            raise AssertionError("a label that no class has")


def use_tar(data: bytes, folder: Path) -> None:
    path = folder / "images.tar"
    path.write_bytes(data)
    read_all(path)


def packed_files() -> dict[str, bytes]:
    found = {"classes.json": json.dumps(["a", "b"]).encode()}
    arrays = {"images.npy": np.zeros((4, 8, 8, 3), np.uint8), "labels.npy": np.array([0, 1, 0, 1])}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        found[name] = buffer.getvalue()
    return found


def one_damaged(originals: dict[str, bytes]) -> st.SearchStrategy:
    """(name of the damaged file, its bytes)."""
    return st.sampled_from(sorted(originals)).flatmap(lambda name: st.tuples(st.just(name), damaged(originals[name])))


def use_packed(given: tuple[str, bytes], folder: Path) -> None:
    for name, data in (packed_files() | dict([given])).items():
        (folder / name).write_bytes(data)
    read_all(folder)


# --- what a run leaves ---

SMALL = (
    "model.hidden_size=8", "model.num_heads=2", "model.patch_depth=1", "model.pixel_depth=1",
    "model.pixel_hidden_size=4", "optimizer.warmup_images=0", "train.images=8", "train.global_batch=4",
    "train.micro_batch=4", "save.every_images=4", "log.tensorboard=false", "sample.steps=1",
    "sample.grid_every_images=0", "sample.grid_classes=1", "sample.grid_per_class=1",
)  # fmt: skip


@functools.cache
def a_run() -> dict[str, bytes]:
    """The files of a small run with two checkpoints, and of its export."""
    with tempfile.TemporaryDirectory() as place, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        run, exported = Path(place, "run"), Path(place, "exported")
        assert main(["train", str(DIGITS), f"run.dir={run}", *SMALL]) == 0
        assert main(["export", str(run), str(exported)]) == 0
        return {str(p.relative_to(place)): p.read_bytes() for p in sorted(Path(place).rglob("*")) if p.is_file()}


def files_below(folder: str, content: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in content.items() if name.startswith(folder + "/")}


def use_folder(given: tuple[float, list[Change]], folder: Path, below: str, among: str) -> str:
    """Write the files below a folder, one of those in whose name `among` is with changes; its name."""
    content = files_below(below, a_run())
    names = [name for name in content if among in name]
    name = names[int(given[0] * len(names))]
    for other, data in content.items():
        path = folder / other
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(changed(data, given[1]) if other == name else data)
    return name


def use_run(given: tuple[float, list[Change]], folder: Path) -> None:
    """A damaged newest checkpoint gives the older one, and any checkpoint read is one that was written."""
    newest = max(name for name in a_run() if "checkpoints/" in name).rsplit("/", 1)[0]
    use_folder(given, folder, "run", newest)
    generator = draw.load(folder / "run")
    if not all(p.isfinite().all() for p in generator.model.parameters()):
        raise AssertionError("weights that are not finite")


def use_export(given: tuple[float, list[Change]], folder: Path) -> None:
    use_folder(given, folder, "exported", "")
    draw.load(folder / "exported")


@functools.cache
def published() -> bytes:
    """Weights in the public form of PixelDiT, as torch.save writes them."""
    settings = pixeldit.Settings(hidden_size=16, num_heads=2, patch_depth=1, pixel_depth=1, pixel_hidden_size=16)
    shapes = interop.public("pixeldit").public_shapes(settings, 32, 3)
    buffer = io.BytesIO()
    torch.save({"state_dict": {f"ema_denoiser.{name}": torch.zeros(shape) for name, shape in shapes.items()}}, buffer)
    return buffer.getvalue()


def use_published(changes: list[Change], folder: Path) -> None:
    path = folder / "published.pt"
    path.write_bytes(changed(published(), changes))
    interop.native("pixeldit", interop.read_published(path, "pixeldit"))


KINDS = {
    kind.name: kind
    for kind in (
        Kind("settings", overrides(), use_settings, settings_named),
        Kind("configuration file", files(), use_file, lambda _: ("given.yaml",)),
        Kind("image", st.sampled_from(encoded_images()).flatmap(damaged), use_image, lambda _: ("",)),
        Kind("tar", damaged(tar_of_images()), use_tar, lambda _: ("images.tar",)),
        Kind("run", st.tuples(st.floats(0, 1, exclude_max=True), CHANGES), use_run, lambda _: ("/run",)),
        Kind("export", st.tuples(st.floats(0, 1, exclude_max=True), CHANGES), use_export, lambda _: ("/exported",)),
        Kind("published weights", CHANGES, use_published, lambda _: ("published.pt", "pixeldit")),
        Kind("packed", one_damaged(packed_files()), use_packed, lambda given: (given[0], "packed folder", "/")),
    )
}
