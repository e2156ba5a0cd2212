"""The fitted growth of memory, with its interval."""

import numpy as np

from scripts.campaign.soak import slope


def test_a_leak_is_found_and_noise_is_not():
    hours = np.linspace(0.5, 1.0, 1000)
    noise = np.convolve(np.random.default_rng(0).normal(0, 50, 1009), np.ones(10) / 10, "valid")
    leaking, steady = slope(list(hours), list(1000 + 300 * hours + noise)), slope(list(hours), list(1000 + noise))
    assert 250 < leaking.value < 350 and leaking.low > 0
    assert steady.low < 0 < steady.high
