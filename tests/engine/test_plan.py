"""The memory plan against a count by hand, and saved activations against what a CPU really keeps."""

from pathlib import Path

import pytest
import torch
from support.teachers import write_teacher
from torch import nn

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.engine.parallel import wrap_blocks
from pixelgen_fast.engine.plan import Plan, describe, plan, saved_bytes
from pixelgen_fast.models import pixeldit

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"


def test_state_bytes_by_stage() -> None:
    """1000 bf16 parameters, one average: 2 + 4 + 4 x 4 (master, moments, average) bytes each, sharded by stage."""
    p = Plan(parameters=1000, flops=0, activation_bytes=0, weight_bytes=2, averages=1)
    assert [p.state_bytes(stage, 1) for stage in (1, 2, 3)] == [22_000] * 3
    assert p.state_bytes(1, 4) == 6_000 + 16_000 / 4
    assert p.state_bytes(2, 4) == 2_000 + 20_000 / 4
    assert p.state_bytes(3, 4) == 22_000 / 4


def test_muon_keeps_one_moment() -> None:
    p = Plan(parameters=1000, flops=0, activation_bytes=0, weight_bytes=2, averages=1, by_muon=600)
    assert p.state_bytes(1, 1) == 22_000 - 4 * 600
    config = cfg.load(DIGITS, ["optimizer.name=muon"], models.model_schema)
    with torch.device("meta"):
        model = models.build_model(config, 10)
    planned = plan(model, config, "fp32")
    # q, k, v and proj, W1, W2, W3 of four blocks; two blocks of the pixel head with 16 pixels of 8 channels
    matrices = 4 * (4 * 96**2 + 3 * 96 * 256) + 2 * (4 * 96**2 + 2 * 96 * 128 + 2 * 8 * 32)
    assert planned.by_muon == matrices
    said = describe(planned, config, "fp32")
    assert f"of which Muon trains {matrices:,}" in said
    assert "stage 2" in said and "stage 3" not in said


class Toy(nn.Module):
    """Linear keeps its input (3 * 8 * 8 floats an image) and sigmoid its output (16 floats)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 16)

    def forward(self, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.linear(z.flatten(1)).sigmoid()

    def trial(self, batch: int) -> torch.Tensor:
        return self(torch.empty(batch, 3, 8, 8), torch.zeros(batch), torch.zeros(batch))


def test_saved_bytes_of_a_model_known_by_hand() -> None:
    with torch.device("meta"):
        assert saved_bytes(Toy()) == 4 * (192 + 16)


def test_weights_outside_of_the_model_are_no_activations() -> None:
    """A frozen network that is not a child, as a DINO or a tokenizer: its weights are there before and after."""

    class OnFrozen(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = (nn.Linear(192, 192).requires_grad_(False),)

        def forward(self, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(self.frozen[0](z.flatten(1)), t, y)

    with torch.device("meta"):
        assert saved_bytes(OnFrozen()) == 4 * (192 + 16)


def test_recomputation_keeps_less_and_less() -> None:
    """Whole blocks keep what passes between them; operators add their products; nothing recomputed adds the rest."""
    config = pixeldit.Settings(
        hidden_size=24, num_heads=2, patch_depth=2, patch_size=4, pixel_hidden_size=8, pixel_depth=2
    )
    kept = []
    for recompute in ("blocks", "operators", "none"):
        with torch.device("meta"):
            model = pixeldit.build(config, 16, 3)
        wrap_blocks(model.blocks(), recompute=recompute, compile_blocks=False)
        kept.append(saved_bytes(model, 64))
    assert kept == sorted(kept) and len(set(kept)) == 3


def test_saved_bytes_per_image_do_not_depend_on_the_batch() -> None:
    config = pixeldit.Settings(
        hidden_size=24, num_heads=2, patch_depth=1, patch_size=4, pixel_hidden_size=8, pixel_depth=1
    )
    with torch.device("meta"):
        model = pixeldit.build(config, 16, 3)
    assert saved_bytes(model, 64) == pytest.approx(saved_bytes(model, 256), rel=0.02)


def test_a_teacher_is_counted_and_has_to_fit(tmp_path: Path) -> None:
    """Products of a DINOv3 with 16 patches and 5 tokens before them, of width 48, and of a projector 96, 96, 96, 48."""
    name = "vit_small_patch16_dinov3"
    write_teacher(tmp_path / "t", name)
    settings = [f"alignment.teacher={name}", f"alignment.weights={tmp_path / 't'}", "alignment.layer=2"]

    def planned(*overrides: str) -> tuple[Plan, cfg.Config]:
        config = cfg.load(DIGITS, [*settings, *overrides], models.model_schema)
        with torch.device("meta"):
            model = models.build_model(config, 10)
        return plan(model, config, "fp32"), config

    patches, tokens, width = 16, 21, 48
    block = tokens * width * (3 * width + width + 2 * 4 * width) + 2 * tokens * tokens * width
    teacher = 2 * (patches * 48 * width + 2 * block)
    projector = 2 * patches * (96 * 96 + 96 * 96 + 96 * 48)
    p, config = planned()
    assert p.alignment_flops == (teacher, projector)
    said = f"{teacher / 1e9:.2f} teacher forward, {3 * projector / 1e9:.2f} projector forward and backward"
    assert said in describe(p, config, "fp32")
    with pytest.raises(ValueError, match="alignment.layer is 9 and the model has 4 patch blocks"):
        planned("alignment.layer=9")
