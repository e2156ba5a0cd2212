"""The bytes of one optimizer step by formula: weights, adapters, moments, batches and logits.

Pure arithmetic, with the dimension key of qlora_jax.training.cost.flops.
"""

import math

import numpy as np

from pallas_kernels.nf4_matmul.costs import dequantized_bytes, weight_bytes
from qlora_jax.optim.state_8bit import BLOCK, MIN_SIZE
from qlora_jax.training.cost.flops import F32, RECOMPUTED, StepShape, head_tile, not_recomputed


def frozen_bytes(step: StepShape) -> dict[str, int]:
    """Returns the bytes of the frozen weights by kind.

    `codes` and `constants` are those of the projections; dense weights count as codes, in their dtype. `tables` are V D
    of embedding and head, once if tied, without tables that train fully. `vectors` are norms and biases in the compute
    dtype, and DoRA's frozen row norms in f32.
    """
    model, layers, size = step.model, step.model.num_layers, step.itemsize
    weights = [_weight_bytes(step, name, shape) for name, shape in step.shapes() if step.frozen]
    linear = layers * sum(math.prod(shape) for _, shape in step.shapes())
    tables = (1 if model.tie_embeddings else 2) * model.vocab_size * model.embed_dim
    frozen = tables - len(step.trained_tables) * model.vocab_size * model.embed_dim
    return {
        "codes": sum(codes for codes, _ in weights),
        "constants": sum(constants for _, constants in weights),
        "tables": frozen * size,
        "vectors": step.frozen * (model.parameters() - linear - tables + model.head_bias * step.new_tokens) * size
        + layers * F32 * _dora_rows(step),
    }


def _weight_bytes(step: StepShape, name: str, shape: tuple[int, int]) -> tuple[int, int]:
    weights, layers = step.weights, step.model.num_layers
    dense = len(weights.dense_layers(name, layers))
    dense_bytes = dense * math.prod(shape) * step.itemsize
    if dense == layers:
        return dense_bytes, 0
    quantized = weight_bytes(
        shape,
        weights.layout_for(shape),
        block_size=weights.block_size,
        nested_block_size=weights.nested_block_size,
        double_quant=weights.double_quant,
    )
    return dense_bytes + (layers - dense) * quantized.codes, (layers - dense) * quantized.constants


def lora_bytes(step: StepShape) -> int:
    """Returns the bytes of the trained parameters; their gradients are as large.

    They are L times the sum over adapters of R (in + out), and D per row of a new token, at 4 or 2 bytes each; vectors
    of DoRA and (IA)^3 are f32.
    """
    size = 2 if step.lora.dtype == "bfloat16" else F32
    per_layer = size * sum(_matrix_sizes(step)) + F32 * sum(_vector_sizes(step))
    tables = size * _new_rows(step) * step.model.embed_dim
    return step.model.num_layers * per_layer + tables + F32 * sum(_last_norm(step))


def _new_rows(step: StepShape) -> int:
    """Returns the trained rows of embedding and head: new tokens, and all rows of tables that train fully."""
    tables = 1 if step.model.tie_embeddings else 2
    return tables * step.new_tokens + len(step.trained_tables) * step.model.vocab_size


# Per optimizer: number of moments, True if stored in 8 bits, and int32 step counters (optax's schedule has one too).
OPTIMIZER_STATES = {
    "adamw_32bit": (2, False, 2),
    "adamw_8bit": (2, True, 1),
    "lion_32bit": (1, False, 2),
    "lion_8bit": (1, True, 1),
}


def optimizer_bytes(step: StepShape) -> int:
    """Returns the bytes of moments and counters.

    A leaf of n elements takes 4 n bytes per moment; in 8 bits n + 4 ceil(n / 256) if n >= 4,096. Leaves are A
    (n = R in), B (n = R out), vectors, and rows of new tokens (n = D).
    """
    moments, eight_bit, counters = OPTIMIZER_STATES[step.optimizer]
    per_layer = sum(_moment_bytes(n, eight_bit) for n in (*_matrix_sizes(step), *_vector_sizes(step)))
    rows = _new_rows(step) * _moment_bytes(step.model.embed_dim, eight_bit)
    last = sum(_moment_bytes(n, eight_bit) for n in _last_norm(step))
    return moments * (step.model.num_layers * per_layer + rows + last) + counters * F32


def _moment_bytes(n: int, eight_bit: bool) -> int:
    return n + F32 * -(-n // BLOCK) if eight_bit and n >= MIN_SIZE else F32 * n


def _matrix_sizes(step: StepShape) -> list[int]:
    """Returns the elements of each A and B of a layer, or of each weight in full finetuning."""
    if not step.frozen:
        return [n * k for _, (n, k) in step.shapes()]
    return [step.ranks[name] * side for name, shape in step.shapes() if name in step.ranks for side in shape]


def _vector_sizes(step: StepShape) -> list[int]:
    """Returns the elements of each trained vector of a layer."""
    if not step.frozen:
        biases = [n for (n, _), has_bias in step.model.linear_shapes().values() if has_bias]
        return biases + _norm_leaves(step) * list(step.model.norm_widths().values())
    scaled = [k if step.vectors[name] else n for name, (n, k) in step.shapes() if name in step.vectors]
    return scaled + [n for name, (n, _) in step.shapes() if name in step.dora]


def _norm_leaves(step: StepShape) -> int:
    """Returns the number of vectors of a norm: 2 for a LayerNorm (weight, bias), else 1."""
    return 2 if step.model.norm == "layer" else 1


def _last_norm(step: StepShape) -> list[int]:
    """Returns the elements of each vector of the final norm, if it trains."""
    return [] if step.frozen else _norm_leaves(step) * [step.model.embed_dim]


def _dora_rows(step: StepShape) -> int:
    return sum(n for name, (n, _) in step.shapes() if name in step.dora)


def batch_bytes(step: StepShape) -> int:
    """Returns 12 A B T: inputs and targets in int32, weights in f32."""
    return 3 * F32 * int(np.prod(step.batch))


def dequantized_traffic(step: StepShape) -> int:
    """Returns the bytes of dequantized weights that a step writes and reads, if each product dequantizes its weight.

    That is 2 * 2 N K per product of the forward pass, the backward pass and the recomputation. DoRA's norms add one
    product per weight, and DoRA with dropout one more.
    """
    product = {name: 2 * dequantized_bytes(shape) * step.frozen for name, shape in step.shapes()}
    norms = sum(product[name] for name in step.dora)
    layer = sum(product.values()) + (norms if step.lora.dropout else 0)
    again = layer - sum(product[name] for name in not_recomputed(step)) + norms
    times = step.batch[0] * step.model.num_layers
    return times * (2 * layer + norms + (again if "frozen again" in RECOMPUTED[step.remat] else 0))


def logits_bytes(step: StepShape) -> int:
    """Returns C W (4 + itemsize): one tile's logits in f32 and their exponentials in the compute dtype."""
    return math.prod(head_tile(step)) * (F32 + step.itemsize)


def argument_bytes(step: StepShape) -> int:
    """Returns the bytes of the arguments of `gradients`: frozen weights, LoRA, batch; without the dropout key."""
    return sum(frozen_bytes(step).values()) + lora_bytes(step) + batch_bytes(step)


def gradient_output_bytes(step: StepShape) -> int:
    """Returns the bytes of the results of `gradients`: LoRA gradients, two sums, and the losses of A B rows in f32."""
    accumulated, rows, _ = step.batch
    return lora_bytes(step) + F32 * (2 + accumulated * rows)
