"""AliTok: an image as words of a frozen tokenizer, drawn one after another (arXiv 2506.05289), with SoftCFG.

    ids   = tokenizer(image)                                      N words: a prefix, then the grid row by row
    loss  = mean over j of -log softmax(transformer(y, id_0 .. id_{j-1}))[id_j]
    image = tokenizer^-1(ids),  id_j drawn from the guided softmax with the j-th uniform number of the sample

The network is models/alitok_transformer.py, guidance models/guided_tokens.py, the tokenizer models/alitok_tokenizer.py.
No licence was given for the authors' code and weights: this is written from the formulas, and weights stay theirs.
Shapes: B batch, S x S pixels, N words an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from pixelgen_kernels import philox
from torch import Tensor, nn

from pixelgen_fast.config import Config, Objective, Sampling
from pixelgen_fast.diffusion.path import to_fractions
from pixelgen_fast.models import system
from pixelgen_fast.models.alitok_tokenizer import TokenizerSize, load_tokenizer, save_tokenizer
from pixelgen_fast.models.alitok_transformer import TokenTransformer
from pixelgen_fast.models.built_on import BuiltOn
from pixelgen_fast.models.guided_tokens import Confidence, Guidance, SoftGuidance, draw_tokens, inverse_transform
from pixelgen_fast.models.system import SequentialSystem, depth_setting, width_setting
from pixelgen_fast.settings import ConfigError, above, refuse_unused, within


def copy_tokenizer(config: Config, folder: Path) -> None:
    """Write the tokenizer of a configuration into a folder."""
    size = tokenizer_size(config.model, config.data.image_size // config.model.patch_size)
    save_tokenizer(load_tokenizer(size, config.model.tokenizer), folder)


@dataclass
class Settings(system.Settings):
    """Size of an AliTok, and how it is guided. The defaults are XL; L is 1024 x 24, B 768 x 24, 16 heads each.

    Guidance itself is sample.guidance, the gamma of models/guided_tokens.py; 1 is none.
    """

    built_on: ClassVar[tuple[BuiltOn, ...]] = (
        BuiltOn("tokenizer", {"tokenizer": ""}, copy_tokenizer, published="alitok"),
    )

    system: str = "alitok"
    hidden_size: int = width_setting(1280)
    num_heads: int = width_setting(16)
    depth: int = depth_setting(32)
    # of embedded tokens, shares of attention, and both branches
    dropout: float = within(0, 1, open_high=True, default=0.1)
    # a file in the published names, a folder that holds a tokenizer, or "random". It is never trained; a run keeps a
    # copy beside its checkpoints, and so does an export
    tokenizer: str | None = None
    # of the tokenizer, as published
    codebook_size: int = width_setting(4096)
    token_size: int = width_setting(32)
    prefix_tokens: int = width_setting(17)
    encoder_width: int = width_setting(768)
    encoder_depth: int = depth_setting(12)
    encoder_heads: int = width_setting(12)
    decoder_width: int = width_setting(1024)
    decoder_depth: int = depth_setting(24)
    decoder_heads: int = width_setting(16)
    decoder_tokens: int = width_setting(32)
    # k of the guidance schedule: above 1 guides later tokens more
    guidance_power: float = above(0, default=1.5)
    # soften guidance by SoftCFG, and how: the probability of the sampled token or the largest one, each token's own
    # instead of the next one's, divided by their sum or not, and the exponent then
    softcfg: bool = True
    confidence: Confidence = "sampled"
    own_confidence: bool = False
    step_norm: bool = True
    strength: float = above(0, default=1.0)


class AliTok(SequentialSystem):
    """The SequentialSystem of this module.

    The tokenizer is kept out of the children: neither trained, sharded nor saved, it moves with the model but stays in
    float32, in which words are told apart.
    """

    class_table: ClassVar[str] = "transformer.y_embed.weight"
    used_objective = frozenset({"class_drop"})
    used_sampling = frozenset({"guidance", "temperature", "seed", "batch"})

    def __init__(self, settings: Settings, image_size: int, num_classes: int) -> None:
        super().__init__(settings, image_size, num_classes)
        check(settings)
        self.settings, self.draws = settings, settings.dropout > 0
        size = tokenizer_size(settings, self.grid)
        self.length = size.length
        self._tokenizer = (load_tokenizer(size, settings.tokenizer),)  # a module that is an attribute becomes a child
        self.transformer = build_transformer(settings, self.grid, num_classes)

    def forward(self, images: Tensor, y: Tensor, numbers: Tensor, seed: int, objective: Objective) -> dict[str, Tensor]:
        self.check_images(images)
        with torch.no_grad():
            ids = self._tokenizer[0].encode(to_fractions(images))
        logits = self.transformer(ids[:, :-1], y)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return {"loss": F.cross_entropy(logits.mT, ids, reduction="none").mean(dim=1)}

    def draw(
        self,
        labels: Tensor,
        numbers: Tensor,
        settings: Sampling,
        objective: Objective,
        before_pass: Callable[[], object],
    ) -> Tensor:
        s = self.settings
        soft = SoftGuidance(s.confidence, s.step_norm, s.strength, s.own_confidence) if s.softcfg else None
        guidance = Guidance(settings.guidance, s.guidance_power, settings.temperature, soft)
        u = philox.uniform(settings.seed, numbers, philox.SAMPLING, self.length)
        ids = draw_tokens(
            self.transformer,
            labels,
            self.length,
            guidance,
            lambda step, logits, _: inverse_transform(logits, u[:, step]),
            before_pass,
        )
        return self._tokenizer[0].decode(ids) * 2 - 1

    def check_settings(self, objective: Objective, sampling: Sampling) -> None:
        super().check_settings(objective, sampling)
        if sampling.temperature == 0:
            raise ConfigError(
                "sample.temperature is 0, and alitok divides by it; give a small one for the likeliest words"
            )

    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.blocks)

    def whole_modules(self) -> list[nn.Module]:
        return [*self.blocks(), self.transformer.head]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._tokenizer[0].to(self.transformer.y_embed.weight.device)
        return self


def check(settings: Settings) -> None:
    """Raise ConfigError, naming it, for a setting of SoftCFG that is given where it acts on nothing."""
    used = {entry.name for entry in fields(Settings)}
    if not settings.softcfg:
        used -= {"confidence", "own_confidence", "step_norm", "strength"}
        refuse_unused(settings, Settings, used, "model.", "model.softcfg=false")
    if not settings.step_norm:
        refuse_unused(settings, Settings, used - {"strength"}, "model.", "model.step_norm=false")


def build_transformer(settings: Settings, grid: int, num_classes: int) -> TokenTransformer:
    """The transformer that the settings describe, for images of grid x grid patches; fresh weights."""
    s = settings
    return TokenTransformer(
        s.codebook_size, num_classes, s.hidden_size, s.num_heads, s.depth, s.prefix_tokens, grid, s.dropout
    )


def tokenizer_size(settings: Settings, grid: int) -> TokenizerSize:
    """The tokenizer that the settings describe, for images of grid x grid patches."""
    s = settings
    return TokenizerSize(
        grid=grid,
        patch=s.patch_size,
        prefix=s.prefix_tokens,
        words=s.codebook_size,
        vector=s.token_size,
        encoder_width=s.encoder_width,
        encoder_depth=s.encoder_depth,
        encoder_heads=s.encoder_heads,
        decoder_width=s.decoder_width,
        decoder_depth=s.decoder_depth,
        decoder_heads=s.decoder_heads,
        decoder_tokens=s.decoder_tokens,
    )


def build(settings: Settings, image_size: int, num_classes: int) -> AliTok:
    """The model of a configuration: fresh weights, beside the tokenizer's own."""
    return AliTok(settings, image_size, num_classes)
