"""The bytes of one optimizer step by formula: weights, adapters, moments, batches and logits.

On a mesh they are those of one device: its parts of the arrays that are cut, and its rows. Pure arithmetic, with the
dimension key of qlora_jax.training.cost.flops.
"""

import itertools
import math
from collections.abc import Iterable

from pallas_kernels.nf4_matmul.costs import dequantized_bytes
from qlora_jax.config.router_settings import RouterArgs
from qlora_jax.models.config import ROUTER
from qlora_jax.optim.state_8bit import BLOCK, MIN_SIZE
from qlora_jax.sharding import ROWS, axis_size
from qlora_jax.training.batch_shapes import batch_shapes
from qlora_jax.training.cost.arrays import (
    Leaf,
    dense_leaf,
    head_bias_leaf,
    quantized_leaves,
    router_leaves,
    table_leaves,
    trained_in_place,
    trained_leaves,
    vera_leaves,
)
from qlora_jax.training.cost.flops import RECOMPUTED, head_tile, not_recomputed
from qlora_jax.training.cost.step_shape import F32, StepShape, is_routed
from qlora_jax.training.objectives.router_losses import routed


def frozen_bytes(step: StepShape) -> dict[str, int]:
    """Returns the bytes of the frozen weights by kind.

    `codes` and `constants` are those of the projections; dense weights count as codes, in their dtype. `tables` are V D
    of embedding and head, once if tied, without tables that train fully. `vectors` are norms and biases in the compute
    dtype, and DoRA's frozen row norms in f32. `projections` are VeRA's A and B. `routers` are those of experts, with
    the gates of shared experts.
    """
    return {
        **_matrix_bytes(step, [(name, shape) for name, shape in step.matrices() if step.frozen]),
        "tables": _own_bytes(step, table_leaves(step)),
        "vectors": _vector_bytes(step) + _own_bytes(step, [head_bias_leaf(step)]),
        "projections": _own_bytes(step, vera_leaves(step)),
        "routers": _own_bytes(step, router_leaves(step)),
    }


def offloaded_expert_bytes(step: StepShape) -> dict[str, int]:
    """Returns the part of `frozen_bytes` that is in host memory: codes and constants of offloaded experts.

    It is 0 on a CPU, whose host memory is the device's.
    """
    away = step.weights.experts_on_host and step.weights.platform != "cpu"
    return _matrix_bytes(step, [(name, shape) for name, shape in step.matrices() if away and is_routed(name)])


def fetched_expert_bytes(step: StepShape) -> int:
    """Returns the bytes of offloaded experts that an optimizer step fetches.

    Each micro-batch fetches every sparse layer in its forward pass, and once more those that its backward pass visits.
    Each scan fetches one layer more, while its last layer runs.
    """
    stored, sparse = sum(offloaded_expert_bytes(step).values()), step.layers(ROUTER)
    if not stored:
        return 0
    firsts = 0, step.first_backward
    fetched = sum(step.layers(ROUTER, first) + _sparse_scans(step, first) for first in firsts)
    return step.batch[0] * stored * fetched // sparse


def _sparse_scans(step: StepShape, first: int) -> int:
    """Returns the number of runs of neighbouring sparse layers that have the same adapters."""
    experts, adapted = step.model.experts, (*step.adapted_layers.values(), *step.parameter_layers.values())
    layers = () if experts is None else [layer for layer in experts.layers if layer >= first]
    kinds = [(layer - at, *(layer in each for each in adapted)) for at, layer in enumerate(layers)]
    return len(list(itertools.groupby(kinds)))


def _matrix_bytes(step: StepShape, weights: list[tuple[str, tuple[int, int]]]) -> dict[str, int]:
    stacks = [quantized_leaves(step, name, shape) for name, shape in weights]
    dense = [dense_leaf(step, name, shape) for name, shape in weights]
    return {
        "codes": _own_bytes(step, [*dense, *(codes for codes, _ in stacks)]),
        "constants": _own_bytes(step, (leaf for _, constants in stacks for leaf in constants)),
    }


def _own_bytes(step: StepShape, leaves: Iterable[Leaf]) -> int:
    """Returns the bytes of one device's parts of some arrays."""
    return sum(leaf.part_bytes(step.mesh) for leaf in leaves)


def _vector_bytes(step: StepShape) -> int:
    """Returns the bytes of frozen norms and of the projections' frozen biases, and of DoRA's frozen row norms."""
    model = step.model
    linear = sum(math.prod((*step.stack(name), *shape)) for name, shape in step.matrices())
    if model.experts is not None:
        linear += len(model.experts.layers) * model.experts.other_parameters(model.embed_dim)
    tables = (1 if model.tie_embeddings else 2) * model.vocab_size * model.embed_dim
    vectors = model.parameters() - linear - tables - model.head_bias * model.vocab_size
    trained = sum(size * (model.num_layers if ".layers." in name else 1) for name, size in trained_in_place(step))
    rows = sum(step.layers(name) * n for name, (n, _) in step.shapes() if name in step.dora)
    return (vectors - trained) * step.itemsize + F32 * rows


def lora_bytes(step: StepShape) -> int:
    """Returns the bytes of the trained parameters, and of the A of LoRA-FA.

    They are L times the sum over adapters of R (in + out), or in (S - 1) / 2 for OFT, and D per row of a new token, at
    4 or 2 bytes each; vectors of DoRA, (IA)^3 and VeRA, norms and biases are f32. Bottleneck adapters have
    R (2 D + 1) + D elements.
    """
    return _own_bytes(step, trained_leaves(step))


def gradient_bytes(step: StepShape) -> int:
    """Returns the bytes of the gradients, which are as large as the trained parameters."""
    return _own_bytes(step, trained_leaves(step, fixed=False))


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
    return (
        moments * sum(_moment_bytes(leaf, step, eight_bit) for leaf in trained_leaves(step, fixed=False))
        + counters * F32
    )


def _moment_bytes(leaf: Leaf, step: StepShape, eight_bit: bool) -> int:
    """Returns the bytes of a moment; whether it has 8 bits follows from the whole tensor, not from a device's part."""
    count, *shape = leaf.shape
    n = math.prod(shape)
    own = n // leaf.parts(step.mesh)
    return count * (own + F32 * -(-own // BLOCK) if eight_bit and n >= MIN_SIZE else F32 * own)


def batch_bytes(step: StepShape) -> int:
    """Returns 12 A B T: inputs and targets in int32, weights in f32; and what `batch_shapes` adds to them."""
    objective = routed(step.objective, step.model, RouterArgs())
    shapes = batch_shapes(step.batch, objective, packed=step.packed, branching=step.branching)
    return sum(F32 * math.prod(shape) for shape, _ in shapes.values())


def dequantized_traffic(step: StepShape) -> int:
    """Returns the bytes of dequantized weights that a step writes and reads, if each product dequantizes its weight.

    That is 2 * 2 N K per product of the forward pass, the backward pass and the recomputation. DoRA's norms add one
    product per weight, and DoRA with dropout one more.
    """
    first, skipped = step.first_backward, not_recomputed(step)
    again = "frozen again" in RECOMPUTED[step.remat]
    total = 0
    for name, shape in step.shapes():
        norms = name in step.dora
        layer = 1 + (norms and bool(step.lora.dropout))
        recomputed = again * (layer - layer * (name in skipped) + norms)
        products = step.layers(name) * (layer + norms) + step.layers(name, first) * (layer + recomputed)
        total += products * 2 * dequantized_bytes(shape) * step.frozen
    return step.batch[0] * total


def logits_bytes(step: StepShape) -> int:
    """Returns C W (4 + itemsize): one tile's logits in f32 and their exponentials in the compute dtype.

    With a sequence head it is 0.
    """
    return 0 if step.head is not None else math.prod(head_tile(step)) * (F32 + step.itemsize)


def argument_bytes(step: StepShape) -> int:
    """Returns the bytes of the arguments of `gradients`: frozen weights, LoRA, batch; without the dropout key."""
    return sum(frozen_bytes(step).values()) + lora_bytes(step) + batch_bytes(step)


def gradient_output_bytes(step: StepShape) -> int:
    """Returns the bytes of the results of `gradients`: LoRA gradients, two sums, and the losses of all rows in f32.

    Rows of a mixture add their losses before those of the routers, and the sums of `Routing`.
    """
    of_row = 1
    if step.experts is not None:
        of_row += 2 + len(step.experts.layers) * (2 * step.experts.count + 1)
    accumulated, rows, _ = step.batch
    return gradient_bytes(step) + F32 * (2 + accumulated * rows * axis_size(step.mesh, *ROWS) * of_row)
