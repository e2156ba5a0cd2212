"""The bytes that devices of a mesh exchange in one optimizer step, by formula.

Sizes are those of whole arrays, as nccl-tests counts them. A device of a group of s receives (s - 1) / s of an array
that is gathered, or summed and scattered, and twice that of one that is summed for all
(pallas_kernels.aot.collectives).

Pure arithmetic, with the dimension key of qlora_jax.training.cost.flops; s devices along `fsdp`.
"""

from typing import NamedTuple

from pallas_kernels.aot.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, received
from qlora_jax.sharding import DATA, FSDP, axis_size
from qlora_jax.training.cost.flops import head_chunks
from qlora_jax.training.cost.step_shape import CODES, CONSTANTS, F32, Leaf, StepShape

# Times that a micro-batch with a backward pass gathers a layer: forward, and for recomputation and backward together.
GATHERS = 2


class Exchange(NamedTuple):
    """The arrays of one kind that devices exchange in a step: their operation, bytes, and the devices of a group."""

    operation: str
    nbytes: int
    group: int

    @property
    def received(self) -> int:
        """The bytes that each device receives, on a ring."""
        return received(self.operation, self.nbytes, self.group)


def exchanges(step: StepShape) -> dict[str, Exchange]:
    """Returns what devices exchange in a step, by kind; kinds without bytes, and few-byte sums, are left out."""
    shards, groups = axis_size(step.mesh, FSDP), axis_size(step.mesh, DATA)
    micro_batches, devices = step.batch[0], shards * groups
    adapters, trained = _gathered_adapters(step), step.trees.adapters(step.mesh, fixed=False)
    cut = [leaf for leaf in trained if leaf.is_cut]
    whole = [leaf for leaf in trained if not leaf.is_cut]
    found = {
        "weights": Exchange(ALL_GATHER, micro_batches * _weight_bytes(step), shards),
        "adapters": Exchange(ALL_GATHER, micro_batches * GATHERS * sum(map(_bytes, adapters)), shards),
        "adapters' gradients": Exchange(REDUCE_SCATTER, micro_batches * sum(map(_bytes, cut)), shards),
        "sums over groups": Exchange(ALL_REDUCE, sum(map(_part_in_f32, cut)), groups),
        "sums over devices": Exchange(ALL_REDUCE, sum(map(_part_in_f32, whole)), devices),
    }
    if step.table_parts > 1:
        found["embedding"] = Exchange(REDUCE_SCATTER, micro_batches * step.rows * shards * _row(step), shards)
        found["head's inputs"] = Exchange(ALL_GATHER, micro_batches * _head_tokens(step) * _row(step), shards)
        found["head's gradients"] = Exchange(REDUCE_SCATTER, micro_batches * _head_tokens(step) * _sums(step), shards)
    return {kind: one for kind, one in found.items() if one.nbytes and one.group > 1}


def gathered_weights(step: StepShape) -> list[Leaf]:
    """Returns the 4-bit stacks that are gathered a layer at a time: codes and constants."""
    return [leaf for kind, leaf in step.trees.frozen(step.mesh) if kind in (CODES, CONSTANTS) and leaf.is_cut]


def _weight_bytes(step: StepShape) -> int:
    """Returns the bytes of weights that are gathered per micro-batch: each layer forward, and for its backward pass."""
    first = step.first_backward
    return sum(
        (step.layers(leaf.name) + (GATHERS - 1) * step.layers(leaf.name, first)) * _of_layer(leaf)
        for leaf in gathered_weights(step)
    )


def layer_bytes(step: StepShape) -> int:
    """Returns the bytes of the gathered arrays of one layer, the largest: codes, constants and adapters."""
    adapters = sum(map(_of_layer, _gathered_adapters(step)))
    weights = [0] * step.model.num_layers
    for leaf in gathered_weights(step):
        for layer in step.model.layers_with(leaf.name):
            weights[layer] += _of_layer(leaf)
    return max(weights) + adapters


def _gathered_adapters(step: StepShape) -> list[Leaf]:
    return [leaf for leaf in step.trees.adapters(step.mesh) if leaf.is_cut]


def _of_layer(stack: Leaf) -> int:
    return stack.nbytes // stack.shape[0]


def _bytes(leaf: Leaf) -> int:
    return leaf.nbytes


def _part_in_f32(leaf: Leaf) -> int:
    return leaf.part_bytes // leaf.itemsize * F32


def _row(step: StepShape) -> int:
    """Returns the bytes of one hidden state."""
    return step.model.embed_dim * step.itemsize


def _head_tokens(step: StepShape) -> int:
    """Returns the supervised tokens of a group of devices, in whole chunks."""
    chunks, tokens = head_chunks(step)
    return chunks * tokens * step.table_parts


def _sums(step: StepShape) -> int:
    """Returns the bytes per token of the head's weighted sum in f32, and of the target's row."""
    return step.model.embed_dim * (F32 + step.itemsize)
