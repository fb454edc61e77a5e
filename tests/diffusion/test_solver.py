"""Solvers by their order of convergence on a flow whose solution is known; guidance and the sampler by counting."""

from functools import partial

import numpy as np
import pytest
import torch
from pixelgen_kernels import philox
from torch import Tensor, nn

from pixelgen_fast.diffusion import solver
from pixelgen_fast.diffusion.energy import EnergyPath
from pixelgen_fast.diffusion.time import noise

MU, SIGMA = 0.6, 0.25
STEPS = [16, 32, 64, 128]


def gaussian_velocity(z: Tensor, t: float) -> Tensor:
    """The exact velocity E[x - e | z] for data N(mu, sigma^2) and the path z = t x + (1-t) e.

    z has mean t mu and variance q = t^2 sigma^2 + (1-t)^2; the covariance of x - e with z is t sigma^2 - (1-t); so
    v(z, t) = mu + (t sigma^2 - (1-t)) (z - t mu) / q. With q' / 2 = t sigma^2 - (1-t), dz/dt = v is solved by
    z(t) = t mu + sqrt(q(t)) z(0): the flow carries the noise z(0) to the data point mu + sigma z(0).
    """
    q = t**2 * SIGMA**2 + (1 - t) ** 2
    return MU + (t * SIGMA**2 - (1 - t)) * (z - t * MU) / q


def last(states):
    return list(states)[-1]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("adams2", 2)])
def test_order_of_convergence(name, order, shift):
    """Slope of log error over log steps, on the uniform grid and on a shifted one.

    Constant Adams-Bashforth coefficients keep order 2 on a shifted grid: neighbouring steps differ by a factor
    1 + O(h), which costs O(h^3) a step. The fit's own deviation from the limit is below 0.1 at these step counts.
    """
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = [
        float((last(solver.SOLVERS[name](gaussian_velocity, z, solver.time_grid(n, shift))) - (MU + SIGMA * z)).norm())
        for n in STEPS
    ]
    measured = -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]
    assert abs(measured - order) < 0.15, f"{name}: order {measured:.3f}, errors {errors}"


@pytest.mark.parametrize(("name", "calls"), [("euler", 7), ("heun", 13), ("adams2", 7)])
def test_evaluations_of_the_field(name, calls):
    """Heun asks 2N - 1 times, the others N times, and none asks at t = 1, where an x-prediction has no velocity."""
    times = []
    states = list(solver.SOLVERS[name](lambda z, t: times.append(t) or z, torch.ones(2), solver.time_grid(7)))
    assert len(states) == 7 and len(times) == calls
    assert max(times) < 1 and min(times) == 0


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_adams2_is_the_published_recurrence(shift):
    """PixelDiT's sampler, from its description: times linspace(0, 1 - 1/N, N) and then 1, shifted by t / (t + (1-t) s);
    Euler first, then x += dt (1.5 v_i - 0.5 v_{i-1}), the coefficients constant on the shifted grid too."""
    n, x = 10, np.linspace(-2, 2, 5)
    t = np.append(np.linspace(0, 1 - 1 / n, n), 1.0)
    t = t / (t + (1 - t) * shift)
    v = [gaussian_velocity(x, t[0])]
    x = x + (t[1] - t[0]) * v[0]
    for i in range(1, n):
        v.append(gaussian_velocity(x, t[i]))
        x = x + (t[i + 1] - t[i]) * (1.5 * v[i] - 0.5 * v[i - 1])
    out = last(
        solver.adams2(gaussian_velocity, torch.linspace(-2, 2, 5, dtype=torch.float64), solver.time_grid(n, shift))
    )
    np.testing.assert_allclose(out, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 49, 100])
def test_time_grid_is_the_linspace(steps):
    grid = solver.time_grid(steps)
    np.testing.assert_allclose(grid, np.linspace(0, 1, steps + 1), rtol=1e-15)
    assert grid == [i / steps for i in range(steps + 1)]
    shifted = solver.time_grid(steps, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and shifted == sorted(shifted)


def test_a_grid_may_end_before_data():
    """RAE's 50 times from its formula, there from t = 1, noise: s(1 - 0.999 i / 49) with s(t) = a t / (1 + (a-1) t)."""
    a = 768**0.5 / 4
    t = 1 - 0.999 * np.arange(50) / 49
    np.testing.assert_allclose(1 - np.array(solver.time_grid(49, a, 0.999)), a * t / (1 + (a - 1) * t), atol=1e-14)
    z, halves = torch.ones(2), solver.time_grid(4, end=0.5)
    assert halves == [0, 0.125, 0.25, 0.375, 0.5]
    torch.testing.assert_close(last(solver.euler(lambda z, t: torch.ones_like(z), z, halves)), z + 0.5)


class Counter:
    """A network that answers with its label and remembers how many images each call held and at which time."""

    def __init__(self):
        self.calls = []

    def __call__(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert z.shape[0] == t.shape[0] == y.shape[0] and t.unique().numel() == 1
        self.calls.append((z.shape[0], float(t[0]), y.tolist()))
        return y.float()[:, None, None, None].expand_as(z)


def test_guidance_inside_its_interval_only():
    """u + w (c - u) strictly between the ends; outside them the network sees B images, not 2B."""
    model, labels = Counter(), torch.tensor([1, 2, 3])
    field = solver.velocity_field(model, labels, guidance=3.0, interval=(0.25, 0.75), null_class=10)
    for t, guided in [(0.0, False), (0.25, False), (0.375, True), (0.5, True), (0.75, False), (0.875, False)]:
        v = field(torch.zeros(3, 3, 2, 2), t)
        expected = [10 + 3.0 * (y - 10) if guided else y for y in (1, 2, 3)]
        assert v[:, 0, 0, 0].tolist() == expected
        assert model.calls[-1] == (6 if guided else 3, t, [10, 10, 10, 1, 2, 3] if guided else [1, 2, 3])


@pytest.mark.parametrize(
    ("guidance", "interval", "images"),
    [(1.0, None, 50), (2.0, None, 100), (2.0, (0.0, 1.0), 95), (2.0, (0.3, 0.6), 60)],
)
def test_evaluations_of_a_guided_run(guidance, interval, images):
    """Ten Euler steps of five samples; strictly inside (0.3, 0.6) lie t = 0.4 and 0.5 only."""
    model = Counter()
    arguments = {"seed": 0, "shape": (3, 2, 2), "steps": 10, "solver": "euler", "null_class": 10}
    solver.sample(model, torch.arange(5), torch.arange(5), guidance=guidance, interval=interval, **arguments)
    assert sum(count for count, *_ in model.calls) == images


def test_guidance_leads_away_from_a_weaker_prediction():
    """w + g (p - w) where guidance applies, and the model alone elsewhere; the null class is never asked for."""
    model, labels = Counter(), torch.tensor([1, 2, 3])

    def pair(z: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return model(z, t, y) / 4, model(z, t, y)

    field = solver.velocity_field(model, labels, guidance=3.0, interval=(0.25, 0.75), pair=pair)
    assert field(torch.zeros(3, 3, 2, 2), 0.5)[:, 0, 0, 0].tolist() == [y / 4 + 3.0 * (y - y / 4) for y in (1, 2, 3)]
    assert field(torch.zeros(3, 3, 2, 2), 0.25)[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert [y for _, _, y in model.calls] == [[1, 2, 3]] * 3
    arguments = {"seed": 0, "shape": (3, 2, 2), "steps": 2, "solver": "euler", "pair": pair}
    drawn, plain = (solver.sample(model, labels, labels, guidance=g, **arguments) for g in (3.0, 1.0))
    assert torch.allclose(drawn - plain, 1.5 * labels[:, None, None, None].float(), atol=1e-5)


@pytest.mark.parametrize("predict", ["v", "x", "e"])
def test_guidance_is_the_same_in_every_prediction_space(predict):
    """Combining two x-predictions and then converting equals combining the two velocities."""

    def network(z, t, y):
        return z * (1 + y.float()[:, None, None, None])

    z, y, null = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double(), torch.arange(4), 7
    common = {"predict": predict, "noise_scale": 1.5}
    v = solver.velocity_field(network, y, guidance=2.5, null_class=null, **common)(z, 0.4)
    c = solver.velocity_field(network, y, **common)(z, 0.4)
    u = solver.velocity_field(network, torch.full_like(y, null), **common)(z, 0.4)
    torch.testing.assert_close(v, u + 2.5 * (c - u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predict", ["v", "x", "e"])
def test_samples_of_a_gaussian_have_its_moments(predict):
    """The optimal network of data N(mu, sigma^2), noise scale s: samples are mu + sigma times the starting noise.

    With w = t and q = w^2 sigma^2 + (1-w)^2 s^2: E[x|z] = mu + w sigma^2 (z - w mu) / q and
    E[e|z] = (1-w) s (z - w mu) / q. The last evaluation of Heun is at 1 - t = 1 / steps = t_eps, where an
    x-prediction's velocity is still exact. Predicted noise says nothing of x at t = 0, so there the velocity is
    0 / t_eps: the first step goes nowhere, an error of order 1 / steps.
    """
    s = 2.0

    def network(z, t, y):
        w = t[:, None, None, None]
        q = w**2 * SIGMA**2 + (1 - w) ** 2 * s**2
        x, e = MU + w * SIGMA**2 * (z - w * MU) / q, (1 - w) * s * (z - w * MU) / q
        return {"x": x, "e": e, "v": x - s * e}[predict]

    numbers = torch.arange(8)
    steps = 400
    out = solver.sample(
        network,
        numbers,
        torch.zeros(8, dtype=torch.int64),
        seed=4,
        shape=(3, 4, 4),
        steps=steps,
        solver="heun",
        predict=predict,
        noise_scale=s,
        t_eps=1 / steps,
    )
    expected = MU + SIGMA * noise(4, numbers, (3, 4, 4), philox.SAMPLING)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-2 if predict == "e" else 1e-3)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_prediction_of_x_is_read_by_the_path_of_training(guidance):
    """One image for all, known to the network: the flow carries any noise to it, by t x* + (1-t) e on the way."""
    x = torch.sin(torch.arange(3 * 16 * 16.0).view(1, 3, 16, 16) ** 1.3)
    path, numbers, steps = EnergyPath(bisections=40), torch.arange(2), 50
    common = {"predict": "x", "path": path, "null_class": 7, "guidance": guidance}
    asked = []

    def network(z, t, y):
        asked.append((z[-2:], float(t[0])))
        return x.expand_as(z)

    run = partial(solver.sample, network, numbers, numbers, seed=4, shape=(3, 16, 16), steps=steps, solver="heun")
    torch.testing.assert_close(run(t_eps=1 / steps, **common), x.expand(2, -1, -1, -1), rtol=0, atol=1e-3)
    z, t = asked[steps]
    e = noise(4, numbers, (3, 16, 16), philox.SAMPLING)
    expected = path.endpoint(x.expand_as(e), torch.full((2,), t)).noised(e)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-2)


def test_guidance_combines_the_velocities_of_the_path():
    """Reading x is not linear there, so two predictions of x must not be combined first."""

    def network(z, t, y):
        return z * (1 + y.float()[:, None, None, None]) + z.roll(1, dims=2) ** 2

    z, y, null = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double(), torch.arange(4), 7
    common = {"predict": "x", "path": EnergyPath()}
    v = solver.velocity_field(network, y, guidance=2.5, null_class=null, **common)(z, 0.4)
    c = solver.velocity_field(network, y, **common)(z, 0.4)
    u = solver.velocity_field(network, torch.full_like(y, null), **common)(z, 0.4)
    torch.testing.assert_close(v, u + 2.5 * (c - u), rtol=1e-12, atol=1e-12)


def test_a_prediction_of_v_is_drawn_with_as_ever():
    z, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    fields = [solver.velocity_field(lambda z, t, y: z + t[0], labels, path=path) for path in (None, EnergyPath())]
    assert torch.equal(fields[0](z, 0.3), fields[1](z, 0.3))


class Small(nn.Module):
    """A convolutional network with time and class, large enough that batch size could change its sums."""

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(11, 16)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, z, t, y):
        c = self.label(y) + t[:, None]
        return self.second(torch.nn.functional.silu(self.first(z) * (1 + c[:, :, None, None])))


def test_a_sample_does_not_depend_on_its_batch():
    """Batches of 1, 7 and 16, a subset in another order: the same bits at the start, the same images to rounding."""
    torch.manual_seed(0)
    model, numbers, labels = Small().eval(), torch.arange(40, 56), torch.arange(16) % 10
    draw = partial(solver.sample, model, seed=9, shape=(3, 8, 8), steps=6, guidance=2.0, null_class=10)
    whole = draw(numbers, labels, batch=16)
    assert whole.shape == (16, 3, 8, 8) and whole.dtype == torch.float32 and not whole.requires_grad
    pick = torch.tensor([11, 2, 5])
    for out, expected in [
        (draw(numbers, labels, batch=1), whole),
        (draw(numbers, labels, batch=7), whole),
        (draw(numbers[pick], labels[pick], batch=2), whole[pick]),
    ]:
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    rest = partial(solver.sample, lambda z, t, y: torch.zeros_like(z), seed=9, shape=(3, 8, 8), steps=1)
    starts = rest(numbers, labels, batch=16)
    assert torch.equal(starts, noise(9, numbers, (3, 8, 8), philox.SAMPLING))
    assert torch.equal(starts, rest(numbers, labels, batch=7))
    assert torch.equal(starts[:1], rest(numbers[:1], labels[:1]))
    assert (starts[1:] != starts[:-1]).any(dim=(1, 2, 3)).all()


def test_to_uint8_inverts_the_range_and_clips():
    levels = torch.arange(256, dtype=torch.uint8)
    x = (levels.float() / 127.5 - 1).reshape(1, 1, 1, 256).expand(1, 3, 1, 256)
    out = solver.to_uint8(x)
    assert out.shape == (1, 1, 256, 3) and torch.equal(out[0, 0, :, 1], levels)
    beyond = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).reshape(5, 1, 1, 1)
    assert solver.to_uint8(beyond).flatten().tolist() == [0, 0, 128, 255, 255]


def test_bad_arguments_are_named_before_the_network_is_called():
    model, numbers = Counter(), torch.arange(4)
    draw = partial(solver.sample, seed=0, shape=(3, 2, 2), steps=2)
    for match, arguments in [
        ("at least 1 step, got 0", {"steps": 0}),
        ("solver 'rk4' is unknown; use one of euler, heun, adams2", {"solver": "rk4"}),
        ("guidance=2.0 compares with the null class", {"guidance": 2.0}),
        (r"low < high, got \(0.9, 0.1\)", {"interval": (0.9, 0.1)}),
        ("predict='velocity' is not a prediction", {"predict": "velocity"}),
        ("time shift must be a positive number, got 0", {"shift": 0}),
        ("the end of a grid of times must be in (0, 1], got 0".replace("(", r"\(").replace("]", r"\]"), {"end": 0}),
        ("batch must be at least 1 image, got 0", {"batch": 0}),
    ]:
        with pytest.raises(ValueError, match=match):
            draw(model, numbers, numbers, **arguments)
    with pytest.raises(ValueError, match=r"numbers \[4\], labels \[3\]"):
        draw(model, numbers, numbers[:3])
    with pytest.raises(ValueError, match="at least one image"):
        draw(model, numbers[:0], numbers[:0])
    assert not model.calls
    with pytest.raises(ValueError, match=r"training mode.*call model.eval\(\)"):
        draw(Small(), numbers, numbers)
