"""AliTok against its formulas in float64, without a cache and token by token: training, drawing, guidance, SoftCFG."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from pixelgen_kernels import philox
from support.models import tiny_of
from torch import Tensor

from pixelgen_fast.config import Objective, Sampling
from pixelgen_fast.engine.parallel import wrap_blocks
from pixelgen_fast.models import alitok
from pixelgen_fast.models.guided_tokens import Guidance, SoftGuidance, draw_tokens

B = dict(hidden_size=768, depth=24)
L = dict(hidden_size=1024, depth=24)
XL = dict(hidden_size=1280, depth=32)
PREFIX, GRID, N = 5, 4, 21
tiny = tiny_of("alitok")


def images() -> Tensor:
    return torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def angles(position: int, pairs: int) -> tuple[Tensor, Tensor]:
    """(angle of each pair, whether it turns at all) of a position in the row [class, prefix, grid]."""
    if position == 0:
        return torch.zeros(pairs, dtype=torch.float64), torch.zeros(pairs, dtype=torch.float64)
    if position <= PREFIX:
        turns = [(position - 1) * 1e4 ** (-2 * k / (2 * pairs)) for k in range(pairs)]
    else:
        row, column = divmod(position - 1 - PREFIX, GRID)
        frequencies = [1e4 ** (-2 * k / pairs) for k in range(pairs // 2)]
        turns = [(PREFIX + place) * f for place in (row, column) for f in frequencies]
    return torch.tensor(turns, dtype=torch.float64), torch.ones(pairs, dtype=torch.float64)


def sharp(**changes: object) -> alitok.AliTok:
    """A model that is surer of its tokens, so that its class and the confidences matter."""
    model = tiny(**changes).eval()
    for parameter in model.transformer.parameters():
        parameter.data *= 2
    return model


class Reference:
    """The transformer's formulas on its weights, for a whole row of tokens at once."""

    def __init__(self, model: alitok.AliTok) -> None:
        self.w = {name: p.detach().double() for name, p in model.transformer.state_dict().items()}

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.w[f"{name}.weight"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def turn(self, x: Tensor) -> Tensor:
        """x [H, L, d]: pair k of position j times exp(i angle), or 0 where it has none."""
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        angle, there = (torch.stack(rows) for rows in zip(*(angles(j, 6) for j in range(x.shape[1])), strict=True))
        return torch.view_as_real(pairs * torch.exp(1j * angle) * there).flatten(-2)

    def __call__(self, y: int, ids: list[int], worth: Tensor | None = None) -> Tensor:
        """Logits [L, V] at every position of [class, ids]; worth [L, L]: of the value of j when position i reads it."""
        rows = [self.w["y_embed.weight"][y], *(self.w["token_embed.weight"][i] for i in ids)]
        x = torch.stack(rows)
        length = len(x)
        worth = torch.ones(length, length, dtype=torch.float64) if worth is None else worth
        hidden = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
        for i in range(2):
            block = f"blocks.{i}"
            h = self.norm(f"{block}.norm1", x)
            q, k, v = rearrange(self.linear(f"{block}.attn.qkv", h), "L (s H d) -> s H L d", s=3, H=2)
            q, k = (self.turn(self.norm(f"{block}.attn.{n}_norm", t)) for n, t in (("q", q), ("k", k)))
            shares = (q @ k.mT / 12**0.5 + hidden).softmax(-1)
            out = torch.einsum("hij,ij,hjd->ihd", shares, worth, v).flatten(1)
            x = x + self.linear(f"{block}.attn.proj", out)
            a, b = self.linear(f"{block}.mlp.w13", self.norm(f"{block}.norm2", x)).chunk(2, dim=-1)
            x = x + self.linear(f"{block}.mlp.w2", F.silu(a) * b)
        return self.linear("head.linear", self.norm("head.norm", x))


@pytest.mark.parametrize("body", ["native", "reference"])
def test_logits_are_those_of_the_formulas(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXELGEN_OPS", body)
    dtype, tolerance = {"native": (torch.float32, 1e-4), "reference": (torch.float64, 1e-6)}[body]
    model = tiny().to(dtype).eval()
    ids = torch.randint(0, 24, (2, N), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = model.transformer(ids, torch.tensor([1, 3]))
    for row, y in enumerate((1, 3)):
        wanted = Reference(model)(y, ids[row].tolist())
        torch.testing.assert_close(found[row].double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cache_gives_the_same_logits_as_the_whole_row(dtype: torch.dtype) -> None:
    transformer = tiny().to(dtype).eval().transformer
    ids, y = torch.randint(0, 24, (2, N)), torch.tensor([0, 3])
    with torch.no_grad():
        wanted, past, x = transformer(ids, y), transformer.past(2), transformer.y_embed(y)
        for j in range(N + 1):
            tolerance = 1e-5 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(transformer.extend(x, past), wanted[:, j], rtol=tolerance, atol=tolerance)
            x = transformer.token_embed(ids[:, j]) if j < N else None


def slow_draw(model: alitok.AliTok, label: int, number: int, s: Sampling) -> list[int]:
    """Tokens of one sample: every step from all tokens anew, each position with the values as they were worth then."""
    network, settings, null = Reference(model), model.settings, model.num_classes
    u = philox.uniform(s.seed, torch.tensor([number]), philox.SAMPLING, N)[0].tolist()
    ids, q, worth = [], [], torch.ones(N + 1, N + 1, dtype=torch.float64)
    for step in range(N):
        if settings.softcfg and step:
            C = q[: step - 1] if settings.own_confidence else q[1:step]
            for j, c in enumerate(C, start=1):
                share = max(0.05, (1 - c / (sum(C) + 1e-5)) ** settings.strength)
                worth[step, j] = share if settings.step_norm else 1 - c
        conditional = network(label, ids)[-1] / s.temperature
        free = network(null, ids, worth[: step + 1, : step + 1])[-1] / s.temperature
        w = 1 + (s.guidance - 1) * (1 - torch.cos(torch.tensor(torch.pi * (step / N) ** settings.guidance_power))) / 2
        below = (free + float(w) * (conditional - free)).softmax(-1).cumsum(-1)
        ids.append(next(i for i, c in enumerate(below.tolist()) if c > u[step]))
        chances = conditional.softmax(-1)
        q.append(float(chances.max() if settings.confidence == "maximum" else chances[ids[-1]]))
    return ids


@pytest.mark.parametrize(
    "changes",
    [
        dict(softcfg=False),
        dict(),
        dict(step_norm=False),
        dict(confidence="maximum"),
        dict(confidence="maximum", own_confidence=True, step_norm=False),
        dict(own_confidence=True, strength=2.0, guidance_power=0.7),
    ],
    ids=lambda changes: " ".join(changes) or "published",
)
def test_drawn_tokens_are_those_of_the_slow_sampler(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp(**changes).double()
    seen = []
    monkeypatch.setattr(model._tokenizer[0], "decode", lambda ids: seen.append(ids) or torch.zeros(1))
    settings = Sampling(guidance=4.0, temperature=0.9, seed=11)
    labels, numbers = torch.tensor([0, 2]), torch.tensor([3, 2**33])
    with torch.no_grad():
        model.draw(labels, numbers, settings, Objective(), lambda: None)
    wanted = [slow_draw(model, y, n, settings) for y, n in zip(labels.tolist(), numbers.tolist(), strict=True)]
    assert seen[0].tolist() == wanted
    assert len(set(wanted[0])) > 3


def drawn(model: alitok.AliTok, labels: list[int], numbers: list[int], **changes: object) -> Tensor:
    with torch.no_grad():
        settings = Sampling(**{"guidance": 3.0, **changes})
        return model.draw(torch.tensor(labels), torch.tensor(numbers), settings, Objective(), lambda: None)


def test_a_sample_is_a_function_of_seed_number_and_label_whatever_the_batch() -> None:
    model = sharp()
    labels, numbers = [0, 1, 2, 0], [5, 9, 2**33, 6]
    together = drawn(model, labels, numbers)
    assert together.shape == (4, 3, 16, 16) and together.abs().max() <= 1
    alone = torch.cat([drawn(model, [y], [n]) for y, n in zip(labels, numbers, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[3])
    for other in (drawn(model, [1], [5]), drawn(model, [0], [5], seed=1), drawn(model, [0], [5], guidance=1.0)):
        assert not torch.allclose(other[0], together[0])


def test_no_guidance_asks_for_the_class_alone() -> None:
    """One row an image, one pass a token; and SoftCFG, which softens guidance, changes nothing then."""
    rows, passes = [], []
    model = tiny().eval()
    model.transformer.y_embed.register_forward_hook(lambda module, inputs, out: rows.append(inputs[0].tolist()))
    with torch.no_grad():
        settings = Sampling(guidance=1.0)
        numbers = torch.tensor([4, 5])
        found = model.draw(torch.tensor([2, 1]), numbers, settings, Objective(), lambda: passes.append(1))
    assert rows == [[2, 1]] and len(passes) == N
    assert torch.equal(found, drawn(tiny(softcfg=False).eval(), [2, 1], [4, 5], guidance=1.0))


def test_the_loss_is_the_mean_cross_entropy_of_the_tokenizer_s_words() -> None:
    model = tiny(dropout=0.0).train()
    y = torch.tensor([0, 3, 1])
    found = model(images(), y, torch.arange(3), 0, Objective())
    ids = model._tokenizer[0].encode(rearrange(images(), "B h w C -> B C h w") / 255)
    assert found.keys() == {"loss"} and ids.unique().numel() > 1
    for row in range(3):
        logits = Reference(model)(int(y[row]), ids[row, :-1].tolist())
        wanted = -sum(logits[j].log_softmax(-1)[ids[row, j]] for j in range(N)) / N
        assert found["loss"][row].item() == pytest.approx(float(wanted), rel=1e-5)


def test_at_first_every_word_is_as_likely() -> None:
    loss = tiny(randomise=False)(images(), torch.tensor([0, 3, 1]), torch.arange(3), 0, Objective())["loss"]
    torch.testing.assert_close(loss, torch.full((3,), 24.0).log())


def test_dropout_acts_in_training_alone_and_in_four_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedded tokens, shares of attention, and both branches of each block; the last two once for each block."""
    model, calls = tiny(dropout=0.5), []
    assert model.draws and not tiny(dropout=0.0).draws
    dropout, attend = F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p, training: calls.append((p, training)) or dropout(x, p, training))
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *x, **o: calls.append(o.get("dropout_p")) or attend(*x, **o)
    )
    monkeypatch.setattr(model._tokenizer[0], "encode", lambda images: torch.zeros(3, N, dtype=torch.int64))
    arguments = (images(), torch.tensor([0, 3, 1]), torch.arange(3), 0, Objective())
    first, second = (model.train()(*arguments)["loss"] for _ in range(2))
    assert not torch.equal(first, second)
    assert calls[: len(calls) // 2] == [(0.5, True), *[0.5, (0.5, True), (0.5, True)] * 2]
    calls.clear()
    assert torch.equal(model.eval()(*arguments)["loss"], model(*arguments)["loss"])
    assert 0.5 not in calls and (0.5, True) not in calls


@pytest.mark.parametrize(("size", "parameters"), [(B, 177_048_064), (L, 317_851_648), (XL, 662_141_696)])
def test_published_parameter_counts(size: dict, parameters: int) -> None:
    with torch.device("meta"):
        model = alitok.build(alitok.Settings(**size, tokenizer="AliTok.pth"), 256, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.length == 273 and len(model.transformer.rope_cos) == 274


def test_the_tokenizer_is_no_part_of_the_model_yet_follows_it_in_float32() -> None:
    model = tiny()
    inside = model._tokenizer[0]
    assert not any(inside is module for module in model.modules())
    assert not any("encoder" in name or "decoder" in name for name in model.state_dict())
    model.bfloat16()
    assert {p.dtype for p in inside.parameters()} == {torch.float32}
    assert model.transformer.head.linear.weight.dtype == torch.bfloat16
    loss = model(images(), torch.tensor([0, 3, 1]), torch.arange(3), 0, Objective())["loss"]
    assert loss.dtype == torch.float32
    assert drawn(model.eval(), [0, 1], [3, 4]).dtype == torch.float32
    assert model.train() and not inside.training
    assert {p.device.type for p in model.to("meta")._tokenizer[0].parameters()} == {"meta"}


@pytest.mark.parametrize("recompute", ["operators", "blocks"])
def test_recomputation_changes_no_name_and_no_gradient(recompute: str) -> None:
    plain, wrapped = tiny(), tiny()
    wrap_blocks(wrapped.blocks(), recompute=recompute, compile_blocks=False)
    assert list(plain.state_dict()) == list(wrapped.state_dict())
    for model in (plain, wrapped):
        torch.manual_seed(3)
        model.train().trial(2).backward()
    for (name, p), q in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    with torch.no_grad():
        assert torch.equal(drawn(plain.eval(), [1], [2]), drawn(wrapped.eval(), [1], [2]))


def test_a_block_compiles_as_one_graph() -> None:
    """Traced whole, without generating code."""
    plain, compiled = tiny(dropout=0.0), tiny(dropout=0.0)
    for block in compiled.blocks():
        block.compile(fullgraph=True, backend="eager")
    arguments = (images(), torch.tensor([0, 3, 1]), torch.arange(3), 0, Objective())
    torch.testing.assert_close(compiled(*arguments)["loss"], plain(*arguments)["loss"])


def test_published_guidance_is_told_apart_from_its_other_readings() -> None:
    """The readings of the confidence give other logits, so that the reference numbers decide for one."""
    transformer = tiny().double().eval().transformer
    ids = torch.randint(0, 24, (1, N), generator=torch.Generator().manual_seed(3))

    def logits(soft: SoftGuidance | None) -> Tensor:
        seen = []
        choose = lambda s, guided, _: seen.append(guided) or ids[:, s]  # noqa: E731
        with torch.no_grad():
            draw_tokens(transformer, torch.tensor([1]), N, Guidance(13.0, 1.4, 1.0, soft), choose)
        return torch.stack(seen)

    found = [logits(soft) for soft in (
        None, SoftGuidance(), SoftGuidance("maximum"), SoftGuidance(own=True), SoftGuidance(step_norm=False)
    )]  # fmt: skip
    for i, a in enumerate(found):
        assert torch.equal(a[0], found[0][0])  # nothing lies behind the first token
        assert all((a - b).norm() / b.norm() > 1e-3 for b in found[:i])


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model.strength is 2.0; model.step_norm=false has no use for it"):
        tiny(strength=2.0, step_norm=False)
    with pytest.raises(ValueError, match="model.confidence is maximum; model.softcfg=false has no use for it"):
        tiny(softcfg=False, confidence="maximum")
    with pytest.raises(ValueError, match="model.tokenizer is null"):
        tiny(tokenizer=None)
    with pytest.raises(ValueError, match="model.tokenizer nowhere: no such file"):
        tiny(tokenizer="nowhere")
    model = tiny()
    for objective, sampling, message in (
        (Objective(predict="x"), Sampling(), "objective.predict is x"),
        (Objective(), Sampling(interval=(0.1, 0.9)), "sample.interval"),
        (Objective(), Sampling(steps=50), "sample.steps is 50"),
        (Objective(), Sampling(temperature=0.0), "sample.temperature is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.check_settings(objective, sampling)
    model.check_settings(Objective(class_drop=0.5), Sampling(guidance=9.0, temperature=0.9, seed=3, batch=2))


def test_the_copy_that_a_run_keeps_is_the_tokenizer(tmp_path: Path) -> None:
    model, part = tiny(), alitok.Settings.built_on[0]
    config = SimpleNamespace(model=model.settings, data=SimpleNamespace(image_size=16))
    part.copy(config, tmp_path)
    again = tiny(tokenizer=str(tmp_path))
    assert part.places(config.model, tmp_path.parent) == {"tokenizer": str(tmp_path.parent / "tokenizer")}
    for p, q in zip(model._tokenizer[0].parameters(), again._tokenizer[0].parameters(), strict=True):
        assert torch.equal(p, q)
