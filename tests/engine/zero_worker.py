"""What one rank does in test_zero.py and test_checkpoint.py: `python zero_worker.py TASK FOLDER`."""

import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixelgen_fast.engine.muon import Muon
from pixelgen_fast.engine.optimizer import AdamWEMA
from pixelgen_fast.engine.zero import ZeroEngine, init_distributed
from pixelgen_fast.runs import checkpoint
from pixelgen_fast.runs.saver import Saver

STEPS, GLOBAL_BATCH, ACCUMULATION, CLIP, LR = 20, 8, 2, 0.7, 3e-3
DECAYS = (0.9, 0.99)
MOMENTUM, MUON_STEPS = 0.9, 6
# stage, whether the wide matrix comes first, micro-batches a step
MUON_RUNS = [(1, False, 1), (2, True, 4), (1, True, 4), (2, False, 1)]
CUT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


class Net(nn.Module):
    """Odd sizes, a parameter of one element, a frozen one, a buffer, and a head that is trained but not averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.projector = nn.Linear(3, 7), nn.Linear(7, 5), nn.Linear(5, 3)
        self.gain = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.linspace(-1, 1, 5), requires_grad=False)
        self.register_buffer("shift", torch.linspace(0, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.projector(torch.tanh(self.second(torch.tanh(self.first(x)))) + self.frozen) + self.shift


def net(dtype: torch.dtype = torch.float32) -> Net:
    model = Net()
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad and p.numel() > 1:
            p.data = torch.randn(p.shape, generator=generator) / 2
    return model.to(dtype)


class Mixer(nn.Module):
    """Three matrices stacked in one weight, a wide one, a tall one, and a head for AdamW. wide_first: in its order.

    The 87 elements of the matrices are 44 for each of two ranks: the end of a slice cuts the wide matrix in the middle,
    or, where that comes first, the first of the three stacked ones.
    """

    def __init__(self, wide_first: bool = False) -> None:
        super().__init__()
        self.packed, self.wide, self.tall, self.head = (nn.Linear(*s) for s in [(3, 9), (9, 4), (4, 6), (6, 3)])
        generator = torch.Generator().manual_seed(4)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 2
        self.wide_first = wide_first

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.packed, self.wide, self.tall):
            x = torch.tanh(layer(x))
        return self.head(x)

    def matrices(self) -> dict[nn.Parameter, int]:
        found = {self.packed.weight: 3, self.wide.weight: 1, self.tall.weight: 1}
        return dict(sorted(found.items(), key=lambda one: one[0] is not self.wide.weight)) if self.wide_first else found


def mixer_optimizer(model: Mixer, scale: str = "match_rms_adamw") -> Muon:
    stacked = model.matrices()
    rest = [p for p in model.parameters() if p not in stacked]
    own = {"stacked": stacked, "momentum": MOMENTUM, "scale": scale, "steps": 5, "lr_factor": 2.0, "lr": 2 * LR}
    groups = [{"params": [*stacked], "weight_decay": 0.1, **own}, {"params": rest}]
    return Muon(groups, lr=LR, betas=(0.9, 0.95), ema_decays=DECAYS, clip_norm=CLIP)


def build_mixer(stage: int, world: int, accumulation: int, wide_first: bool = False, **more: Any) -> ZeroEngine:
    model = Mixer(wide_first)
    return ZeroEngine(
        model, mixer_optimizer(model), stage=stage, micro_batch=GLOBAL_BATCH // world // accumulation,
        accumulation=accumulation, **more,
    )  # fmt: skip


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(GLOBAL_BATCH, 3, generator=generator)
    return x, torch.sin(2 * x) * 3


def build(
    stage: int, world: int, *, overrides: dict | None = None, model: Net | None = None,
    accumulation: int = ACCUMULATION, **dtypes: str,
) -> ZeroEngine:  # fmt: skip
    model = model or net()
    head = [p for name, p in model.named_parameters() if name.startswith("projector")]
    body = [p for name, p in model.named_parameters() if not name.startswith("projector") and p.requires_grad]
    groups = [{"params": body, "weight_decay": 0.1}, {"params": head, "ema": False}]
    return ZeroEngine(
        model, AdamWEMA(groups, lr=LR, betas=(0.9, 0.95), ema_decays=DECAYS, clip_norm=CLIP), stage=stage,
        micro_batch=GLOBAL_BATCH // world // accumulation, accumulation=accumulation, overrides=overrides, **dtypes,
    )  # fmt: skip


def train(engine: ZeroEngine, step: int, bad: float | None = None, accumulation: int = ACCUMULATION) -> float:
    """One step; `bad` is put into the last rank's last micro-batch. Returns this rank's part of the mean loss."""
    x, y = batch(step)
    size = GLOBAL_BATCH // engine.world // accumulation
    total = 0.0
    for micro in range(accumulation):
        begin = (engine.rank * accumulation + micro) * size
        loss = (engine(x[begin : begin + size].to(dtype_of(engine))).float() - y[begin : begin + size]).square().mean()
        total += loss.item() / accumulation / engine.world
        if bad is not None and micro == accumulation - 1 and engine.rank == engine.world - 1:
            loss = loss * bad
        engine.backward(loss)
        assert engine.step() == (micro == accumulation - 1)
    return total


def dtype_of(engine: ZeroEngine) -> torch.dtype:
    return next(engine.module.parameters()).dtype


def state(engine: ZeroEngine) -> dict[str, dict[str, Tensor]]:
    return {name: engine.gather(name) for name in engine.names()}


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].keys() == b[n].keys() and all(torch.equal(a[n][k], b[n][k]) for k in a[n]) for n in a
    )


def module_follows_master(engine: ZeroEngine) -> bool:
    """The engine's forward pass gives what a plain module with the gathered weights gives."""
    plain = net()
    plain.load_state_dict(engine.state_dict("raw"))
    x = batch(99)[0].to(dtype_of(engine))
    with torch.no_grad():
        return torch.equal(engine(x), plain.to(x.dtype)(x))


def stages(folder: Path, world: int) -> dict:
    return parity(world) | ({"bf16": bf16(world)} if world > 1 else {"masters": own_masters()})


def parity(world: int) -> dict:
    """Twenty steps at each stage, then two bad steps and a good one."""
    found = {}
    for stage in (1, 2, 3):
        engine = build(stage, world, overrides=CUT_ALL)
        start = state(engine)
        losses = torch.tensor([train(engine, step) for step in range(STEPS)])
        if world > 1:
            torch.distributed.all_reduce(losses)
        after, norm, follows = state(engine), engine.grad_norm.item(), module_follows_master(engine)
        train(engine, 50, bad=float("nan"))
        train(engine, 51, bad=float("inf"))
        untouched, skipped = same(after, state(engine)), engine.scalars()
        train(engine, STEPS)
        found[stage] = dict(
            start=start, losses=losses, state=after, norm=norm, follows=follows, untouched=untouched, skipped=skipped,
            later=engine.scalars(), weights=engine.state_dict("ema_0.99"), only_first=len(engine.state_dict(to=0)),
            moved=not same(after, state(engine)), in_a_row=engine.skipped_in_a_row.item(),
        )  # fmt: skip
    return found


def bf16(world: int) -> dict:
    """Bad steps in bf16: DeepSpeed's three optimizers for it, and both ways of accumulating at stage 1.

    At stage 2, and at stage 1 without fp32 accumulation, DeepSpeed leaves the skipping to our optimizer.
    """
    found = {}
    for stage, accumulation in [(1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]:
        dtypes = dict(dtype="bf16", communication_dtype="bf16", accumulation_dtype=accumulation)
        engine = build(stage, world, **dtypes)
        for step in range(3):
            train(engine, step)
        before = state(engine)
        train(engine, 50, bad=float("inf"))
        train(engine, 51, bad=float("nan"))
        untouched, counters, follows = same(before, state(engine)), engine.scalars(), module_follows_master(engine)
        train(engine, 3)
        after = state(engine)
        finite = all(t.isfinite().all() for kinds in after.values() for t in kinds.values())
        moved = not same(before, after)
        found[stage, accumulation] = dict(
            untouched=untouched, counters=counters, follows=follows, finite=finite, moved=moved,
            skipped_by_deepspeed=engine._engine.skipped_steps,
        )  # fmt: skip
    return found


def own_masters() -> dict:
    """One bf16 rank with one micro-batch a step, which has nothing to shard or to add up."""
    engine = build(1, 1, accumulation=1, dtype="bf16")
    start = state(engine)
    for step in range(5):
        train(engine, step, accumulation=1)
    after, norm, follows = state(engine), engine.grad_norm.item(), module_follows_master(engine)
    train(engine, 50, bad=float("nan"), accumulation=1)
    return dict(
        start=start, state=after, norm=norm, follows=follows, untouched=same(after, state(engine)),
        skipped=engine.scalars(), rows_begin=[p.data_ptr() % 32 for p in engine._parameters.values()],
    )  # fmt: skip


def muon(folder: Path, world: int) -> dict:
    """A few steps at each stage, order of the matrices and accumulation; then a bad step, a checkpoint, a good one."""
    found = {}
    for stage, wide_first, accumulation in MUON_RUNS:
        engine = build_mixer(stage, world, accumulation, wide_first)
        for step in range(MUON_STEPS):
            train(engine, step, accumulation=accumulation)
        after = state(engine)
        train(engine, 50, bad=float("nan"), accumulation=accumulation)
        untouched, scalars = same(after, state(engine)), engine.scalars()
        place = folder / f"muon-{world}" / f"{stage}-{wide_first}-{accumulation}"
        checkpoint.save(place, engine, nimg=8 * MUON_STEPS, state={}, keep=1)
        train(engine, MUON_STEPS, accumulation=accumulation)
        cut = None if engine.optimizer._cut is None else engine.optimizer._cut.exchanged
        found[stage, wide_first, accumulation] = dict(
            state=after, norm=engine.grad_norm.item(), untouched=untouched, scalars=scalars, cut=cut, next=state(engine)
        )
    return found | {"bf16": muon_in_bf16(world)}


def muon_in_bf16(world: int) -> dict:
    """DeepSpeed's optimizers for it, and one rank's own masters."""
    found = {}
    runs = [(1, "fp32", 2), (1, "bf16", 2), (2, "fp32", 2)] if world > 1 else [(1, "fp32", 1)]
    for stage, accumulated, accumulation in runs:
        dtypes = dict(dtype="bf16", communication_dtype="bf16", accumulation_dtype=accumulated)
        engine = build_mixer(stage, world, accumulation, **dtypes)
        for step in range(3):
            train(engine, step, accumulation=accumulation)
        before = state(engine)
        train(engine, 50, bad=float("inf"), accumulation=accumulation)
        untouched = same(before, state(engine))
        train(engine, 3, accumulation=accumulation)
        after, plain = state(engine), Mixer()
        plain.load_state_dict(engine.state_dict("raw"))
        x = batch(99)[0].bfloat16()
        found[stage, accumulated] = dict(
            untouched=untouched, moved=not same(before, after), before=before,
            follows=torch.equal(engine(x), plain.bfloat16()(x)),
            finite=all(t.isfinite().all() for kinds in after.values() for t in kinds.values()),
        )  # fmt: skip
    return found


def muon_moved(folder: Path, world: int) -> dict:
    """Checkpoints of one rank and of two, restored here at another stage, and a step."""
    found = {}
    for source, (stage, wide_first, accumulation) in [(w, run) for w in (1, 2) for run in MUON_RUNS[:2]]:
        engine = build_mixer(3 - stage, world, accumulation, not wide_first)
        place = folder / f"muon-{source}" / f"{stage}-{wide_first}-{accumulation}"
        checkpoint.load(checkpoint.find(place), engine)
        here = state(engine)
        train(engine, MUON_STEPS, accumulation=accumulation)
        found[source, stage, wide_first, accumulation] = dict(state=here, next=state(engine))
    return found


def save_at_stage_3(folder: Path, world: int) -> dict:
    engine = build(3, world)
    for step in range(3):
        train(engine, step)
    train(engine, 50, bad=float("nan"))
    refusal = save_where_one_rank_cannot_write(folder / "first", engine)
    behind = Saver(folder / "first", engine, keep=2, background=True)
    behind.save(24, {"config": {"size": "B"}})
    saved = dict(state=state(engine), scalars=engine.scalars(), refusal=refusal)
    train(engine, 3)  # goes on while the ranks' writers agree
    (done,) = behind.wait()
    assert done.error is None, done
    behind.close()
    return saved


def save_where_one_rank_cannot_write(folder: Path, engine: ZeroEngine) -> str:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if engine.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        checkpoint.save(folder, engine, nimg=20, state={}, keep=2)
    except checkpoint.CheckpointError as error:
        assert not any(folder.iterdir())
        dist.barrier()  # a rank that went on at once would put its next checkpoint there before the other looks
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "saved"


def move_to_stage_1(folder: Path, world: int) -> dict:
    engine = build(1, world)
    told = checkpoint.load(checkpoint.find(folder / "first"), engine)
    checkpoint.save(folder / "second", engine, nimg=24, state=told, keep=2)
    follows = module_follows_master(engine)
    return dict(state=state(engine), scalars=engine.scalars(), follows=follows, told=told)


def move_on(folder: Path, world: int) -> dict:
    """The second checkpoint at stage 2, and at stage 3 with parameters kept whole and with none kept whole."""
    found = {}
    for name, stage, overrides in [("2", 2, None), ("3", 3, None), ("3 cut", 3, CUT_ALL)]:
        model = net()
        model.shift.fill_(9.0)
        engine = build(stage, world, overrides=overrides, model=model)
        checkpoint.load(checkpoint.find(folder / "second"), engine)
        here, scalars, follows = state(engine), engine.scalars(), module_follows_master(engine)
        train(engine, 3)
        found[name] = dict(state=here, scalars=scalars, follows=follows, next=state(engine))
    return found


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    rank, world, local_rank = init_distributed("cpu")
    assert (rank, world, local_rank) == init_distributed("cpu")
    result = globals()[task](folder, world)
    if rank == 0:
        torch.save(result, folder / f"{task}-{world}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
