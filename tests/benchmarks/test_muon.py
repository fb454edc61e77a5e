"""The benchmark of Muon takes the steps it says, in turns."""

import muon
from gpu.plan import TINY, B


def test_both_sides_take_their_steps(monkeypatch):
    load, seen = muon.load_config, []

    def small(config, images, *overrides):
        seen.extend(overrides)
        return load(B, images, *TINY, *overrides)

    monkeypatch.setattr(muon, "load_config", small)
    times = muon.measure("a configuration", 2, 2, "cpu")
    assert seen == ["optimizer.name=adamw", "optimizer.name=muon"]
    assert times.keys() == {"adamw", "muon"} and all(len(taken) == 2 and min(taken) > 0 for taken in times.values())
