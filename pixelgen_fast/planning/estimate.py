"""The plan of a run: seconds of a step on a card, three times, and all that follows from them.

    step = max(A (forward + backward + recompute) + optimizer + what is sent and not hidden,  host)

    floor         every operation at the card's ceilings, all that can be sent beside backward and forward hidden there
    planned       at the shares of the ceilings that the best publicly measured training block reached
    pessimistic   1.5 times the time at the ceilings, nothing hidden

With measured ceilings the floor is at them, planned at 630 / 798 and 2.8 / 3.0 of them; without, floor is the data
sheet, planned 630 / 989 and 2.8 / 3.35 of it, and 798 / 989 and 3.0 / 3.35 of it count as the ceilings that
pessimistic is measured from. 630 TFLOP/s and 2.8 TB/s are the rates of the best H100 block, 798 and 3.0 those of single
kernels. Steps of PixelDiT-XL and L on an H200 took 1.09 and 1.07 times what is planned at its measured ceilings, 1.3
times the time at them, and 1.4 before anything was tuned there (benchmarks/results/2026-11-27_h200).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pixelgen_fast.engine.plan import Plan
from pixelgen_fast.planning import communication
from pixelgen_fast.planning.cards import Card
from pixelgen_fast.planning.parts import FROZEN
from pixelgen_fast.planning.rates import Rates
from pixelgen_fast.planning.step import Step

H100_SHEET, H100_CEILINGS, H100_BLOCK = (989e12, 3.35e12), (798e12, 3.0e12), (630e12, 2.8e12)
SLOWER = 1.5
# seconds of the host for an operation: of PixelDiT's forward and backward on one EPYC core
# (benchmarks/results/host.jsonl), and of the step of its B on an H200, 47.8 ms that wait for the host
HOST = {"floor": 0.0, "planned": 35e-6, "pessimistic": 90e-6}
CASES = tuple(HOST)
RESERVE = 2e9  # bytes of a GPU for CUDA, libraries and gaps between tensors (assumed)
IMAGENET = 1_281_167
EPOCHS = (38, 80, 160, 320, 600, 800)
CORE_IMAGES = 797  # JPEG images a second of one core, measured (README, Measured)


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind: `gpus` of them, in equal numbers on `nodes` nodes."""

    card: Card
    gpus: int
    nodes: int


def rates_of(card: Card) -> dict[str, Rates]:
    """Rates of the three cases."""
    limits, one = card.limits, Rates(1.0, 1.0)
    base = H100_CEILINGS if card.ceilings else H100_SHEET
    ceilings = one if card.ceilings else Rates(*(c / b for c, b in zip(H100_CEILINGS, base, strict=True)))
    block = Rates(*(c / b for c, b in zip(H100_BLOCK, base, strict=True)))
    slow = Rates(ceilings.products / SLOWER, ceilings.memory / SLOWER, 1 / SLOWER)
    shares = dict(zip(CASES, (one, block, slow), strict=True))
    return {
        name: Rates(
            limits.products * s.products, limits.memory * s.memory, limits.instructions * s.instructions, limits.float32
        )
        for name, s in shares.items()
    }  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Seconds of a step in one of CASES: its parts, sent: of communication, shown: what of it is not hidden."""

    name: str
    rates: Rates
    forward: float
    backward: float
    recompute: float
    optimizer: float
    sent: float
    shown: float
    host: float

    @property
    def gpu(self) -> float:
        return self.forward + self.backward + self.recompute + self.optimizer + self.shown

    @property
    def step(self) -> float:
        return max(self.gpu, self.host)


@dataclass(frozen=True)
class Estimate:
    """A traced step on a machine."""

    step: Step
    machine: Machine

    @property
    def accumulation(self) -> int:
        t = self.step.config.train
        return t.global_batch // (t.micro_batch * self.machine.gpus)

    @property
    def stage(self) -> int:
        return self.step.config.train.zero_stage

    @cached_property
    def sent(self) -> list[communication.Collective]:
        return communication.collectives(self.step.parameters, self.stage, self.accumulation)

    @cached_property
    def cases(self) -> dict[str, Case]:
        return {name: self._case(name, rates) for name, rates in rates_of(self.machine.card).items()}

    def _case(self, name: str, rates: Rates) -> Case:
        trace, m, times = self.step.trace, self.machine, self.accumulation
        phases = {p: times * trace.seconds(rates, p) for p in ("forward", "backward", "recompute")}
        sent = communication.seconds(self.sent, m.card, m.gpus, m.nodes)
        beside = phases["forward"] + phases["backward"] + phases["recompute"]
        # stages 1 and 2 of the engine wait for what they send; the floor is of one that would not
        hides = name == "floor" or (name == "planned" and self.stage == 3)
        operations = times * len(trace.operations) + len(self.step.optimizer.operations)
        graphed = self.step.config.train.cuda_graph
        return Case(
            name,
            rates,
            phases["forward"],
            phases["backward"],
            phases["recompute"],
            self.step.optimizer.seconds(rates),
            sent,
            max(0.0, sent - beside) if hides else sent,
            0.0 if graphed else HOST[name] * operations,
        )

    def images_per_second(self, case: str) -> float:
        """Of one GPU."""
        return self.step.config.train.global_batch / self.machine.gpus / self.cases[case].step

    def flops_per_second(self, case: str) -> float:
        """Of the model, on one GPU."""
        return self.images_per_second(case) * self.step.model_flops

    def share(self, case: str) -> float | None:
        """Of the data sheet's rate (MFU); None for a card that has no data sheet here."""
        sheet = self.machine.card.sheet
        return None if sheet is None else self.flops_per_second(case) / sheet[0]

    def hours(self, case: str, images: int) -> float:
        """Of a run of so many images, without drawing, evaluating and checkpoints."""
        batch = self.step.config.train.global_batch
        return -(-images // batch) * self.cases[case].step / 3600

    def energy(self, case: str, images: int) -> float | None:
        """kWh of the GPUs at their data sheet's power, without hosts and cooling; None where that is not known."""
        m = self.machine
        return None if m.card.power is None else self.hours(case, images) * m.gpus * m.card.power / 1000

    def state_bytes(self, stage: int) -> float:
        """Weights, gradients, optimizer, averages, frozen networks and buffers of a rank, at a ZeRO stage."""
        total, world = sum(self.step.parameters), self.machine.gpus
        plan = Plan(total, 0, 0, weight_bytes=2, averages=len(self.step.config.optimizer.ema))
        found = plan.state_bytes(stage, world) + self.step.frozen_bytes
        if world > 1:
            found += communication.GRADIENT * min(total, communication.BUCKET)
        if stage == 3 and world > 1:
            found += communication.WEIGHT * min(total, communication.REUSE)
        return found

    @property
    def image_bytes(self) -> float:
        """The most that tensors of an image take at once."""
        return self.step.peak / self.step.trace.batch

    def memory(self, stage: int) -> float:
        """Bytes of a rank at the configuration's micro-batch, without the reserve."""
        return self.state_bytes(stage) + self.step.peak

    def largest(self, stage: int) -> int | None:
        """Images of the largest micro-batch that fits, 0 for none; None for a card whose memory is not known."""
        if self.machine.card.memory is None:
            return None
        free = self.machine.card.memory - RESERVE - self.state_bytes(stage)
        return max(0, int(free // self.image_bytes))

    def fits(self) -> bool:
        """Whether the run as configured fits, as far as the card's memory is known."""
        largest = self.largest(self.stage)
        return largest is None or largest >= self.step.config.train.micro_batch

    def loader(self, case: str) -> tuple[float, float, float | None]:
        """(images a second that all GPUs need, cores that decode them, share of the GPUs' JPEG engines or None)."""
        needed = self.images_per_second(case) * self.machine.gpus
        engines = self.machine.card.jpeg_images
        share = None if engines is None else self.images_per_second(case) / engines
        return needed, needed / CORE_IMAGES, share

    @property
    def scales(self) -> bool:
        """Whether what more GPUs give can be told: the card's link and network are known."""
        return self.machine.card.link is not None and self.machine.card.network is not None

    def scaled(self, gpus: int, case: str) -> float:
        """Images a second of `gpus` GPUs, each with the images of this plan; nodes of 8 beyond 8.

        A rank's share of the optimizer shrinks with the ranks, what it sends grows.
        """
        m, now = self.machine, self.cases[case]
        nodes = -(-gpus // 8)
        sent = communication.seconds(self.sent, m.card, gpus, nodes)
        beside = now.forward + now.backward + now.recompute
        hides = case == "floor" or (case == "planned" and self.stage == 3)
        shown = max(0.0, sent - beside) if hides else sent
        step = max(beside + now.optimizer * m.gpus / gpus + shown, now.host)
        return gpus * self.step.config.train.global_batch / m.gpus / step

    def part_seconds(self, case: str) -> dict[str, tuple[float, float]]:
        """part -> (forward, backward and recompute) seconds of a step, the slowest first."""
        rates, found = self.cases[case].rates, {}
        for op in self.step.trace.operations:
            forward, backward = found.get(op.part, (0.0, 0.0))
            time = self.accumulation * op.seconds(rates)
            found[op.part] = (forward + time, backward) if op.phase == "forward" else (forward, backward + time)
        return dict(sorted(found.items(), key=lambda item: -sum(item[1])))

    def frozen_seconds(self, case: str) -> float:
        """Of networks that are not trained, in a step."""
        return sum(self.part_seconds(case).get(FROZEN, (0.0, 0.0)))
