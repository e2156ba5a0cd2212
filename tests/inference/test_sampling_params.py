"""Settings of sampling."""

import pytest

from qlora_jax.inference.sampling_params import Sampling


def test_settings_out_of_bounds_are_told_all_at_once():
    with pytest.raises(ValueError, match=r"temperature: found -1.*top_k: found -1.*top_p: found 0"):
        Sampling(temperature=-1.0, top_k=-1, top_p=0.0)


def test_biases_and_penalties_out_of_bounds_are_told_all_at_once():
    expected = (
        r"min_p: found 2.*repetition_penalty: found 0.*presence_penalty: found nan.*frequency_penalty: found inf.*"
        r"found id -1, .*found 2 values for id 5; .*found inf for id 6"
    )
    with pytest.raises(ValueError, match=expected):
        Sampling(
            min_p=2.0,
            repetition_penalty=0.0,
            presence_penalty=float("nan"),
            frequency_penalty=float("inf"),
            logit_bias=((-1, 0.0), (5, 1.0), (5, 2.0), (6, float("inf"))),
        )
