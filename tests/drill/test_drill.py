"""The drill's own parts: it dies where it says, harms what it says, and tells likes from unlikes."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
from support.engines import Memory, same

from pixelgen_fast.runs import checkpoint
from tests.drill import __main__ as drill
from tests.drill import faults, run, stages

PATCHED = ("write_shards", "seal", "write_manifest", "_prepare", "_prune", "os")


class Death(BaseException):
    """In place of SIGKILL."""


def save(folder: Path, seed: int) -> Path:
    return checkpoint.save(folder, Memory(seed), nimg=seed, state={}, keep=1)


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_death_in_any_stage_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def die(*_: object) -> None:
        raise Death

    with monkeypatch.context() as planted:
        for name in PATCHED:
            planted.setattr(checkpoint, name, getattr(checkpoint, name))
        planted.setattr(stages, "die", die)
        stages.plant(stage, 2)
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
    for nimg in (1, 2):
        newest = checkpoint.save(tmp_path, Memory(nimg), nimg=nimg, state={}, keep=2)
    rng = Random(seed)
    faults.harm(rng.choice(sorted(newest.iterdir())), rng)
    assert checkpoint.latest_valid(tmp_path).name == f"{1:012d}"


def test_likes_and_unlikes_are_told_apart() -> None:
    ones = np.ones(3, np.float32)
    a, b = {"w": ones}, {"w": ones + 1e-6}
    assert not run.apart(a, {"w": ones.copy()}, 0.0) and not run.apart(b, a, 1e-5)
    assert run.apart(b, a, 0.0) == run.apart({}, a, 1e-5) == run.apart({"w": 2 * ones}, a, 1e-5) == ["w"]


def test_a_fault_that_is_not_survived_is_counted_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Plain:
        def __init__(self, place: Path) -> None: ...
        def start(self) -> None: ...
        def end(self, process: None, *codes: int) -> None: ...

    monkeypatch.setattr(run, "Run", Plain)
    monkeypatch.setattr(run, "weights", lambda *_: {})
    monkeypatch.setattr(faults, "outcome", lambda name, seed, *_: "lost: a reason" if seed % 4 == 0 else "survived")
    assert drill.inject(8, 3, 1, "half a row") == 2
    out = capsys.readouterr().out
    assert "| half a row of metrics | 8 | 6 | 2 | 0 |" in out and "| all | 8 | 6 | 2 | 0 |" in out
    assert out.count(": lost: a reason") >= 2
