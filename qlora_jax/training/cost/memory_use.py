"""The bytes of one optimizer step: of arrays by their shapes; of batches, logits and saved activations by formula.

On a mesh they are those of one device: its parts of the arrays that are cut, and its rows.

Dimension key: B rows, T positions, M = B T, L layers, D embed, N q-heads, K kv-heads, H head_dim, F mlp.
"""

import itertools
import math
from collections.abc import Callable, Sequence

from pallas_kernels.nf4_matmul.costs import dequantized_bytes
from qlora_jax.config.schema import RouterArgs
from qlora_jax.methods.method import method_of
from qlora_jax.models.config import NORM_PLACEMENTS, ROUTER, ModelConfig
from qlora_jax.objectives.router_losses import routed
from qlora_jax.sharding import ROWS, axis_size
from qlora_jax.training.cost.flops import RECOMPUTED, Formula, attention_runs, head_tile, tiling
from qlora_jax.training.cost.step_shape import (
    CODES,
    CONSTANTS,
    DOWN,
    F32,
    KINDS,
    OUT,
    SHARED_DOWN,
    StepShape,
    batch_shapes,
    is_routed,
)


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

    That is 2 * 2 N K per product; routed experts are left out.
    """
    products = weight_products(step)
    return step.batch[0] * sum(products[name] * 2 * dequantized_bytes(shape) for name, shape in step.shapes())


def weight_products(step: StepShape) -> dict[str, int]:
    """Returns how often a micro-batch multiplies with a frozen weight of one layer, over the layers, by projection.

    Counted are the forward pass, the backward pass and the recomputation, and each time that an adapter reads the
    weight once more.
    """
    first, again = step.first_backward, "frozen again" in RECOMPUTED[step.remat]
    products = {}
    for name, _ in step.matrices():
        layer, more = step.adapter.products.get(name, 1), name in step.adapter.rereads
        recomputed = again * (layer * (name not in step.not_recomputed) + more)
        products[name] = step.layers(name) * (layer + more) + step.layers(name, first) * (layer + recomputed)
    return products


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


# The projections that read the input of attention, and of the MLP.
ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj")
OF_GATE_AND_UP = ("gate_proj", "up_proj", "gate_up_proj")
MLP_INPUTS = tuple(f"mlp.{of}{name}" for of in ("", "shared_experts.") for name in OF_GATE_AND_UP)


def activation_bytes(step: StepShape) -> dict[str, int]:
    """Returns the bytes of activations that all layers save on the device, by name, for the step's remat policy.

    Each is L M width itemsize, with the L layers that the backward pass visits. The widths are D for layer input,
    residual and normalized inputs; N H for query and attention_out; K H for key and value; F for gate, up and inner
    activation. Outputs that trained vectors scale have the width of the projection. attention_lse is f32 [B, N, T] per
    layer. Inputs that only adapters read are saved only in layers that have those adapters; `Method.saved` adds what
    the adapters compute. The policy `none` may save more, up to the size of the LoRA parameters and norms, because
    autodiff saves slices of them that the compiler does not recognize as copies.
    """
    found = {name: part(step) for name, part in SAVED[step.remat].items()}
    if step.lora.merge_into is not None or step.remat not in ("none", "names"):
        return found
    return found | method_of(step.lora.method).saved(step)


def offloaded_activation_bytes(step: StepShape) -> dict[str, int]:
    """Returns the bytes of activations that are offloaded to host memory, by the names of `activation_bytes`."""
    parts = OFFLOADED.get(step.remat, {})
    return {name: part(step) for name, part in parts.items()}


def _wide(width: Callable[[ModelConfig], int], *read_by: str) -> Formula:
    """Returns the formula L M width itemsize; with `read_by`, L are the layers in which one of these modules trains."""

    def part(step: StepShape) -> int:
        layers = _reading_layers(step, read_by) if read_by else step.backward_layers
        return layers * step.rows * width(step.model) * step.itemsize

    return part


def _reading_layers(step: StepShape, modules: Sequence[str]) -> int:
    """Returns the number of layers in which a trained part of one of these modules needs the module's input."""
    return len({layer for name in modules for layer in step.adapter.reads.get(name, ())})


def _lse(step: StepShape) -> int:
    tiles = tiling(step)
    length = tiles.chunks * tiles.chunk if attention_runs(step) == "tiles" else step.batch[2]
    return step.backward_layers * F32 * step.batch[1] * step.model.num_heads * length


def _unscaled(step: StepShape) -> int:
    """Returns the bytes of projection outputs that trained vectors multiply."""
    widths = sum(n for name, (n, _) in step.shapes() if name in step.adapter.scaled)
    return step.backward_layers * step.rows * widths * step.itemsize


def _post_norm_inputs(model: ModelConfig) -> int:
    layout = NORM_PLACEMENTS[model.layout]
    return model.embed_dim * ((layout.after_attention is not None) + (layout.after_mlp is not None))


def _layer_input(step: StepShape) -> int:
    """Returns the bytes of the layer's input if its norm or trained projections read it."""
    layout = NORM_PLACEMENTS[step.model.layout]
    return _wide(lambda m: m.embed_dim, *(() if layout.before_attention else ATTENTION_INPUTS))(step)


def _residual(step: StepShape) -> int:
    """Returns the bytes of the stream between attention and MLP, which the MLP's norm or trained projections read."""
    layout = NORM_PLACEMENTS[step.model.layout]
    if layout.parallel:
        return 0
    return _wide(lambda m: m.embed_dim, *(() if layout.before_mlp else MLP_INPUTS))(step)


def _to_attention(model: ModelConfig) -> int:
    return (
        model.embed_dim if NORM_PLACEMENTS[model.layout].before_attention else 0
    )  # without a norm it is the layer's input


def _to_mlp(model: ModelConfig) -> int:
    layout = NORM_PLACEMENTS[model.layout]
    return model.embed_dim if layout.before_mlp not in (None, layout.before_attention) else 0


def _before_qk_norm(model: ModelConfig) -> int:
    return (model.num_heads + model.num_kv_heads) * model.head_dim if model.qk_norm else 0


def _inner(step: StepShape) -> int:
    """Returns the bytes of gate and up: of dense MLPs and shared experts [M, F], of routed experts [M k, F]."""
    model, first = step.model, step.first_backward
    of_dense = step.layers(DOWN, first) * step.rows * model.mlp_dim
    if (experts := step.experts) is not None:
        inner = step.pairs * experts.mlp_dim + step.rows * experts.shared_mlp_dim
        of_dense += step.layers(ROUTER, first) * inner
    return (1 + model.gated) * of_dense * step.itemsize


def _routed(step: StepShape) -> int:
    """Returns the bytes of the routers' logits, f32 [M, E]; of a shared expert's result [M, D] and gate [M, 1]."""
    if (experts := step.experts) is None:
        return 0
    shared = experts.shared_gate * step.rows * (step.model.embed_dim + 1) * step.itemsize
    return step.layers(ROUTER, step.first_backward) * (F32 * step.rows * experts.count + shared)


def _shared_width(model: ModelConfig) -> int:
    return 0 if model.experts is None else model.experts.shared_mlp_dim


def _experts_inputs(step: StepShape) -> int:
    """Returns the bytes of the inputs [P, K] of adapters on experts."""
    reads = ((k, step.adapter.reads.get(name, ())) for name, (_, k) in step.model.expert_targets().items())
    return sum(step.slots * k * len(layers) for k, layers in reads) * step.itemsize


INPUT: dict[str, Formula] = {"layer input": _wide(lambda m: m.embed_dim)}
ATTENTION: dict[str, Formula] = {
    "attention_out": _wide(lambda m: m.num_heads * m.head_dim),
    "attention_lse": _lse,
}
NAMED: dict[str, Formula] = {
    "query": _wide(lambda m: m.num_heads * m.head_dim),
    "key and value": _wide(lambda m: 2 * m.num_kv_heads * m.head_dim),
    **ATTENTION,
    "attention_normed and mlp_normed": _wide(_post_norm_inputs),
    "attention_residual": _residual,
    "mlp_gate and mlp_up": _inner,
    "router_logits and shared_expert_out": _routed,
    "unscaled": _unscaled,
}
READ: dict[str, Formula] = {
    "attention's input": _wide(_to_attention, *ATTENTION_INPUTS),
    "mlp's input": _wide(_to_mlp, *MLP_INPUTS),
    "before queries' and keys' norms": _wide(_before_qk_norm),
    "mlp's inner activation": _wide(lambda m: m.mlp_dim, DOWN),
    "shared expert's inner activation": _wide(_shared_width, SHARED_DOWN),
    "experts' inputs": _experts_inputs,
    # A second copy with joined heads: the backward pass of attention saves the other shape.
    "o_proj's input": _wide(lambda m: m.num_heads * m.head_dim, OUT),
}
SAVED: dict[str, dict[str, Formula]] = {
    "none": {"layer input": _layer_input} | NAMED | READ,
    "names": INPUT | NAMED,
    "attention": INPUT | ATTENTION,
    "full": INPUT,
    "offload": {},
    "offload_attention": {},
}
OFFLOADED: dict[str, dict[str, Formula]] = {"offload": INPUT, "offload_attention": INPUT | ATTENTION}
