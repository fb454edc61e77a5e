"""How good generated digits are, by a classifier and by a Fréchet distance; neither has seen a generated image.

The real digits (scikit-learn's 1,797, ten classes) are split into two halves with equal class shares:
    half A trains a support vector classifier (RBF kernel, gamma 0.001) on 8x8 intensities from 0 to 16, 64 features;
    half B measures the classifier, so that its own mistakes stand beside the share of generated digits it agrees with.
Fréchet distances are taken in the same 64 features: generated to A, beside B to A, which is what draws from the real
distribution reach; well below that, a generator repeats images it was trained on. Both distances use one count of
images a side, because the estimate falls as the count grows.

Shapes: N generated images uint8 [N, 16, 16, 3]; labels [N] are the classes they were asked to show, 0 to 9.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pixelgen_fast.data.digits import load_real, to_8x8
from pixelgen_fast.errors import InputError
from pixelgen_fast.eval.frechet import frechet_distance

FEATURE_SPACE = "8x8 intensities from 0 to 16, 64 dimensions"
_CLASSES = 10


@dataclass(frozen=True)
class DigitsReport:
    """What the digits showed. Shares are in [0, 1]; per_class holds the classes that were asked for."""

    generated: int
    share: float
    per_class: dict[int, float]
    counts: dict[int, int]
    classifier_accuracy: float
    classifier_tested_on: int
    frechet_generated: float
    frechet_real: float
    frechet_count: int
    feature_space: str = FEATURE_SPACE

    def as_dict(self) -> dict[str, Any]:
        """The report as plain types, for JSON."""
        return asdict(self)

    def figures(self) -> dict[str, float | None]:
        """The numbers by their names, the one that counts first."""
        return {"Fréchet distance": self.frechet_generated, "right class": self.share}

    def lines(self) -> list[str]:
        """The report in words, one line each."""
        classes = "  ".join(f"{c}: {share:.0%}" for c, share in self.per_class.items())
        judge = f"{self.classifier_accuracy:.1%} of {self.classifier_tested_on} real digits it never saw"
        to_real, within_real = f"{self.frechet_generated:.1f}", f"{self.frechet_real:.1f}"
        return [
            f"{self.share:.1%} of {self.generated} generated digits show the requested class",
            f"    by class: {classes}",
            f"    the classifier is right on {judge}",
            f"Fréchet distance {to_real} generated to real, {within_real} one half of the real digits to the other",
            f"    {self.frechet_count} images a side, {self.feature_space}; compare at equal counts only",
        ]


def _check(images: np.ndarray, labels: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (16, 16, 3):
        raise InputError(f"generated digits must be uint8 [N, 16, 16, 3], got {images.dtype} {list(images.shape)}")
    if labels.shape != images.shape[:1] or len(labels) < 2:
        shapes = f"images {list(images.shape)}, labels {list(labels.shape)}"
        raise InputError(f"need at least 2 images and one label an image, got {shapes}")
    outside = sorted(set(labels.tolist()) - set(range(_CLASSES)))
    if outside:
        raise InputError(f"digit classes are 0 to 9, got {outside}")


def evaluate_digits(images: Tensor | np.ndarray, labels: Tensor | np.ndarray, *, seed: int = 0) -> DigitsReport:
    """Compare generated digits with the real ones.

    images: uint8 [N, 16, 16, 3], N >= 2. labels: int [N] in 0..9, the requested classes. seed: of the split into halves
    and of the choice of images where one set is larger.
    Raises ValueError for another shape, dtype or label, ImportError if scikit-learn is missing.
    """
    images, labels = _as_array(images), _as_array(labels)
    _check(images, labels)
    try:
        from sklearn.model_selection import train_test_split
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError("digits are judged with scikit-learn: pip install scikit-learn") from error

    real, real_labels = (_as_array(part) for part in load_real())
    features = _as_array(to_8x8(real)).astype(np.float64)
    a, b, a_labels, b_labels = train_test_split(
        features, real_labels, test_size=0.5, stratify=real_labels, random_state=seed
    )
    classifier = SVC(gamma=0.001).fit(a, a_labels)
    generated = _as_array(to_8x8(images)).astype(np.float64)
    right = classifier.predict(generated) == labels
    accuracy = float(classifier.score(b, b_labels))

    asked = sorted(set(labels.tolist()))
    count = min(len(generated), len(a), len(b))
    rng = np.random.default_rng(seed)
    a, b, generated = (rng.permutation(part)[:count] for part in (a, b, generated))
    return DigitsReport(
        generated=len(images),
        share=float(right.mean()),
        per_class={c: float(right[labels == c].mean()) for c in asked},
        counts={c: int((labels == c).sum()) for c in asked},
        classifier_accuracy=accuracy,
        classifier_tested_on=len(b_labels),
        frechet_generated=frechet_distance(generated, a),
        frechet_real=frechet_distance(b, a),
        frechet_count=count,
    )


def _as_array(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
