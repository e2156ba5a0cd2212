"""Tests the scaling of columns and its custom VJP."""

from qlora_jax.nn.column_scale import scale_columns
from tests.nn.frozen_linears import M, N
from tests.nn.gradients import check_vjp, random_array


def test_scaled_columns():
    check_vjp(scale_columns, lambda x, s: x * s[None], random_array(M, N), random_array(N))
