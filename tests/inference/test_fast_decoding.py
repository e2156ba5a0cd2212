"""Fast decoding: the layers round their inputs, the head is in 8 or 4 bits, and what cannot be faster is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.dequantize import dequantize
from pallas_kernels.formats.ggml_tensor import dequantize_ggml
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.native import library
from qlora_jax.inference.decode import generate
from qlora_jax.inference.fast_decoding import for_fast_decoding
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.models.partition import ModelParts, combine, partition, place_parts
from qlora_jax.nn.variables import Frozen
from qlora_jax.sharding import make_mesh
from tests.inference.tiny import tiny_parts
from tests.models.cached import empty_cache, extend
from tests.training.mesh_models import CUT_VOCABULARY, WHOLE_VOCABULARY, mesh_config, mesh_parts

NEW = (7, 600)  # a row that new tokens replace, and one past the table
pytestmark = pytest.mark.skipif(bool(library.problem()), reason=f"the C++ loops: {library.problem()}")


@pytest.fixture(scope="module")
def parts() -> ModelParts:
    return mesh_parts(mesh_config(CUT_VOCABULARY))


@jax.jit
def _step(parts: ModelParts) -> tuple[jax.Array, jax.Array]:
    """Returns (hidden state, logits) of one token after three."""
    model = combine(parts)
    _, cache = extend(model, jnp.array([[3, 5, 7]]), 0, empty_cache(model.config, 1, 256), 256)
    hidden_1D, _ = extend(model, jnp.array([[11]]), 3, cache, 256)
    return hidden_1D, model.head.logits(hidden_1D)


def _distance(found: jax.Array, expected: jax.Array) -> float:
    found_, expected_ = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found_ - expected_) / np.linalg.norm(expected_))


def test_layers_round_their_inputs(parts):
    """The products themselves are tested in test_cpu.py. In each, rounding is about 0.7 % of a usual result."""
    found, expected = _step(for_fast_decoding(parts, integer=True, head_bits=16)), _step(parts)
    assert 1e-3 < _distance(found[0], expected[0]) < 0.1


@pytest.mark.parametrize("bits", [8, 4])
def test_a_head_in_codes_gives_the_logits_of_its_dequantized_weights(parts, bits):
    model = combine(for_fast_decoding(parts, integer=False, head_bits=bits))
    codes = model.head.weight_VD
    dense_VD = dequantize(codes, jnp.float32) if isinstance(codes, QTensor) else dequantize_ggml(codes, jnp.float32)
    original_VD = combine(parts).head.weight_VD
    assert _distance(dense_VD, original_VD) < {8: 0.006, 4: 0.1}[bits]
    hidden_MD = jnp.asarray(np.random.default_rng(0).standard_normal((11, dense_VD.shape[1])), jnp.float32)
    expected = np.asarray(hidden_MD, np.float64) @ np.asarray(dense_VD, np.float64).T
    np.testing.assert_allclose(model.head.logits(hidden_MD), expected, rtol=1e-4, atol=1e-5)
    assert "head_codes" not in parts.base and _distance(_step(partition(model))[0], _step(parts)[0]) == 0


@pytest.mark.parametrize("whole", [False, True], ids=["rows", "table"])
def test_trained_rows_of_the_head_keep_their_precision(parts, whole):
    model = combine(parts)
    if whole:
        model.lm_head.make_trainable((), jnp.float32)
    else:
        model.lm_head.set_rows(NEW, jnp.float32)
    hidden_1D = jnp.ones((1, model.config.embed_dim), jnp.float32)
    expected = model.head.logits(hidden_1D)
    found = combine(for_fast_decoding(partition(model), integer=False, head_bits=8)).head.logits(hidden_1D)
    assert 0 < _distance(found, expected) < 0.02
    if not whole:
        np.testing.assert_array_equal(found[:, np.array(NEW)], expected[:, np.array(NEW)])


def test_replies_go_on(parts):
    settings = dict(sampling=Sampling(), max_new_tokens=5, stop_ids=())
    fast = for_fast_decoding(parts, integer=True, head_bits=8)
    (alone,) = generate(fast, [[1, 2, 3]], **settings)
    assert len(alone.ids) == 5
    for others in ([[4]], [[i, 9] for i in range(10)]):  # 2 and 16 rows together
        assert alone.ids == generate(fast, [[1, 2, 3], *others], **settings)[0].ids


def test_a_head_that_is_in_8_bits_stays_as_it_is(parts):
    """Encoding the weights of such a GGUF file again gives the same codes, so no logit moves."""
    assert combine(for_fast_decoding(parts, integer=False, head_bits=None)).head_codes is None
    model = combine(parts)
    codes = combine(for_fast_decoding(parts, integer=False, head_bits=8)).head.weight_VD
    model.lm_head.weight = Frozen(dequantize_ggml(codes, jnp.float32))
    found = combine(for_fast_decoding(partition(model), integer=False, head_bits=None)).head.weight_VD
    np.testing.assert_array_equal(found.codes, codes.codes)
    model.lm_head.weight = Frozen(model.lm_head.weight[...].at[-1, -1].multiply(1.001))
    assert combine(for_fast_decoding(partition(model), integer=False, head_bits=None)).head_codes is None


def test_what_cannot_be_faster_is_refused(parts):
    dense = tiny_parts()
    assert for_fast_decoding(dense, integer=False, head_bits=16) is dense
    with pytest.raises(ValueError, match=r"fast: no layer has products of integers \(.*: its weights have no 4-bit"):
        for_fast_decoding(dense, integer=True, head_bits=16)
    with pytest.raises(
        ValueError, match=r"head_bits: the head is not whole blocks .found a width of 32, expected a mult"
    ):
        for_fast_decoding(dense, integer=False, head_bits=4)
    odd = mesh_parts(mesh_config(WHOLE_VOCABULARY))
    with pytest.raises(ValueError, match="head_bits: the loops cannot read the head in 4 bits"):
        for_fast_decoding(odd, integer=False, head_bits=4)
    with pytest.raises(ValueError, match="several devices share the model"):
        for_fast_decoding(place_parts(parts, make_mesh(2, 4)), integer=False, head_bits=8)
