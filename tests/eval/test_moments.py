"""Mean and covariance that come batch by batch against numpy's, also far from zero and for uneven batches."""

import numpy as np
import torch

from pixelgen_fast.eval.moments import Moments


def test_batches_of_any_size_give_those_of_the_whole():
    values = np.random.default_rng(0).standard_normal((101, 7)) @ np.diag(range(1, 8)) + 1e6
    found = Moments()
    for batch in torch.from_numpy(values).split([1, 40, 2, 57, 1]):
        found.add(batch)
    mean, covariance = found.result()
    assert found.count == 101
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(values.T), rtol=1e-6, atol=1e-6)


def test_float32_features_are_summed_in_float64():
    values = np.random.default_rng(1).standard_normal((64, 3)).astype(np.float32) + np.float32(4096)
    found = Moments()
    for batch in torch.from_numpy(values).split(16):
        found.add(batch)
    np.testing.assert_allclose(found.result()[1], np.cov(values.astype(np.float64).T), rtol=1e-9)
