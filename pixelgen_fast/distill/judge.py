"""The images of a teacher's training, and how well features tell those that training never saw.

The labels serve the judgement alone: nearest neighbours of the held-out images among the training images vote on their
class, by class tokens, by the mean of patch tokens, and by pixels for comparison.

Shapes: N images, S pixels a side.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pixelgen_fast.config import ConfigError
from pixelgen_fast.data.digits import load_real
from pixelgen_fast.data.encoded import decode
from pixelgen_fast.data.roots import DIGITS, open_root
from pixelgen_fast.diffusion.path import to_fractions
from pixelgen_fast.distill.learner import Learner
from pixelgen_fast.distill.schema import TeacherConfig
from pixelgen_fast.eval.neighbours import effective_rank, knn_accuracy

# The split of the digits that their judge makes (eval/digits.py), whatever the run's seed.
_SPLIT_SEED = 0
_BATCH = 256


class Judge:
    """The images on the device, and `judge(learner)`: how well its features tell those that were held out.

    kept, held: float [N, 3, S, S] in [0, 1]. mean, std: [3, 1, 1], of the kept images' channels.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, kept: np.ndarray, held: np.ndarray, k: int, device: torch.device
    ) -> None:
        x = to_fractions(torch.from_numpy(images).to(device))
        y = torch.from_numpy(labels).to(device)
        self.kept, self.held, self.kept_labels, self.held_labels, self.k = x[kept], x[held], y[kept], y[held], k
        self.mean = self.kept.mean(dim=(0, 2, 3))[:, None, None]
        self.std = self.kept.std(dim=(0, 2, 3))[:, None, None].clamp(min=1 / 255)

    def normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    @torch.no_grad()
    def __call__(self, learner: Learner) -> dict[str, float]:
        kept, held = self._features(learner, self.kept), self._features(learner, self.held)
        unit = F.normalize(held[0], dim=1)
        return {
            "knn_class": self._accuracy(kept[0], held[0]),
            "knn_patches": self._accuracy(kept[1], held[1]),
            "effective_rank": effective_rank(held[0]),
            "deviation": unit.std(dim=0).mean().item(),
        }

    def pixels(self) -> float:
        """What nearest neighbours find without a network."""
        return self._accuracy(self.kept.flatten(1), self.held.flatten(1))

    def _accuracy(self, kept: Tensor, held: Tensor) -> float:
        return knn_accuracy(kept, self.kept_labels, held, self.held_labels, k=self.k)

    def _features(self, learner: Learner, images: Tensor) -> tuple[Tensor, Tensor]:
        parts = [learner(self.normalise(part)) for part in images.split(_BATCH)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1].mean(dim=1) for p in parts])


def load_images(config: TeacherConfig) -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 [N, S, S, 3], and their labels, int64 [N]; digits in the order of their judge."""
    root, size = config.data.root, config.data.image_size
    if root == DIGITS:
        images, labels = load_real()
    else:
        index = open_root(root)
        images, labels = [np.asarray(decode(index.read(i))) for i in range(len(index))], index.labels
        for i, image in enumerate(images):
            if image.shape != (size, size, 3):
                raise ConfigError(_wrong_size(index.path(i), image.shape, size))
        images = np.stack(images)
    if images.shape[1] != size:
        raise ConfigError(_wrong_size(root, images.shape[1:], size))
    return images, labels


def _wrong_size(what: str, shape: tuple[int, ...], size: int) -> str:
    return (
        f"{what} has {shape[0]} x {shape[1]} pixels and data.image_size is {size}; change it, or make images of one "
        f"size with pixelgen data pack --size {size}"
    )


def split(labels: np.ndarray, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Indexes of the images to train on and of those to judge by, with equal shares of every class."""
    from sklearn.model_selection import train_test_split

    kept, held = train_test_split(np.arange(len(labels)), test_size=held_out, stratify=labels, random_state=_SPLIT_SEED)
    return kept, held
