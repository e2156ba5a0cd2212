"""The bytes of one optimizer step: weights, adapters and moments by their shapes, batches and logits by formula.

On a mesh they are those of one device: its parts of the arrays that are cut, and its rows. The dimension key is that of
qlora_jax.training.cost.flops.
"""

import itertools
import math

from pallas_kernels.nf4_matmul.costs import dequantized_bytes
from qlora_jax.config.schema import RouterArgs
from qlora_jax.models.config import ROUTER
from qlora_jax.objectives.router_losses import routed
from qlora_jax.sharding import ROWS, axis_size
from qlora_jax.training.batch_shapes import batch_shapes
from qlora_jax.training.cost.flops import RECOMPUTED, head_tile
from qlora_jax.training.cost.step_shape import F32, StepShape, is_routed
from qlora_jax.training.cost.trees import CODES, CONSTANTS, KINDS


def frozen_bytes(step: StepShape) -> dict[str, int]:
    """Returns the bytes of the frozen weights by kind.

    `codes` and `constants` are those of the projections; dense weights count as codes, in their dtype. `tables` are
    embedding and head, once if tied, without tables that train fully. `vectors` are norms and biases. `adapters` are
    arrays that the method adds without training them. `routers` are those of experts, with the gates of shared experts.
    """
    found = dict.fromkeys(KINDS, 0)
    for kind, leaf in step.trees.frozen(step.mesh):
        found[kind] += leaf.part_bytes
    return found


def offloaded_expert_bytes(step: StepShape) -> dict[str, int]:
    """Returns the part of `frozen_bytes` that is in host memory: codes and constants of offloaded experts.

    It is 0 on a CPU, whose host memory is the device's.
    """
    found = {CODES: 0, CONSTANTS: 0}
    if step.weights.experts_on_host and step.weights.platform != "cpu":
        for kind, leaf in step.trees.frozen(step.mesh):
            if kind in found and is_routed(leaf.name):
                found[kind] += leaf.part_bytes
    return found


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
    experts, adapted = step.model.experts, step.adapter.layers.values()
    layers = () if experts is None else [layer for layer in experts.layers if layer >= first]
    kinds = [(layer - at, *(layer in each for each in adapted)) for at, layer in enumerate(layers)]
    return len(list(itertools.groupby(kinds)))


def lora_bytes(step: StepShape) -> int:
    """Returns the bytes of the trained parameters, and of those that checkpoints have but that do not train."""
    return sum(leaf.part_bytes for leaf in step.trees.adapters(step.mesh))


def gradient_bytes(step: StepShape) -> int:
    """Returns the bytes of the gradients, which are as large as the trained parameters."""
    return sum(leaf.part_bytes for leaf in step.trees.adapters(step.mesh, fixed=False))


def optimizer_bytes(step: StepShape) -> int:
    """Returns the bytes of moments and counters."""
    return step.trees.state_bytes(step.mesh)


def batch_bytes(step: StepShape) -> int:
    """Returns 12 A B T: inputs and targets in int32, weights in f32; and what `batch_shapes` adds to them."""
    objective = routed(step.objective, step.model, RouterArgs())
    shapes = batch_shapes(step.batch, objective, packed=step.packed, branching=step.branching)
    return sum(F32 * math.prod(shape) for shape, _ in shapes.values())


def dequantized_traffic(step: StepShape) -> int:
    """Returns the bytes of dequantized weights that a step writes and reads, if each product dequantizes its weight.

    That is 2 * 2 N K per product of the forward pass, the backward pass and the recomputation, and for each time that
    an adapter reads the weight once more.
    """
    first, again = step.first_backward, "frozen again" in RECOMPUTED[step.remat]
    total = 0
    for name, shape in step.shapes():
        layer, more = step.adapter.products.get(name, 1), name in step.adapter.rereads
        recomputed = again * (layer * (name not in step.not_recomputed) + more)
        products = step.layers(name) * (layer + more) + step.layers(name, first) * (layer + recomputed)
        total += products * 2 * dequantized_bytes(shape)
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
