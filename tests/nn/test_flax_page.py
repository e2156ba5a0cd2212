"""The Python of docs/flax.md, run from top to bottom in one namespace."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen, nnx

from qlora_jax.quant import dequantize

PAGE = Path(__file__).resolve().parent.parent.parent / "docs/flax.md"


@pytest.fixture(scope="module")
def scope() -> dict:
    scope: dict = {}
    # The page is for users, whose JAX promotes dtypes: optax's Adam does.
    with jax.numpy_dtype_promotion("standard"):
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
            exec(block, scope)
    return scope


def test_the_model_learns_and_its_head_stays_dense(scope):
    assert scope["losses"][-1] < scope["losses"][0]
    assert type(scope["model"].head) is nnx.Linear


def test_shapes_are_as_the_page_says(scope):
    assert scope["result"].shape == (16, 128) and scope["kernel"].shape == (64, 128)
    assert [leaf.shape for leaf in scope["adapter"]] == [(64, 8), (8, 128)]


def test_the_linen_module_computes_what_its_pretrained_layer_does(scope):
    frozen, bias = scope["frozen"], scope["pretrained"]["bias"]
    kernel = dequantize(frozen["up"]["nf4"]["weight"]).T
    wanted = linen.Dense(128).apply({"params": {"kernel": kernel, "bias": bias}}, scope["x"])
    np.testing.assert_allclose(kernel, scope["pretrained"]["kernel"], atol=0.1)
    variables = {"LoRAParam": scope["lora"], "Frozen": frozen}
    found = scope["linen_model"].apply(variables, scope["x"])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_linen_gradients_are_of_the_adapter_alone(scope):
    leaves = {
        jax.tree_util.keystr(path)[-10:]: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(scope["grads"])
    }
    assert set(leaves) == {"['lora_a']", "['lora_b']"}
    assert float(np.abs(leaves["['lora_b']"]).max()) > 0
