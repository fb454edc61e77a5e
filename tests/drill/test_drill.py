"""The drill's own parts: it dies where it says, harms what it says, and tells likes from unlikes."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from support.engines import Memory, same

from pixelgen_fast.runs import checkpoint
from tests.drill import __main__ as drill
from tests.drill import faults, run, victim

PATCHED = ("write_shards", "seal", "write_manifest", "_prepare", "_prune", "os")


class Death(BaseException):
    """In place of SIGKILL."""


def save(folder: Path, seed: int) -> Path:
    return checkpoint.save(folder, Memory(seed), nimg=seed, state={}, keep=1)


@pytest.mark.parametrize("stage", victim.STAGES)
def test_a_death_in_any_stage_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def die(*_: object) -> None:
        raise Death

    with monkeypatch.context() as planted:
        for name in PATCHED:
            planted.setattr(checkpoint, name, getattr(checkpoint, name))
        planted.setattr(victim, "die", die)
        victim.plant(stage, 2)
        save(tmp_path, 1)
        with pytest.raises(Death):
            save(tmp_path, 2)
    left = checkpoint.latest_valid(tmp_path)
    loaded = Memory(9)
    nimg = checkpoint.load(left, loaded)["nimg"]
    assert nimg == (2 if stage in ("after the rename", "prune") else 1) and same(loaded, Memory(nimg))
    assert not list(tmp_path.glob("tmp-*"))
    assert checkpoint.latest_valid(save(tmp_path, 3).parent).name == f"{3:012d}"


@pytest.mark.parametrize("seed", range(20))
def test_harm_to_the_newest_checkpoint_is_found(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "checkpoints"
    for nimg in (1, 2):
        checkpoint.save(folder, Memory(nimg), nimg=nimg, state={}, keep=2)
    assert faults.damaged(Random(seed), run.TinyRun(tmp_path)) == ""
    assert checkpoint.latest_valid(folder).name == f"{1:012d}"


def test_likes_and_unlikes_are_told_apart() -> None:
    a, b = {"w": torch.ones(3)}, {"w": torch.ones(3) + 1e-6}
    assert run.same(a, {"w": torch.ones(3)}, 0.0) and not run.same(b, a, 0.0) and run.same(b, a, 1e-5)
    assert not run.same({}, a, 1e-5) and not run.same({"w": torch.ones(3) * 2}, a, 1e-5)


def test_the_table_has_a_row_of_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [*faults.FAULTS]
    drill.show(Counter({(kinds[0], "injected"): 2, (kinds[0], "survived"): 1, (kinds[0], "lost"): 1}), kinds)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + len(kinds)
    assert lines[2] == "| killed in a stage | 2 | 1 | 1 | 0 |" and lines[-1] == "| all | 2 | 1 | 1 | 0 |"
