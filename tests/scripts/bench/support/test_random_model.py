"""The random model: shapes and distribution of its tensors."""

import math

import numpy as np

from scripts.bench.support.random_model import SHAPES, random_tensor, tensor_shapes


def test_the_random_model_has_the_parameters_of_qwen2():
    shapes = tensor_shapes(SHAPES["qwen2-0.5b"], attention_bias=True)
    o_biases = 24 * 896  # which Qwen2 does not have
    assert sum(map(math.prod, shapes.values())) == 494_032_768 + o_biases
    weight = random_tensor("a.weight", (64, 64), np.random.default_rng(0)).astype(np.float32)
    assert 0.018 < weight.std() < 0.022
    assert (random_tensor("x_layernorm.weight", (8,), np.random.default_rng(0)) == 1).all()
