"""The energy-guided path: its end, noised images and velocities, and the curve by which the energy is let go."""

from __future__ import annotations

from collections.abc import Iterator

from rebuilt import Comparison, GoldenFile

from pixelgen_fast.diffusion.energy import EnergyPath, released


def rebuild(file: GoldenFile) -> Iterator[Comparison]:
    c = file.config
    path = EnergyPath(c["sigma0"], (c["release_start"], c["release_end"]), c["bisection_steps"])
    end = path.endpoint(file["x"], file["t"])
    yield "endpoint", end.x, file["endpoint"]
    yield "endpoint_velocity", end.rate, file["endpoint_velocity"]
    yield "state", end.noised(file["e"]), file["state"]
    yield "velocity", end.velocity(file["e"]), file["velocity"]
    predicted = path.endpoint(file["x_pred"], file["t"])
    yield "velocity_from_x_pred", predicted.velocity_at(file["state"], t_eps=0.05), file["velocity_from_x_pred"]
    for name, found in zip(("release", "release_derivative"), released(file["u"]), strict=True):
        yield name, found, file[name]


SYSTEMS = {"egfm": rebuild}
