"""Every system through the same commands: train, stop, resume, sample, evaluate, export, and draw from the export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from support.models import TINY
from support.teachers import write_teacher

from pixelgen_fast import models
from pixelgen_fast.cli import main
from pixelgen_fast.models import alitok, built_on
from pixelgen_fast.models.alitok_tokenizer import load_tokenizer, save_tokenizer
from pixelgen_fast.runs import draw
from pixelgen_fast.runs.checkpoint import checkpoints, read_weights

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
V3 = "vit_small_patch16_dinov3_qkvb"
DINO = dict(dino=V3, weights="{teacher}")
SMALL = dict(hidden_size=24, num_heads=2, patch_size=4)
LATENT = dict(SMALL, head_width=32, head_heads=2, head_depth=1, latent_channels=48, encoder="patches")
PIXELDIT = dict(SMALL, pixel_hidden_size=8, pixel_depth=1)
STUDENT = dict(PIXELDIT, system="dino_student", **DINO)
FOLLOW = dict(teacher=V3, weights="{teacher}", layer=0, projector="none")
X = dict(predict="x", loss="v")
PIXELS = dict(patch_size=1, hidden_size=16, num_heads=2, depth=1)
FRACTAL = dict(SMALL, system="fractal", depth=1)
# what the digits set for flows, as it was
PLAIN = dict(objective=dict(time_shift=1.0), sample=dict(steps=100, shift=1.0, temperature=1.1))
PATCH_AR = dict(SMALL, system="patch_ar", depth=1, class_tokens=2, head_depth=1)
VARIANTS = {
    "pixeldit": dict(model=dict(PIXELDIT, system="pixeldit", patch_depth=1)),
    "pixeldit, by Muon": dict(
        model=dict(PIXELDIT, system="pixeldit", patch_depth=1), optimizer=dict(name="muon", weight_decay=0.1)
    ),
    "repa": dict(
        model=dict(PIXELDIT, system="pixeldit", patch_depth=1),
        alignment=dict(teacher=V3, weights="{teacher}", layer=1),
    ),
    "student as input": dict(model=dict(STUDENT, patch_depth=1), alignment=FOLLOW),
    "student as input, LoRA": dict(model=dict(STUDENT, patch_depth=1, tuning="lora", lora_rank=2), alignment=FOLLOW),
    "student as trunk": dict(model=dict(STUDENT, patch_depth=0, role="trunk"), alignment=FOLLOW),
    "frozen student": dict(model=dict(STUDENT, patch_depth=1, tuning="frozen")),
    "pixeldit2": dict(
        model=dict(SMALL, system="pixeldit2", depth=2, context_length=2, context_start=1, **DINO), objective=X
    ),
    "jit": dict(model=dict(SMALL, system="jit", depth=2, bottleneck=8, context_length=2, context_start=1), objective=X),
    "ditdh": dict(
        model=dict(LATENT, system="ditdh", depth=1),
        objective=dict(time_min=0.001, time_shift=2.0),
        sample=dict(solver="euler", end=0.999, shift=2.0),
    ),
    "raev2": dict(
        model=dict(LATENT, system="raev2", depth=2, time_tokens=1, class_tokens=2, base_depth=1),
        objective=X,
        sample=dict(guidance=1.78, interval=[-1.0, 0.9]),
    ),
    "deco": dict(
        model=dict(SMALL, system="deco", patch_depth=1, decoder_width=8, decoder_depth=1),
        objective=dict(frequency_weight=1.0),
    ),
    "patch autoregressor": dict(model=dict(PATCH_AR, head_width=16), objective=X),
    "patch autoregressor, masked": dict(
        model=dict(PATCH_AR, trunk="masked", head="pixel", pixel_channels=8, dropout=0.1),
        objective=X,
        sample=dict(passes=3, temperature=0.9),
    ),
    "patch autoregressor, bottleneck": dict(model=dict(PATCH_AR, head_width=16, bottleneck=4), objective=X),
    "fractal": dict(PLAIN, model=dict(FRACTAL, inner=[dict(PIXELS, passes=2)])),
    "fractal, causal": dict(PLAIN, model=dict(FRACTAL, generator="causal", guiding_pixel=False, inner=[PIXELS])),
}
GUIDED = dict(path="energy_guided", sigma0=2.0, release=[0.1, 0.9])
VARIANTS |= {
    "repa with registers, energy guided": dict(
        VARIANTS["repa"], model=dict(VARIANTS["repa"]["model"], registers=2), objective=GUIDED
    ),
    "jit, energy guided": dict(VARIANTS["jit"], objective=GUIDED | X),
    "alitok": dict(
        model=dict(TINY["alitok"], system="alitok", tokenizer="{teacher}/tokenizer"),
        objective=dict(time_shift=1.0),
        sample=dict(steps=100, shift=1.0, temperature=0.9),
    ),
    "mar": dict(
        model=dict(SMALL, system="mar", depth=1, class_tokens=2, head_width=16, head_depth=1),
        objective=dict(time_shift=1.0),
        sample=dict(passes=3, shift=1.0),
    ),
}
COMMON = OmegaConf.from_dotlist(
    [
        "optimizer.schedule=constant",
        "optimizer.warmup_images=0",
        "optimizer.ema=[0.5]",
        "train.global_batch=16",
        "train.micro_batch=8",
        "log.every_images=16",
        "log.tensorboard=false",
        "save.every_images=32",
        "sample.steps=2",
        "sample.grid_every_images=0",
    ]
)


def write_sources(folder: Path) -> Path:
    """All that a system may be built on: in the folder a DINO, and in a folder of its own there a tokenizer."""
    write_teacher(folder, V3)
    size = alitok.tokenizer_size(alitok.Settings(**TINY["alitok"]), grid=4)
    (folder / "tokenizer").mkdir()
    save_tokenizer(load_tokenizer(size, "random"), folder / "tokenizer")
    return folder


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return write_sources(tmp_path / "teacher")


def write_config(path: Path, variant: str, teacher: Path) -> Path:
    sections = OmegaConf.create(json.loads(json.dumps(VARIANTS[variant]).replace("{teacher}", str(teacher))))
    base = OmegaConf.load(DIGITS)
    del base["model"]
    path.write_text(OmegaConf.to_yaml(OmegaConf.merge(base, COMMON, sections)))
    return path


def trained(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    return read_weights(checkpoints(folder / "checkpoints")[0], kind)


def test_every_system_is_here() -> None:
    assert {variant["model"]["system"] for variant in VARIANTS.values()} == set(models.systems())


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_commands(variant: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Resumed is as whole, bit for bit; the run and its export draw the same, also when what they came from is gone."""
    config = write_config(tmp_path / "config.yaml", variant, teacher)
    whole, broken, out = tmp_path / "whole", tmp_path / "broken", tmp_path / "out"
    assert main(["train", str(config), f"run.dir={whole}", "train.images=64"]) == 0
    assert main(["train", str(config), f"run.dir={broken}", "train.images=32"]) == 0
    reads_teacher = "alignment" in VARIANTS[variant]
    if not reads_teacher:
        shutil.rmtree(teacher)
    capsys.readouterr()
    assert main(["train", str(config), f"run.dir={broken}", "train.images=64"]) == 0, capsys.readouterr().err
    assert "image 32 of 64" in capsys.readouterr().out
    for kind in ("raw", "ema_0.5"):
        expected, found = trained(whole, kind), trained(broken, kind)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    if reads_teacher:
        shutil.rmtree(teacher)

    assert main(["sample", str(broken), "--per-class", "1", "--classes", "3"]) == 0
    assert main(["evaluate", str(broken), "--samples", "20"]) == 0
    assert json.loads((broken / "evaluation.json").read_text())["report"]["generated"] == 20
    assert main(["export", str(broken), str(out)]) == 0
    labels = torch.arange(4)
    drawn = draw.load(whole).draw(labels)
    shutil.rmtree(broken)
    exported = draw.load(out)
    assert torch.equal(exported.draw(labels), drawn)
    assert drawn.float().std() > 0
    again = tmp_path / "again"
    assert main(["export", str(out), str(again)]) == 0
    shutil.rmtree(out)
    assert torch.equal(draw.load(again).draw(labels), drawn)
    assert main(["sample", str(again), "--per-class", "1", "--classes", "3"]) == 0


def test_a_copy_from_before_the_first_checkpoint_is_made_anew(teacher: Path, tmp_path: Path) -> None:
    """Without a checkpoint nothing depends on the copy, so it follows model.weights."""
    config, run = write_config(tmp_path / "config.yaml", "frozen student", teacher), tmp_path / "run"
    stale = run / built_on.DINO.name
    shutil.copytree(teacher, stale)
    state = stale / "model.safetensors"
    before = state.read_bytes()
    state.write_bytes(b"stale")
    assert main(["train", str(config), f"run.dir={run}", "train.images=16"]) == 0
    assert state.read_bytes() == before


def test_a_copy_that_cannot_be_written_is_said(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    config = write_config(tmp_path / "config.yaml", "frozen student", teacher)
    monkeypatch.setattr(built_on, "copy_dino", full)
    assert main(["train", str(config), f"run.dir={tmp_path / 'run'}", "train.images=16"]) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and str(tmp_path / "run" / "dino") in said
