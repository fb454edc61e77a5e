"""The hours in the header of every configuration are those of its plan; 24 GB are enough where they are promised."""

import re
from pathlib import Path

import pytest

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.planning.command import estimate

CONFIGS = Path(__file__).parents[2] / "configs"
SAID = re.compile(
    r"# Hardware: (\d+) (H100|RTX 4090)[^\n]*?Modelled, not measured: "
    r"([\d.]+) to ([\d.]+) (hours|days) \(pixelgen plan\)"
)
CARDS = {"H100": "h100", "RTX 4090": "4090"}
PLANNED = [path for path in sorted(CONFIGS.glob("*.yaml")) if "Modelled, not measured" in path.read_text()]


def load(path: Path) -> cfg.Config:
    return cfg.load(path, [], models.model_schema)


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_a_header_says_planned_to_pessimistic(path: Path) -> None:
    gpus, card, low, high, unit = SAID.search(path.read_text()).groups()
    config, hours = load(path), 24 if unit == "days" else 1
    found = estimate(config, CARDS[card], int(gpus), memory=False)
    for text, case in ((low, "planned"), (high, "pessimistic")):
        last_digit = 10.0 ** -len(text.partition(".")[2])
        wanted = found.hours(case, config.train.images) / hours
        assert float(text) == pytest.approx(wanted, rel=0.02, abs=last_digit), case


def test_every_header_with_a_gpu_has_such_hours() -> None:
    """But the decoder's, which is no run of pixelgen train, and the small model's, which names none."""
    of_gpus = {path for path in CONFIGS.glob("*.yaml") if re.search(r"# Hardware: \d+ \w", path.read_text())}
    assert of_gpus - set(PLANNED) == {CONFIGS / "decoder_imagenet256.yaml"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_24gb.yaml")), ids=lambda path: path.stem)
def test_24_gb_are_enough(path: Path) -> None:
    config = load(path)
    found = estimate(config, "4090", 1)
    assert found.machine.card.memory == 24e9
    assert found.fits() and found.accumulation > 1 and config.train.recompute == "blocks"
