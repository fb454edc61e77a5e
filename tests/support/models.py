"""Models of every system small enough for tests, their weights at no special value."""

from collections.abc import Sequence
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from pixelgen_fast import models
from pixelgen_fast.models.fractal import Level
from pixelgen_fast.models.system import BaseSystem

TINY = {
    "pixeldit": dict(hidden_size=24, num_heads=2, patch_depth=2, patch_size=4, pixel_hidden_size=8, pixel_depth=2),
    "jit": dict(hidden_size=24, num_heads=2, depth=4, patch_size=4, bottleneck=6, context_length=3, context_start=1),
    "deco": dict(hidden_size=24, num_heads=2, patch_depth=2, patch_size=4, decoder_width=8, decoder_depth=2),
    "pixeldit2": dict(hidden_size=24, num_heads=2, depth=4, patch_size=4, context_length=3, context_start=1),
    "patch_ar": dict(
        hidden_size=24, num_heads=2, depth=2, patch_size=4, class_tokens=2, head_width=16, head_depth=2
    ),
    "ditdh": dict(
        hidden_size=24, num_heads=2, depth=2, head_width=32, head_heads=2, head_depth=1,
        patch_size=4, latent_channels=48, encoder="patches",
    ),
    "raev2": dict(
        hidden_size=24, num_heads=2, depth=3, head_width=32, head_heads=2, head_depth=1, time_tokens=2, class_tokens=3,
        base_depth=2, patch_size=4, latent_channels=48, encoder="patches",
    ),
    "fractal": dict(
        hidden_size=24, num_heads=2, depth=1, patch_size=4, inner=[Level(1, 16, 2, 1, passes=2)], pixel_hidden_size=64,
        dropout=0.0,
    ),
    "alitok": dict(
        hidden_size=24, num_heads=2, depth=2, patch_size=4, tokenizer="random", codebook_size=24, token_size=8,
        prefix_tokens=5, encoder_width=24, encoder_depth=1, encoder_heads=2, decoder_width=32, decoder_depth=1,
        decoder_heads=2, decoder_tokens=3,
    ),
    "mar": dict(
        hidden_size=24, num_heads=2, depth=2, patch_size=4, class_tokens=2, head_width=16, head_depth=2, dropout=0.0
    ),
    "dino_student": dict(
        hidden_size=24, num_heads=2, patch_depth=2, patch_size=4, pixel_hidden_size=8, pixel_depth=1
    ),
}  # fmt: skip


def systems_of(kind: type[BaseSystem]) -> list[str]:
    """Names of the systems of one kind."""
    builds = {name: get_type_hints(models.system_module(name).build)["return"] for name in models.systems()}
    return [name for name, built in builds.items() if issubclass(built, kind)]


def tiny(system: str, image_size: int = 16, randomise: bool = True, num_classes: int = 3, **changes: Any) -> BaseSystem:
    """A small model. randomise: draw every trained weight anew; zeros at the start would hide what they do."""
    torch.manual_seed(0)
    module = models.system_module(system)
    model = module.build(module.Settings(**(TINY.get(system, {}) | changes)), image_size, num_classes)
    for parameter in model.parameters() if randomise else ():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    for norm in model.modules() if randomise else ():
        if isinstance(norm, nn.LayerNorm | nn.RMSNorm) and norm.elementwise_affine and norm.weight.requires_grad:
            nn.init.normal_(norm.weight, mean=1.0, std=0.2)  # near zero, what goes through several is lost
    return model


def tiny_of(system: str, **settings: Any) -> Any:
    """`tiny` of one system, with settings that its tests share."""
    return partial(tiny, system, **settings)


def batch(dtype: torch.dtype = torch.float32, shape: Sequence[int] = (3, 16, 16)) -> tuple[Tensor, Tensor, Tensor]:
    """(z, t, y) of two noised samples, the second without a class."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, *shape, generator=generator, dtype=dtype)
    return z, torch.rand(2, generator=generator, dtype=dtype), torch.tensor([0, 3])
