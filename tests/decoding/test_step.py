"""A step of both sides: the same for every micro-batch, its parts by their definitions, its schedules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pixelgen_kernels import philox
from support.decoding import NETWORK, config_of, write_images
from support.golden import relative
from torch import Tensor, nn

from pixelgen_fast.data import Batch
from pixelgen_fast.decoding.augment import FOR_DECODER, OF_FAKES, OF_REALS, augment
from pixelgen_fast.decoding.objective import DecoderObjective
from pixelgen_fast.decoding.pair import PairEngine
from pixelgen_fast.decoding.step import Plan, decoder_step, plan, rate
from pixelgen_fast.diffusion.time import noise
from pixelgen_fast.rae.decoder import Decoder
from pixelgen_fast.rae.discriminator import load_discriminator
from pixelgen_fast.rae.encoder import load_encoder


class Coarse(nn.Module):
    """A distance of images instead of LPIPS, which takes seconds to make: of 4 x 4 means, squared."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.avg_pool2d(a - b, 4).square().mean(dim=(1, 2, 3))


ALL = Plan(gan=True, discriminates=True, decoder_lr=1e-3, discriminator_lr=2e-3)
COLUMNS = ("count", "loss", *DecoderObjective.columns)


def parts(folder: Path, *changes: str, precision: str = "fp32") -> tuple[DecoderObjective, PairEngine]:
    config = config_of(folder, "objective.perceptual_weight=0.5", *changes)
    encoder = load_encoder(NETWORK, config.encoder.weights, config.grid)
    torch.manual_seed(0)
    decoder = Decoder(config.decoder, encoder.width, config.grid, *encoder.channels)
    discriminator = load_discriminator(NETWORK, config.discriminator.weights)
    objective = DecoderObjective(config, encoder, decoder, discriminator, Coarse(), precision)
    return objective, PairEngine(decoder, discriminator, config.optimizer)


def batches(folder: Path, sizes: list[int]) -> list[Batch]:
    images, numbers = write_images(folder / "data", sum(sizes)), torch.arange(40, 40 + sum(sizes))
    return [Batch(i, n, n) for i, n in zip(images.split(sizes), numbers.split(sizes), strict=True)]


def weights(engine: PairEngine) -> dict[str, Tensor]:
    found = {f"{name} {kind}": v for name in engine.names() for kind, v in engine.gather(name).items()}
    return found | engine.buffers()


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    ends = []
    for sizes in ([8], [4, 4], [2, 2, 2, 2]):
        objective, engine = parts(tmp_path)
        for _ in range(2):
            row = decoder_step(engine, objective, batches(tmp_path, sizes), ALL)
        ends.append((weights(engine), row / row[0]))
    for found, row in ends[1:]:
        assert relative(row, ends[0][1]) < 1e-5
        for name, value in found.items():
            assert relative(value, ends[0][0][name]) < 1e-5 or not value.any(), name


def test_its_losses_and_gradients_are_those_of_the_definitions(tmp_path: Path) -> None:
    """One backward pass of L_rec + w lambda L_gan, lambda taken from two passes before it; then the discriminator's."""
    objective, engine = parts(tmp_path)
    (batch,) = batches(tmp_path, [6])
    decoder, discriminator, numbers = objective.decoder, objective.discriminator, batch.numbers
    x = batch.images.permute(0, 3, 1, 2) / 255
    z = objective.encoder(x)
    sigma = 0.8 * philox.uniform(0, numbers, philox.TIME, 1)[..., None, None]
    r = decoder(z + sigma * noise(0, numbers, z.shape[1:]))
    l1, lpips = (r - x).abs().mean(), objective.perceptual(2 * r - 1, 2 * x - 1).mean()
    rec = l1 + 0.5 * lpips
    gan = -discriminator(augment(2 * r - 1, 0, numbers, FOR_DECODER)).mean()
    W = decoder.head.weight
    norms = [torch.autograd.grad(loss, W, retain_graph=True)[0].norm() for loss in (rec, gan)]
    scale = 0.75 * norms[0] / (norms[1] + 1e-6)
    gradients = torch.autograd.grad(rec + scale * gan, list(decoder.parameters()))
    wanted = dict(zip((n for n, _ in decoder.named_parameters()), gradients, strict=True))
    learned = dict(discriminator.named_parameters())

    row = dict(zip(COLUMNS, decoder_step(engine, objective, [batch], ALL).tolist(), strict=True))
    found = {"loss": rec, "l1": l1, "lpips": lpips, "gan": gan, "gan_scale": scale}
    assert all(row[name] == pytest.approx(float(value.detach()), rel=1e-5) for name, value in found.items())
    for name, gradient in wanted.items():
        # the first moment of AdamW after one step
        assert relative(engine.gather(f"decoder.{name}")["exp_avg"], 0.1 * gradient) < 1e-4, name
    assert learned.keys() == dict(discriminator.named_parameters()).keys()


def test_the_discriminator_learns_from_what_the_decoder_has_become(tmp_path: Path) -> None:
    objective, engine = parts(tmp_path)
    twin, _ = parts(tmp_path)
    (batch,) = batches(tmp_path, [6])
    row = dict(zip(COLUMNS, decoder_step(engine, objective, [batch], ALL).tolist(), strict=True))
    x, numbers, judge = batch.images.permute(0, 3, 1, 2) / 255, batch.numbers, twin.discriminator
    with torch.no_grad():
        fake = (2 * objective.decoder(objective.encoder(x)) - 1).clamp(-1, 1)
        fake = ((fake + 1) * 127.5).round() / 127.5 - 1
    judge.renew()
    on_fakes = judge(augment(fake, 0, numbers, OF_FAKES))
    judge.renew()
    on_reals = judge(augment(2 * x - 1, 0, numbers, OF_REALS))
    hinge = 0.5 * (torch.relu(1 + on_fakes).mean() + torch.relu(1 - on_reals).mean())
    right = 0.5 * ((on_fakes < 0).float().mean() + (on_reals > 0).float().mean())
    assert row["discriminator"] == pytest.approx(float(hinge.detach()), rel=1e-5)
    assert row["discriminator_accuracy"] == pytest.approx(float(right), rel=1e-5)
    hinge.backward()
    moments = {name: engine.gather(f"discriminator.{name}")["exp_avg"] for name, _ in judge.named_parameters()}
    for name, p in judge.named_parameters():
        if p.grad is not None:
            assert relative(moments[name], 0.1 * p.grad) < 1e-4, name
    assert all(relative(v, engine.buffers()[f"discriminator.{n}"]) < 1e-5 for n, v in judge.named_buffers())


def test_in_bf16_products_are_short_and_weights_are_not(tmp_path: Path) -> None:
    rows = []
    for precision in ("fp32", "bf16"):
        objective, engine = parts(tmp_path, precision=precision)
        rows.append(decoder_step(engine, objective, batches(tmp_path, [4, 4]), ALL))
        trained = (*objective.decoder.parameters(), *objective.discriminator.parameters())
        assert {p.dtype for p in trained} == {torch.float32}
        assert all(buffer.dtype == torch.float32 for buffer in engine.buffers().values())
    spread = relative(rows[1], rows[0])
    assert 1e-6 < spread < 0.02


def test_a_side_that_does_not_learn_stays(tmp_path: Path) -> None:
    objective, engine = parts(tmp_path)
    before = weights(engine)
    row = decoder_step(engine, objective, batches(tmp_path, [4, 4]), ALL._replace(gan=False, discriminates=False))
    row = dict(zip(COLUMNS, row.tolist(), strict=True))
    changed = {name.split(".")[0] for name, v in weights(engine).items() if not torch.equal(v, before[name])}
    assert changed == {"decoder"} and engine.scalars()["discriminator_step"] == 0
    assert row["count"] == 2 and row["gan"] == row["gan_scale"] == row["discriminator"] == 0


def test_a_loss_that_is_not_finite_is_no_step(tmp_path: Path) -> None:
    objective, engine = parts(tmp_path)
    with torch.no_grad():
        objective.decoder.head.bias[0] = torch.inf
    before = engine.gather("decoder.embed.weight")["master"]
    row = decoder_step(engine, objective, batches(tmp_path, [4, 4]), ALL._replace(discriminates=False))
    assert float(row.abs().sum()) == 0 and int(engine.skipped_in_a_row) == int(engine.skipped) == 1
    assert torch.equal(engine.gather("decoder.embed.weight")["master"], before)


def test_rates_rise_and_fall(tmp_path: Path) -> None:
    p = config_of(tmp_path, "optimizer.warmup_images=100", "train.images=1000").optimizer
    assert rate(p, 1.0, 0, 10, 1000) == pytest.approx(0.1)
    assert rate(p, 1.0, 90, 10, 1000) == rate(p, 1.0, 100, 10, 1000) == 1.0
    assert rate(p, 1.0, 550, 10, 1000) == pytest.approx((1 + p.last_share) / 2)
    assert rate(p, 1.0, 1000, 10, 1000) == pytest.approx(p.last_share)


def test_each_side_begins_at_its_image(tmp_path: Path) -> None:
    """The discriminator's warm-up begins when it does."""
    c = config_of(
        tmp_path, "objective.discriminator_from=200", "objective.gan_from=400", "optimizer.warmup_images=100",
        "train.images=1000", "discriminator.lr=2.0", "optimizer.lr=1.0",
    )  # fmt: skip
    found = {n: plan(c, n, 1000) for n in (0, 199, 200, 300, 399, 400)}
    assert [p.discriminates for p in found.values()] == [False, False, True, True, True, True]
    assert [p.gan for p in found.values()] == [False, False, False, False, False, True]
    assert found[200].discriminator_lr == 2 * rate(c.optimizer, 1.0, 0, 8, 1000)
    assert found[300].decoder_lr == rate(c.optimizer, 1.0, 300, 8, 1000)
    assert not plan(config_of(tmp_path, "objective.gan_weight=0"), 10**9, 10**9).discriminates
