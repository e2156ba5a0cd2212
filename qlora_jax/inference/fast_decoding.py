"""Faster, less exact decoding on CPUs: inputs of layers quantized to 8 bits (W4A8), and a head in 8 or 4 bits.

A token reads every weight once. The head of a small model has half of the bytes, and without AVX-512 products with
4-bit codes take longer in f32 than reading them does. docs/cpu.md shows by how much logits change.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.devices import target_device
from pallas_kernels.dispatch import Call
from pallas_kernels.formats.block_encoders import encode_blocks
from pallas_kernels.formats.ggml_tensor import GgmlTensor, dequantize_ggml
from pallas_kernels.formats.layouts import layout_problem, repack
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.native.library import problem as native_problem
from pallas_kernels.nf4_matmul.api import INTEGER, choose_implementation
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.nn.linear import QLinear
from qlora_jax.nn.lm_head.head import HeadWithRows
from qlora_jax.nn.lm_head.sharded_vocabulary import ShardedHead
from qlora_jax.nn.variables import Frozen
from qlora_jax.quant import QuantSettings, quantize_traceable
from qlora_jax.sharding import mesh_of

LAYOUT = "row_planar"  # the layout of 4-bit codes that the loops read


def for_fast_decoding(parts: ModelParts, *, integer: bool, head_bits: int | None) -> ModelParts:
    """Returns the model with less exact products for decoding; it shares its other arrays with `parts`.

    Args:
      integer: quantizes the inputs of layers in 4-bit codes to 8 bits, in calls of up to 16 tokens.
      head_bits: of the weights of the language-model head: 16 leaves it, 8 is ggml's Q8_0, 4 is NF4. None: 8 if that
        changes no weight, as in many GGUF files, and the loops are there; else 16.

    Raises:
      ValueError: the model has no layer for products of integers, or this device has none; the head's width is not a
        whole number of blocks; several devices share the model; or the loops are missing.
    """
    if not integer and head_bits == 16:
        return parts
    problem = _problem(parts)
    if head_bits is None and not integer and problem:
        return parts
    if problem:
        raise ValueError(f"fast, head_bits: {problem}. Leave these settings out")
    model = combine(parts)
    if integer:
        _use_integers(model)
    if head_bits is None:
        model.head_codes = _equal_codes(model)
    elif head_bits != 16:
        model.head_codes = Frozen(_encoded_head(model, head_bits))
    return partition(model)


def _problem(parts: ModelParts) -> str | None:
    """Returns why decoding cannot be faster here, whatever the model's weights, or None if it can."""
    if mesh_of(parts) is not None:
        return "several devices share the model"
    if (device := target_device()).platform != "cpu":
        return f"they are for CPUs (found {device})"
    return (missing := native_problem()) and f"the C++ loops: {missing}"


def _use_integers(model: CausalLM) -> None:
    linears = [node for _, node in nnx.iter_graph(model) if isinstance(node, QLinear)]
    refusals = {linear.name: _refusal(linear) for linear in linears}
    for linear in linears:
        linear.fast = refusals[linear.name] is None
    if not any(linear.fast for linear in linears):
        name, reason = next(iter(refusals.items()))
        raise ValueError(f"fast: no layer has products of integers ({name}: {reason}). Leave it out")


def _refusal(linear: QLinear) -> str | None:
    """Returns why a layer has no products of integers, or None if it has."""
    weight = linear.weight.get_value()
    parts = getattr(weight, "parts", (weight,))
    coded = [part for part in parts if isinstance(part, QTensor)]
    if not coded:
        return "its weights have no 4-bit codes that index a table"
    choice = choose_implementation(target_device(), Call.of("forward", 1, coded[0].dtype, coded[0]), INTEGER)
    return choice.refusals.get(INTEGER)


def _head_weight(model: CausalLM) -> jax.Array:
    head = model.head
    assert not isinstance(head, ShardedHead), "`quicken` refuses meshes"
    return (head.frozen if isinstance(head, HeadWithRows) else head).weight_VD


def _equal_codes(model: CausalLM) -> Frozen | None:
    """Returns the head in Q8_0 if its weights are equal to the bit, else None."""
    weight_VD = _head_weight(model)
    for rows in (weight_VD[:64], weight_VD):  # few tell that most heads are not
        if rows.dtype != jnp.float32 or rows.shape[1] % 32:
            return None
        codes = _encode(rows, 8)
        if not _same(codes, rows):
            return None
    return Frozen(codes)


@jax.jit
def _same(codes: GgmlTensor, weight_VD: jax.Array) -> jax.Array:
    return jnp.all(dequantize_ggml(codes) == weight_VD)


def _encoded_head(model: CausalLM, bits: int) -> QTensor | GgmlTensor:
    weight_VD = _head_weight(model)
    block = 32 if bits == 8 else QuantSettings().block_size
    if weight_VD.shape[1] % block:
        found = f"found a width of {weight_VD.shape[1]}, expected a multiple of {block}"
        raise ValueError(f"head_bits: the head is not whole blocks ({found}). Set head_bits to 16")
    if bits == 4 and (problem := layout_problem(LAYOUT, weight_VD.shape, block)):
        raise ValueError(f"head_bits: the loops cannot read the head in 4 bits, {problem}. Set head_bits to 8")
    return _encode(weight_VD, bits)


@functools.partial(jax.jit, static_argnums=1)
def _encode(weight_VD: jax.Array, bits: int) -> QTensor | GgmlTensor:
    if bits == 4:
        return repack(quantize_traceable(weight_VD, QuantSettings()), LAYOUT)
    codes = encode_blocks(weight_VD.astype(jnp.float32), "Q8_0")
    return GgmlTensor(codes=codes, ggml_type="Q8_0", shape=weight_VD.shape, dtype=str(weight_VD.dtype))
