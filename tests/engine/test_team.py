"""Several processes draw what one would."""

import json
from pathlib import Path

import pytest
from support.ranks import start_ranks
from support.runs import train

from pixelgen_fast.cli import main
from pixelgen_fast.engine.heartbeat import Heartbeat
from pixelgen_fast.engine.team import Team
from pixelgen_fast.errors import InputError

SECONDS = 120


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(train(folder, 16, "optimizer.warmup_images=0", "model.patch_depth=1")) == 0
    return folder


def on_two_ranks(arguments: list[str], code: int = 0) -> list[str]:
    """What the ranks said, once both have ended with this code."""
    ranks = start_ranks(arguments, 2)
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [code] * 2, said
    return said


def test_two_ranks_write_the_images_of_one_bit_for_bit(run: Path, tmp_path: Path) -> None:
    command = ["sample", str(run), "--classes", "3", "7", "--per-class", "5", "--batch", "3", "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    said = on_two_ranks([*command, str(tmp_path / "two")])
    assert "10 images in" in said[0] and "images in" not in said[1]
    one, two = (
        {p.relative_to(tmp_path / name).as_posix(): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert one == two and len(one) == 10 + 2
    said = on_two_ranks([*command, str(tmp_path / "two")], code=2)
    assert all("holds the images of an earlier command" in text for text in said)


def test_two_ranks_measure_what_one_measures(run: Path, tmp_path: Path) -> None:
    command = ["evaluate", str(run), "--samples", "20", "--batch", "6", "--out"]
    assert main([*command, str(tmp_path / "one.json")]) == 0
    said = on_two_ranks([*command, str(tmp_path / "two.json")])
    assert "20 generated digits" in said[0] and "generated" not in said[1]
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    drawing = [found.pop("drawing") for found in (one, two)]
    assert one == two and [said["processes"] for said in drawing] == [1, 2]


def test_alone_it_is_all_the_same() -> None:
    team = Team(Heartbeat())
    assert team.first(lambda: 5) == 5 and team.gather(6) == [6]
    with pytest.raises(InputError, match="no"):
        team.first(lambda: (_ for _ in ()).throw(InputError("no")))
