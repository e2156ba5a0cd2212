"""What one optimizer step holds and moves, by formula: bytes of weights, adapters, moments, batches and logits.

Pure arithmetic, as in qlora_jax.training.cost.flops, whose dimension key holds here too.
"""

import math

import numpy as np

from pallas_kernels.nf4_matmul.costs import dequantized_bytes, weight_bytes
from qlora_jax.optim.state_8bit import BLOCK, MIN_SIZE
from qlora_jax.training.cost.flops import F32, RECOMPUTED, StepShape, head_tile, not_recomputed


def frozen_bytes(step: StepShape) -> dict[str, int]:
    """codes, constants: `held` of each projection's layers (dense weights count as codes, in their own dtype).

    tables: V D of embedding and head (once where tied), those that train whole left out. vectors: norms and biases, as
    (2 L + 1) D, those of new tokens too. In the dtype. DoRA has lengths of rows besides, in f32.
    """
    model, layers, size = step.model, step.model.num_layers, step.itemsize
    weights = [_held(step, name, shape) for name, shape in step.shapes() if step.frozen]
    linear = layers * sum(math.prod(shape) for _, shape in step.shapes())
    tables = (1 if model.tie_embeddings else 2) * model.vocab_size * model.embed_dim
    held = tables - len(step.whole) * model.vocab_size * model.embed_dim
    return {
        "codes": sum(codes for codes, _ in weights),
        "constants": sum(constants for _, constants in weights),
        "tables": held * size,
        "vectors": step.frozen * (model.parameters() - linear - tables + model.head_bias * step.new_tokens) * size
        + layers * F32 * _dora_rows(step),
    }


def _held(step: StepShape, name: str, shape: tuple[int, int]) -> tuple[int, int]:
    weights, layers = step.weights, step.model.num_layers
    dense = len(weights.dense_layers(name, layers))
    dense_bytes = dense * math.prod(shape) * step.itemsize
    if dense == layers:
        return dense_bytes, 0
    kept = weight_bytes(
        shape,
        weights.layout_for(shape),
        block_size=weights.block_size,
        nested_block_size=weights.nested_block_size,
        double_quant=weights.double_quant,
    )
    return dense_bytes + (layers - dense) * kept.codes, (layers - dense) * kept.constants


def lora_bytes(step: StepShape) -> int:
    """L sum over adapters of R (in + out), and D a row of new tokens, 4 bytes or 2 each, and 4 bytes for each element
    of a vector of DoRA or (IA)^3: the parameters; their gradients are as large."""
    size = 2 if step.lora.dtype == "bfloat16" else F32
    per_layer = size * sum(_matrix_sizes(step)) + F32 * sum(_vector_sizes(step))
    tables = size * _new_rows(step) * step.model.embed_dim
    return step.model.num_layers * per_layer + tables + F32 * sum(_last_norm(step))


def _new_rows(step: StepShape) -> int:
    """Rows that train of embedding and head: those of new tokens, and all where a table trains whole."""
    tables = 1 if step.model.tie_embeddings else 2
    return tables * step.new_tokens + len(step.whole) * step.model.vocab_size


# By optimizer: moments, whether they are held in 8 bits, and counts of steps in int32 (optax's schedule has its own).
OPTIMIZER_STATES = {
    "adamw_32bit": (2, False, 2),
    "adamw_8bit": (2, True, 1),
    "lion_32bit": (1, False, 2),
    "lion_8bit": (1, True, 1),
}


def optimizer_bytes(step: StepShape) -> int:
    """Moments L sum over A and B of 4 n, n = R in or R out; in 8 bits n + 4 ceil(n / 256) where n >= 4,096; counts.

    Vectors of n elements likewise, and rows of new tokens, n = D.
    """
    moments, eight_bit, counters = OPTIMIZER_STATES[step.optimizer]
    held = sum(_moment_bytes(n, eight_bit) for n in (*_matrix_sizes(step), *_vector_sizes(step)))
    rows = _new_rows(step) * _moment_bytes(step.model.embed_dim, eight_bit)
    last = sum(_moment_bytes(n, eight_bit) for n in _last_norm(step))
    return moments * (step.model.num_layers * held + rows + last) + counters * F32


def _moment_bytes(n: int, eight_bit: bool) -> int:
    return n + F32 * -(-n // BLOCK) if eight_bit and n >= MIN_SIZE else F32 * n


def _matrix_sizes(step: StepShape) -> list[int]:
    """Elements of each A and B of one layer, or of each weight where they train themselves."""
    if not step.frozen:
        return [n * k for _, (n, k) in step.shapes()]
    return [step.ranks[name] * side for name, shape in step.shapes() if name in step.ranks for side in shape]


def _vector_sizes(step: StepShape) -> list[int]:
    """Elements of each vector of one layer that trains."""
    if not step.frozen:
        biases = [n for (n, _), has_bias in step.model.linear_shapes().values() if has_bias]
        return biases + _norm_leaves(step) * list(step.model.norm_widths().values())
    scaled = [k if step.vectors[name] else n for name, (n, k) in step.shapes() if name in step.vectors]
    return scaled + [n for name, (n, _) in step.shapes() if name in step.dora]


def _norm_leaves(step: StepShape) -> int:
    """Vectors of a norm: its weight, and a LayerNorm's bias."""
    return 2 if step.model.norm == "layer" else 1


def _last_norm(step: StepShape) -> list[int]:
    """Elements of each vector of the norm behind the layers, where it trains."""
    return [] if step.frozen else _norm_leaves(step) * [step.model.embed_dim]


def _dora_rows(step: StepShape) -> int:
    return sum(n for name, (n, _) in step.shapes() if name in step.dora)


def batch_bytes(step: StepShape) -> int:
    """12 A B T: inputs and targets in int32, weights in f32."""
    return 3 * F32 * int(np.prod(step.batch))


def dequantized_traffic(step: StepShape) -> int:
    """Bytes of dequantized weights of one step, where an implementation writes and reads each for each product.

    2 * 2 N K a product, for the forward pass, the backward pass and what is computed again; DoRA's norms take one more
    of each weight, and its dropout one more of the others.
    """
    product = {name: 2 * dequantized_bytes(shape) * step.frozen for name, shape in step.shapes()}
    norms = sum(product[name] for name in step.dora)
    layer = sum(product.values()) + (norms if step.lora.dropout else 0)
    again = layer - sum(product[name] for name in not_recomputed(step)) + norms
    times = step.batch[0] * step.model.num_layers
    return times * (2 * layer + norms + (again if "frozen again" in RECOMPUTED[step.remat] else 0))


def logits_bytes(step: StepShape) -> int:
    """C W (4 + itemsize): one tile's logits in f32 and their exponentials in the compute dtype."""
    return math.prod(head_tile(step)) * (F32 + step.itemsize)


def argument_bytes(step: StepShape) -> int:
    """What `gradients` is given, dropout's key left out: frozen weights, LoRA, batch."""
    return sum(frozen_bytes(step).values()) + lora_bytes(step) + batch_bytes(step)


def gradient_output_bytes(step: StepShape) -> int:
    """What `gradients` returns: a gradient of each LoRA parameter, two sums and A B rows' losses in f32."""
    accumulated, rows, _ = step.batch
    return lora_bytes(step) + F32 * (2 + accumulated * rows)
