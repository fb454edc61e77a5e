"""Published AliTok weights: their names both ways, their files, the import command, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from support.golden import weight
from torch import Tensor

from pixelgen_fast import interop
from pixelgen_fast.cli import main
from pixelgen_fast.config import Objective, Sampling
from pixelgen_fast.interop import alitok
from pixelgen_fast.measure import evaluate
from pixelgen_fast.models.alitok import Settings, build
from pixelgen_fast.models.alitok_tokenizer import Tokenizer, TokenizerSize, public_name
from pixelgen_fast.runs import draw

TOKENIZER = TokenizerSize(
    grid=2, patch=4, prefix=3, words=24, vector=8, encoder_width=64, encoder_depth=1, encoder_heads=1,
    decoder_width=128, decoder_depth=2, decoder_heads=2, decoder_tokens=5,
)  # fmt: skip
SIZE = Settings(hidden_size=16, num_heads=2, depth=2, codebook_size=24)
CLASSES = 3
B, L, XL = ((768, 24), (1024, 24), (1280, 32))


def published() -> dict[str, Tensor]:
    return {name: weight(name, list(shape)) for name, shape in alitok.public_shapes(SIZE, 256, CLASSES).items()}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    with torch.device("meta"):
        shapes = {public_name(name): list(value.shape) for name, value in Tokenizer(TOKENIZER).state_dict().items()}
    torch.save({name: weight(name, shape) for name, shape in shapes.items()}, tmp_path / "AliTok.pth")
    return tmp_path / "AliTok.pth"


def test_weights_go_in_and_come_out_as_they_were() -> None:
    state = published()
    native, settings, num_classes = interop.native("alitok", state)
    assert num_classes == CLASSES and settings.codebook_size == 24 and settings.depth == 2
    assert native["transformer.y_embed.weight"].shape == (CLASSES + 1, 16)
    back = interop.public("alitok").to_public(native, settings)
    assert list(back) == list(state) and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("size", "guidance", "power", "soft"),
    [(B, 16.0, 1.8, False), (L, 6.0, 0.7, False), (XL, 9.0, 1.5, True), ((16, 2), 1.0, 1.5, True)],
)
def test_published_sizes_bring_their_guidance(size: tuple, guidance: float, power: float, soft: bool) -> None:
    width, depth = size
    settings = Settings(hidden_size=width, num_heads=16 if width > 16 else 2, depth=depth)
    state = {
        name: torch.empty(shape, device="meta") for name, shape in alitok.public_shapes(settings, 256, 1000).items()
    }
    native, found, num_classes = interop.native("alitok", state)
    assert (found.hidden_size, found.num_heads, found.depth) == (width, settings.num_heads, depth)
    assert (num_classes, found.guidance_power, found.softcfg) == (1000, power, soft)
    assert interop.settings("alitok", found, 256) == {"sample": {"guidance": guidance}}
    with torch.device("meta"):
        model = build(Settings(**vars(found) | {"tokenizer": "AliTok.pth"}), 256, 1000)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in native.items()}


@pytest.mark.parametrize("form", ["torch", "safetensors", "wrapped"])
def test_import_then_draw(form: str, tokenizer: Path, tmp_path: Path) -> None:
    """The folder holds the tokenizer too: it draws when the files are gone, and as a model made by hand draws."""
    state, file, out = published(), tmp_path / "alitok_xl.bin", tmp_path / "out"
    if form == "safetensors":
        save_file(state, file)
    else:
        torch.save({("module." if form == "wrapped" else "") + name: v for name, v in state.items()}, file)
    command = ["import", str(file), str(out), "--system", "alitok", "--tokenizer", str(tokenizer)]
    assert main(command) == 0
    settings, size = alitok.with_tokenizer(alitok.config_of(state), tokenizer)
    model = build(settings, size, CLASSES).eval()
    model.load_state_dict(alitok.to_native(state, settings))
    file.unlink()
    tokenizer.unlink()
    loaded = draw.load(out)
    assert loaded.config.data.image_size == 8 and len(loaded.classes) == CLASSES and loaded.weights == "raw"
    labels = torch.tensor([2, 0, 1])
    with torch.no_grad():
        wanted = model.draw(labels, torch.arange(3), Sampling(guidance=4.0), Objective(), lambda: None)
    found = loaded.draw(labels, guidance=4.0)
    assert torch.equal(found, draw.to_uint8(wanted))
    assert found.float().std() > 0
    assert main(["sample", str(out), "--per-class", "1", "--guidance", "4", "--temperature", "0.9"]) == 0
    assert len(list((out / "generated").rglob("*.png"))) == CLASSES + 1  # and a grid


def test_an_import_is_evaluated_like_any_other(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the judge, which has tests of its own: equal numbers of every class, of the tokenizer's size."""
    torch.save(published(), tmp_path / "alitok_b.bin")
    out, seen = tmp_path / "out", []
    command = ["import", str(tmp_path / "alitok_b.bin"), str(out), "--system", "alitok", "--tokenizer", str(tokenizer)]
    assert main(command) == 0
    report = SimpleNamespace(lines=list, as_dict=dict)

    class Judge:
        identity: ClassVar[dict] = {}

        def keep(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"images": images}

        def report(self, kept: dict[str, torch.Tensor], labels: torch.Tensor) -> SimpleNamespace:
            seen.append(kept["images"])
            return report

    monkeypatch.setattr(evaluate, "choose_judge", lambda *_: Judge())
    assert main(["evaluate", str(out), "--samples", "6", "--reference", "real", "--guidance", "9"]) == 0
    assert seen[0].shape == (6, 8, 8, 3) and seen[0].dtype == torch.uint8
    assert torch.equal(seen[0], draw.load(out).draw(torch.arange(6) % CLASSES, guidance=9.0))


def test_import_names_what_is_wrong(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "alitok_b.bin"

    def refused(state: object, *arguments: str) -> str:
        torch.save(state, file)
        given = arguments or ("--tokenizer", str(tokenizer))
        assert main(["import", str(file), str(tmp_path / "out"), "--system", "alitok", *given]) == 2
        return capsys.readouterr().err

    state = published()
    assert "--tokenizer: alitok needs this file beside its weights" in refused(state, "--image-size", "8")
    assert "nowhere: no such file or folder" in refused(state, "--tokenizer", "nowhere")
    assert "was made for 8 pixels" in refused(state, "--tokenizer", str(tokenizer), "--image-size", "16")
    assert "a alitok file has no 'ema'; valid: raw" in refused(state, "--weights", "ema")
    assert "a state dict alone" in refused({"model": state})
    assert "extra strange [2]" in refused(state | {"strange": torch.zeros(2)})
    assert "missing norm.weight" in refused({name: v for name, v in state.items() if name != "norm.weight"})
    assert "missing embeddings.weight" in refused({name: v for name, v in state.items() if name != "embeddings.weight"})
    fewer = {name: v[:-1] if name.startswith("output.") else v for name, v in state.items()}
    assert "has 24 words, and the model draws 23" in refused(fewer)
    torch.save({"latent_tokens": torch.zeros(7, 64)}, tokenizer)
    assert "not a AliTok tokenizer state dict: missing encoder.patch_embed.weight" in refused(state)
    assert not (tmp_path / "out").exists()


def test_other_systems_read_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="--tokenizer x: jit reads no such file"):
        interop.with_parts("jit", None, {"tokenizer": "x"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seq_len=300), "seq_len 300 is above 273"),
        (dict(none_condition_id=9), "none_condition_id 9 is not 35, the last embedding"),
        (dict(strange=1), "unknown strange"),
    ],
)
def test_arguments_of_the_public_constructor_are_checked(change: dict, message: str) -> None:
    arguments = dict(hidden_size=16, depth=2, num_heads=2, codebook_size=24, num_classes=10)
    settings, size, num_classes = alitok.config(arguments | {"none_condition_id": 35, "seq_len": 24})
    assert (settings.codebook_size, size, num_classes) == (24, 256, 10)
    with pytest.raises(ValueError, match=message):
        alitok.config(arguments | change)
