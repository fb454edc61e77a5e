"""What the engine asks of a generator, and what it gets where a system says nothing.

A system is one module of this package with `Settings`, the section `model` of a configuration, and
`build(settings, image_size, num_classes)`, which gives one of two kinds of generator:

    System            predicts the flow from noise to data: of pixels, or of what it encodes images as and decodes again
    SequentialSystem  draws an image piece after piece, and has a loss of its own

Published weights are read by interop/<name>.py. The name of the module is what `model.system` names; nothing else has
to be told of a new one.

Shapes: B batch, S x S pixels, n patches a side, L = n n tokens, D width, p patch size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pixelgen_fast.config import Objective, Sampling
from pixelgen_fast.diffusion.path import Noising, to_unit
from pixelgen_fast.errors import InputError
from pixelgen_fast.layers import Float32Tables
from pixelgen_fast.models.built_on import BuiltOn
from pixelgen_fast.models.matrices import Matrices, matrices_of
from pixelgen_fast.settings import above, at_least, refuse_unused


def width_setting(default: int) -> Any:
    """A setting that counts channels, heads, tokens or pixels a side."""
    return above(0, default=default, most=65_536)


def depth_setting(default: int, least: int = 1) -> Any:
    """A setting that counts or numbers blocks."""
    return at_least(least, default=default, most=1000)


def shape_text(shape: Sequence[int]) -> str:
    """The shape of a batch of these, for messages: [B, 3, 16, 16]."""
    return f"[{', '.join(map(str, ('B', *shape)))}]"


@dataclass
class Settings:
    """What the settings of every system have; those of a system add its own and say the defaults."""

    # what the model is built on and neither trains nor saves: its runs and exports keep copies
    built_on: ClassVar[tuple[BuiltOn, ...]] = ()

    system: str = ""
    hidden_size: int = width_setting(0)
    num_heads: int = width_setting(1)
    patch_size: int = width_setting(16)

    def alone(self) -> Settings:
        """Settings of a model that is asked for predictions only: without what images are encoded and decoded by."""
        return self


class BaseSystem(Float32Tables, ABC):
    """What a generator of either kind is: a network for images [3, S, S] of num_classes classes.

    tap_depth: the last block whose tokens may be tapped for feature alignment, 0 for none. first_tap: 1, or 0 where a
    network before the blocks gives tokens too.
    """

    first_tap: ClassVar[int] = 1
    # name of the parameter [num_classes + 1, ...] with a row for each class, the last for no class
    class_table: ClassVar[str] = "y_embed.weight"
    # what it reads of the sections `objective` and `sample`; anything else must be at its default
    used_objective: Collection[str] = frozenset(entry.name for entry in fields(Objective))
    used_sampling: Collection[str] = frozenset(entry.name for entry in fields(Sampling)) - {"temperature", "passes"}
    # whether a forward pass in training draws from torch's generator, which is then seeded before each
    draws: bool = False
    # whether all steps of training have tensors of the same shapes, as a CUDA graph needs
    fixed_shapes: bool = True

    def __init__(self, settings: Settings, image_size: int, num_classes: int, tap_depth: int = 0) -> None:
        super().__init__()
        p = settings.patch_size
        if image_size % p:
            raise InputError(f"data.image_size {image_size} does not divide into model.patch_size {p} patches")
        self.patch_size, self.grid = p, image_size // p
        self.image_size, self.num_classes = image_size, num_classes
        self.hidden_size, self.head_dim = settings.hidden_size, settings.hidden_size // settings.num_heads
        self.system, self.tap_depth = settings.system, tap_depth

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The modules that recomputation and compilation take one by one."""

    def matrices(self) -> Matrices:
        """The weights that Muon trains, where a run has it, with the number of matrices that each stacks.

        Where a system says nothing, those of the linear layers in its blocks, without modulations.
        """
        return matrices_of(self.blocks())

    @abstractmethod
    def whole_modules(self) -> list[nn.Module]:
        """The modules that read parameters of children which they do not call: ZeRO-3 must gather each as a whole."""

    @abstractmethod
    def trial(self, batch: int) -> Tensor:
        """A forward pass of training on `batch` empty images, where the parameters are: to count FLOPs and memory."""

    def read_shapes(self) -> None:
        """Of a model on the meta device: make the frozen networks that training runs and building left away, to count
        what they do. Reads no weights; raises ImportError where their library lacks."""

    def check_complete(self) -> None:
        """Raise InputError, before a run begins, for a model that lacks what images are encoded or drawn by."""

    def tap_width(self, tap: int) -> int:
        """Width of the tokens that `tap` gives."""
        return self.hidden_size

    def check_settings(self, objective: Objective, sampling: Sampling) -> None:
        """Raise ConfigError, naming it, for a setting of a run or a command that this system would ignore."""
        refuse_unused(objective, Objective, self.used_objective, "objective.", self.system)
        refuse_unused(sampling, Sampling, self.used_sampling, "sample.", self.system)

    def check_images(self, z: Tensor) -> None:
        """Raise ValueError for images of another size than the model's; z [B, 3, S, S] or uint8 [B, S, S, 3]."""
        side = self.image_size
        if tuple(z.shape[1:]) not in ((3, side, side), (side, side, 3)):
            name = type(self).__name__
            wanted, found = shape_text((3, side, side)), shape_text(z.shape[1:])
            raise ValueError(f"{name} was built for images {wanted}, got {found}")

    def check_tap(self, tap: int | None) -> None:
        """Raise ValueError for a tap that is no block of the model."""
        if tap is not None and not self.first_tap <= tap <= self.tap_depth:
            name = type(self).__name__
            raise ValueError(f"tap {tap}: this {name} has blocks {self.first_tap} to {self.tap_depth}")


class System(BaseSystem):
    """A flow: forward(z [B, C, H, W], t [B] in [0, 1], y int64 [B]) -> [B, C, H, W]; y = num_classes is no class.

    z is of the shape of a sample: [3, S, S], unless the system encodes images. With tap = k, from first_tap to
    tap_depth, it returns a pair, whose second is the tokens after block k [B, L, tap_width(k)], for feature alignment.
    Raises ValueError for other images or another tap.
    """

    # velocity_loss noises and compares inside the model's own operators
    fuses_loss: ClassVar[bool] = False
    # forward(..., both=True) gives a pair (prediction, weaker prediction) as the prediction: both learn by the same
    # loss, and guidance leads away from the weaker one instead of from the null class
    guides_itself: ClassVar[bool] = False
    # how often training hides the grounding from an image, for a forward(..., ground=bool [B]) that takes it
    grounding_drop: float | None = None

    @abstractmethod
    def forward(self, z: Tensor, t: Tensor, y: Tensor, tap: int | None = None) -> Tensor | tuple[Tensor, Tensor]: ...

    @property
    def sample_shape(self) -> Sequence[int]:
        """Shape of what the flow ends in."""
        return (3, self.image_size, self.image_size)

    def encode(self, images: Tensor) -> Tensor:
        """What the flow should end in for images uint8 [B, S, S, 3]: float32 [B, *sample_shape]; pixels in [-1, 1]."""
        return to_unit(images)

    def decode(self, x: Tensor) -> Tensor:
        """Images of what the flow ended in: [B, *sample_shape] -> [B, 3, S, S], about [-1, 1], not clipped."""
        return x

    def velocity_loss(
        self, images: Tensor, y: Tensor, noising: Noising, weight_B: Tensor, tap: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Weighted squared error of the predicted velocity, float32 [B], noised inside; for systems that fuse it.

        images: uint8 [B, S, S, 3]. y: int64 [B]. weight: float32 [B]. The same as `forward` on the noised images and
        `diffusion.loss.flow_loss`.
        """
        raise TypeError(f"{type(self).__name__} does not fuse its loss: call forward on noised images")

    def trial(self, batch: int) -> Tensor:
        like = next(self.parameters())
        z = torch.empty(batch, *self.sample_shape, device=like.device, dtype=like.dtype)
        t = torch.zeros(batch, device=like.device)
        return self(z, t, torch.zeros(batch, dtype=torch.int64, device=like.device))


class SequentialSystem(BaseSystem):
    """A generator that draws piece after piece: forward(images uint8 [B, S, S, 3], y int64 [B], numbers int64 [B],
    seed, objective) -> {part of the loss: float32 [B]}; y = num_classes is no class.

    What it draws at random is a function of (seed, image number), by Philox, or of torch's generator if it `draws`.
    objective: of the configuration. What a system does not use of it and of `Sampling` is refused (check_settings).
    loss_weights: the weight of each part.
    """

    loss_weights: ClassVar[dict[str, float]] = {"loss": 1.0}
    used_objective: Collection[str] = frozenset({"class_drop"})
    used_sampling: Collection[str] = BaseSystem.used_sampling - {"end", "guide"}

    @abstractmethod
    def forward(
        self, images: Tensor, y: Tensor, numbers: Tensor, seed: int, objective: Objective
    ) -> dict[str, Tensor]: ...

    @abstractmethod
    def draw(
        self,
        labels: Tensor,
        numbers: Tensor,
        settings: Sampling,
        objective: Objective,
        before_pass: Callable[[], object],
    ) -> Tensor:
        """Images of these classes, about [-1, 1], not clipped, float32 [n, 3, S, S] on the model's device.

        labels, numbers: int64 [n] there; sample n is a function of (settings.seed, number, label).
        before_pass: to be called before each pass through a network; what it raises ends the drawing.
        """

    def trial(self, batch: int) -> Tensor:
        side, device = self.image_size, next(self.parameters()).device
        images = torch.zeros(batch, side, side, 3, dtype=torch.uint8, device=device)
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        parts = self(images, zeros, zeros, 0, Objective())
        return sum(weight * parts[name].sum() for name, weight in self.loss_weights.items())
