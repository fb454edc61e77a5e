"""The training of a decoder: the generators' trainer, with two sides in a step and a decoder to keep at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from pixelgen_fast.data import Batch
from pixelgen_fast.data.cache import published_folder
from pixelgen_fast.decoding import assemble, step
from pixelgen_fast.decoding.report import DecoderReport
from pixelgen_fast.decoding.schema import ENCODER, Data, from_dict
from pixelgen_fast.engine.assemble import Parts
from pixelgen_fast.engine.report import Report
from pixelgen_fast.engine.trainer import Trainer
from pixelgen_fast.rae.encoder import copy_encoder


class DecoderTrainer(Trainer):
    """`DecoderTrainer(config, heart).run()` trains to the end, writes <run.dir>/decoder, and returns the exit code."""

    fixed_sections: ClassVar[tuple[str, ...]] = ("encoder.network", "encoder.layers", "decoder.", "discriminator.taps")
    fixed: ClassVar[tuple[str, ...]] = ("data.image_size", "data.num_classes", "discriminator.network")
    read_config: ClassVar[Callable[[dict[str, Any]], Any]] = staticmethod(from_dict)

    def assemble(self) -> Parts:
        return assemble.assemble(self.config, self.heart)

    def prepare(self) -> None:
        """Keep a copy of the encoder, which the run then resumes with and the decoder is kept with."""
        kept, e = self.folder.root / ENCODER, self.parts.built.encoder
        if self.rank == 0 and e.weights != str(kept):
            with published_folder(kept) as work:
                copy_encoder(e.network, e.weights, work)

    def read_as(self) -> Data:
        data = self.config.data
        return replace(data, image_size=data.resize or data.image_size)

    def new_report(self, before: Report | None) -> DecoderReport:
        return DecoderReport(self.parts, self.nimg, self.returns, before)

    def learn(
        self, batches: Sequence[Batch], first: Sequence[int], share: float, at: Callable[[str], object]
    ) -> Tensor:
        plan = step.plan(self.config, self.nimg, self.parts.total)
        plan = plan._replace(decoder_lr=share * plan.decoder_lr, discriminator_lr=share * plan.discriminator_lr)
        return step.decoder_step(self.engine, self.parts.objective, batches, plan, at)
