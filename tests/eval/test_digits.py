"""The judgement of digits, on sets whose quality is known: real ones, mislabelled ones, noise."""

import json

import numpy as np
import pytest

from pixelgen_fast.data.digits import load_real
from pixelgen_fast.eval.digits import evaluate_digits


@pytest.fixture(scope="module")
def real():
    images, labels = (np.asarray(part) for part in load_real())
    return images, labels


@pytest.fixture(scope="module")
def real_report(real):
    return evaluate_digits(*real)


def test_real_digits_pass(real_report):
    """The classifier is known to reach 97 % on held-out digits; real digits are as near to half A as half B is."""
    report = real_report
    assert report.generated == 1797 and report.classifier_tested_on == 899 and report.frechet_count == 898
    assert report.share > 0.98 and report.classifier_accuracy > 0.97
    assert report.counts == dict(enumerate([178, 182, 177, 183, 181, 182, 181, 179, 174, 180]))
    assert min(report.per_class.values()) > 0.95
    assert 0 < report.frechet_generated < 2 * report.frechet_real


def test_the_share_is_the_mean_over_classes(real_report):
    report = real_report
    right = sum(report.per_class[c] * report.counts[c] for c in report.counts)
    assert report.share == pytest.approx(right / report.generated)


def test_wrong_labels_fail(real, real_report):
    """A set with every label wrong shows no requested class, though its Fréchet distance is as before; with one class
    mislabelled only that class falls."""
    images, labels = real
    report = evaluate_digits(images, (labels + 1) % 10)
    assert report.share < 0.02
    assert report.frechet_generated == real_report.frechet_generated
    threes = np.where(labels == 3, 5, labels)
    report = evaluate_digits(images, threes)
    assert 3 not in report.per_class and report.counts[5] == 365
    assert report.per_class[5] == pytest.approx(182 / 365, abs=0.03) and report.per_class[7] > 0.95


def test_bad_images_are_far(real, real_report):
    """Noise, and in every class copies of its most typical digit: without variety a set is far from the real ones, even
    when every single image convinces the classifier."""
    images, labels = real
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    report = evaluate_digits(noise, labels)
    assert report.share < 0.2 and report.frechet_generated > 20 * report.frechet_real
    means = np.stack([images[labels == c].mean(0) for c in range(10)])
    distance = ((images.astype(float) - means[labels]) ** 2).sum((1, 2, 3))
    typical = np.stack([images[labels == c][distance[labels == c].argmin()] for c in range(10)])
    report = evaluate_digits(typical[labels], labels)
    assert report.share == 1 and report.frechet_generated > 5 * real_report.frechet_generated


def test_both_distances_use_one_count(real):
    """With fewer generated digits the real halves are cut to their number, and the bias raises both distances."""
    images, labels = real
    small, large = evaluate_digits(images[:200], labels[:200]), evaluate_digits(images[:800], labels[:800])
    assert (small.frechet_count, large.frechet_count) == (200, 800)
    assert small.frechet_real > large.frechet_real and small.frechet_generated > large.frechet_generated


def test_the_report_reads_and_serialises(real_report):
    text = "\n".join(real_report.lines())
    for figure in (f"{real_report.share:.1%}", f"{real_report.frechet_real:.1f}", "1797", "898", "64 dimensions"):
        assert figure in text
    assert json.loads(json.dumps(real_report.as_dict()))["per_class"].keys() == {str(c) for c in range(10)}


def test_bad_input_is_named(real):
    images, labels = real
    with pytest.raises(ValueError, match=r"uint8 \[N, 16, 16, 3\], got float32"):
        evaluate_digits(images.astype(np.float32), labels)
    with pytest.raises(ValueError, match=r"got uint8 \[1797, 8, 16, 3\]"):
        evaluate_digits(images[:, ::2], labels)
    with pytest.raises(ValueError, match=r"images \[1797, 16, 16, 3\], labels \[5\]"):
        evaluate_digits(images, labels[:5])
    with pytest.raises(ValueError, match=r"digit classes are 0 to 9, got \[10\]"):
        evaluate_digits(images, np.where(labels == 4, 10, labels))
