"""The FLOP of one optimizer step by formula: floating-point operations of its matrix products.

Pure arithmetic on a ModelConfig and shapes; tests compare the counts with the compiled program. Elementwise work
(norms, rotations, activations, softmax, the optimizer) is not counted.

Dimension key: A micro-batches, B rows, T positions, M = B T, L layers, D embed, N q-heads, K kv-heads, H head_dim,
F mlp, V vocab, R rank, C blocks, S block size; `out` and `in` are the features of a projection.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import jax

from pallas_kernels.nf4_matmul.costs import product_flops
from qlora_jax.methods.expert_adapters import parameter_shapes
from qlora_jax.methods.oft import last_power
from qlora_jax.models.config import NORM_PLACEMENTS, ROUTER
from qlora_jax.nn.attention import cpu as attention_cpu
from qlora_jax.nn.attention.tiles import Tiling
from qlora_jax.nn.lm_head import tiles as lm_head_tiles
from qlora_jax.training.cost.step_shape import (
    DOWN,
    EMBEDDING,
    HEAD,
    OUT,
    ROUTED_DOWN,
    SHARED_DOWN,
    SHARED_GATE,
    StepShape,
)

# FLOP per micro-batch of all layers


def frozen_flops(step: StepShape, *, first: int = 0, without: tuple[str, ...] = ()) -> int:
    """Returns `projection_flops` if the weights are frozen: y = x W^T, and the same for dx = dy W."""
    return step.frozen * projection_flops(step, first=first, without=without)


def trained_linear_flops(step: StepShape, *, first: int = 0, without: tuple[str, ...] = ()) -> int:
    """Returns `projection_flops` if the weights train; the backward pass adds as much for dW = dy^T x."""
    return (not step.frozen) * projection_flops(step, first=first, without=without)


def projection_flops(step: StepShape, *, first: int, without: tuple[str, ...]) -> int:
    """Returns the sum over projections and layers of 2 M out in; doubled with DoRA and dropout."""
    twice = step.dora if step.lora.dropout else ()
    return sum(
        step.layers(name, first) * (1 + (name in twice)) * product_flops(step.rows, shape)
        for name, shape in step.shapes()
        if name not in without
    )


def expert_flops(step: StepShape, *, first: int = 0, without: tuple[str, ...] = ()) -> int:
    """Returns the sum over projections of routed experts and sparse layers of 2 M k out in; the same for dx = dy W.

    Rows that pad tiles are not counted.
    """
    shapes = step.model.expert_shapes()
    return sum(
        step.layers(name, first) * product_flops(step.pairs, shape)
        for name, shape in shapes.items()
        if name not in without
    )


def router_flops(step: StepShape, *, first: int = 0) -> int:
    """Returns the sum over sparse layers of 2 M D E: the logits of the router; dx costs the same."""
    if step.experts is None:
        return 0
    return step.layers(ROUTER, first) * product_flops(step.rows, (step.experts.count, step.model.embed_dim))


def shared_gate_flops(step: StepShape, *, first: int = 0) -> int:
    """Returns the sum over sparse layers of 2 M D: the gate of the shared expert. Its dx is elementwise."""
    if step.experts is None or not step.experts.shared_gate:
        return 0
    return step.layers(SHARED_GATE, first) * product_flops(step.rows, (1, step.model.embed_dim))


def lora_down_flops(step: StepShape) -> int:
    """Returns the sum over the adapters of all layers of 2 M in R: x A."""
    of_projections = sum(
        2 * step.rows * k * step.ranks_of_layers(name) for name, (_, k) in step.shapes() if name in step.down
    )
    return of_projections + sum(k * pairs for (_, k), pairs in _parameter_adapters(step))


def lora_up_flops(step: StepShape, *, without: tuple[str, ...] = ()) -> int:
    """Returns the sum over the adapters of all layers of 2 M R out: (x A) B."""
    names = step.ranks.keys() - set(without)
    of_projections = sum(
        2 * step.rows * n * step.ranks_of_layers(name) for name, (n, _) in step.shapes() if name in names
    )
    return of_projections + sum(n * pairs for (n, _), pairs in _parameter_adapters(step, without))


def _parameter_adapters(step: StepShape, without: tuple[str, ...] = ()) -> Iterator[tuple[tuple[int, int], int]]:
    """Yields ((out, in), 2 rows R, summed over layers) of each adapter on experts and routers."""
    shapes = dict(parameter_shapes(step.model).values())
    for name, rank in step.parameter_ranks.items():
        if name in without:
            continue
        rows = step.rows if name == ROUTER else _slots_in_chunks(step)
        yield shapes[name], 2 * rows * rank * len(step.parameter_layers[name])


def _slots_in_chunks(step: StepShape) -> int:
    """Returns the rows that adapters on experts multiply: P slots, in whole chunks of E tiles unless experts share."""
    tiles, rows = step.tiles
    together = 1 if step.lora.share_experts else step.tiles_together
    return -(-tiles // together) * together * rows


def dora_flops(step: StepShape, *, first: int = 0) -> int:
    """Returns the FLOP of DoRA's norms: the sum of 2 R out in + 2 R^2 (in + out) for W A, A^T A and (A^T A) B."""
    adapted = ((name, step.ranks[name], shape) for name, shape in step.shapes() if name in step.dora)
    return sum(
        step.layers(name, first) * (product_flops(rank, (n, k)) + 2 * rank**2 * (n + k))
        for name, rank, (n, k) in adapted
    )


def bottleneck_flops(step: StepShape, *, products: Mapping[str, int]) -> int:
    """Returns the sum over bottleneck adapters of products * 2 M D R, over all layers.

    Args:
      products: number of products by the adapter's module.
    """
    of_layer = sum(products[name] for name in step.bottlenecks) * 2 * step.rows * step.model.embed_dim * step.lora.rank
    return step.model.num_layers * of_layer


def lora_backward_flops(step: StepShape) -> int:
    """Returns the FLOP of d(xA) = dy B^T, dB = (xA)^T dy, dA = x^T d(xA) unless A is fixed, and dx = d(xA) A^T."""
    return 2 * lora_up_flops(step) + (1 if step.vera or step.fixed_a else 2) * lora_down_flops(step)


def rotation_flops(step: StepShape, *, without: tuple[str, ...] = ()) -> int:
    """Returns the sum over OFT's projections of 2 M in S: x R."""
    names = step.rotated.keys() - set(without)
    return sum(
        step.layers(name) * 2 * step.rows * k * step.rotated[name][1] for name, (_, k) in step.shapes() if name in names
    )


def cayley_flops(step: StepShape, *, without: tuple[str, ...] = ()) -> int:
    """Returns the FLOP of OFT's series: the sum of C (n - 1) 2 S^3 for powers up to n; a solve is not counted."""
    products = last_power(step.lora.num_cayley_neumann_terms) - 1 if step.lora.use_cayley_neumann else 0
    blocks = ((name, *found) for name, found in step.rotated.items() if name not in without)
    return sum(step.layers(name) * products * count * 2 * size**3 for name, count, size in blocks)


def cayley_backward_flops(step: StepShape) -> int:
    """Returns the FLOP of the gradient of OFT's rotations: two products for each of the series, one per solve."""
    solved = {} if step.lora.use_cayley_neumann else step.rotated
    solves = sum(step.layers(name) * count * 2 * size**3 for name, (count, size) in solved.items())
    return solves + 2 * cayley_flops(step)


def uses_cpu_handlers(step: StepShape) -> bool:
    """Returns True if the C++ handlers for CPUs compute attention."""
    plain = step.model.has_plain_attention(step.batch[2])
    return (
        attention_cpu.unsupported_reason(step.weights.platform, step.weights.dtype, step.model.head_dim, plain=plain)
        is None
    )


def tiling(step: StepShape) -> Tiling:
    """Returns the tiling of attention: T positions in I chunks of C, the last one padded."""
    model, (_, rows, length) = step.model, step.batch
    found: list[Tiling] = []
    queries, keys = (
        jax.ShapeDtypeStruct((rows, length, heads, model.head_dim), step.weights.dtype)
        for heads in (model.num_heads, model.num_kv_heads)
    )
    jax.eval_shape(lambda q, k: found.append(Tiling.of(q, k)), queries, keys)
    return found[0]


def attention_pairs(step: StepShape, first: int = 0) -> int:
    """Returns the (query, key) pairs in the tiles that attention visits, over the layers from `first` on.

    Without windows they are L C^2 I (I + 1) / 2. With a window of w, query chunk i starts at key chunk
    (i C - w + 1) / C.
    """
    length, seen = step.batch[2], step.model.visible_counts(step.batch[2])[first:]
    if uses_cpu_handlers(step):
        return sum(attention_cpu.visited_pairs(length, window) for window in seen)
    tiles = tiling(step)
    return tiles.chunk**2 * sum(_visited(tiles, window) for window in seen)


def _visited(tiles: Tiling, window: int) -> int:
    """Returns the key chunks visited by all query chunks; unrolled attention ignores windows."""
    limit = tiles.length if tiles.unrolled else window
    return sum(i + 1 - max(i * tiles.chunk - limit + 1, 0) // tiles.chunk for i in range(tiles.chunks))


def attention_flops(step: StepShape, *, products: int, first: int = 0) -> int:
    """Returns products * 2 B N H pairs; 2 products forward (q k^T, p v), 5 backward (q k^T again, dp, dk, dv, dq)."""
    return products * _flops_per_pair(step) * attention_pairs(step, first)


def attention_recompute_flops(step: StepShape) -> int:
    """Returns the FLOP of recomputed attention: 2 products, or 1 if the compiler shares q k^T with the backward pass.

    It shares them if attention is unrolled.
    """
    shared = tiling(step).unrolled and not uses_cpu_handlers(step)
    return attention_flops(step, products=1 if shared else 2, first=step.first_backward)


def _flops_per_pair(step: StepShape) -> int:
    """Returns 2 B N H."""
    return 2 * step.batch[1] * step.model.num_heads * step.model.head_dim


# FLOP per micro-batch, outside the layers


def head_flops(step: StepShape) -> int:
    """Returns 2 C I D V for the logits of I chunks of C supervised tokens; the hidden states' gradient costs the same.

    If the head trains fully, V includes the new tokens.
    """
    rows = step.model.vocab_size + _head_is_trained(step) * step.new_tokens
    return 2 * head_rows(step) * step.model.embed_dim * rows


def head_tile(step: StepShape) -> lm_head_tiles.Tile:
    """Returns the tile of the head: tokens, those of all devices that share its rows, and W rows of one device."""
    parts = step.table_parts
    return lm_head_tiles.tile_size(step.weights.platform, step.rows * parts, step.model.vocab_size // parts)


def head_chunks(step: StepShape) -> tuple[int, int]:
    """Returns (I, C): the number of chunks of supervised tokens, and a chunk's tokens of this device.

    With a sequence head I is 0: its products, one per sequence, are negligible.
    """
    chunk = max(1, head_tile(step).tokens // step.table_parts)
    if step.head is not None:
        return 0, chunk
    tokens = step.rows if step.supervised is None else step.supervised
    return -(-tokens // chunk), chunk


def head_rows(step: StepShape) -> int:
    """Returns C I, the supervised tokens in whole chunks of C."""
    return math.prod(head_chunks(step))


def _head_is_trained(step: StepShape) -> bool:
    return (EMBEDDING if step.model.tie_embeddings else HEAD) in step.trained_tables


def row_flops(step: StepShape) -> int:
    """Returns 2 M D per new token: hidden states times its row of the head."""
    return 2 * step.rows * step.model.embed_dim * step.new_tokens


def _rows_backward(step: StepShape) -> int:
    """Returns the backward FLOP of new rows in head and embedding, unless these train fully."""
    return row_flops(step) * (2 * (not _head_is_trained(step)) + (EMBEDDING not in step.trained_tables))


Formula = Callable[[StepShape], int]

LAYER_FLOPS: dict[str, Formula] = {
    "frozen forward": frozen_flops,
    "frozen backward": lambda step: frozen_flops(step, first=step.first_backward),
    "experts forward": expert_flops,
    "experts backward": lambda step: expert_flops(step, first=step.first_backward),
    "shared_gate forward": shared_gate_flops,
    "router forward": router_flops,
    "router backward": lambda step: router_flops(step, first=step.first_backward),
    "lora forward": lambda step: lora_down_flops(step) + lora_up_flops(step),
    "lora backward": lora_backward_flops,
    "dora forward": dora_flops,
    "rotation forward": rotation_flops,
    # dx = dy R^T and dR = x^T dy, for which R is rebuilt
    "rotation backward": lambda step: 2 * rotation_flops(step),
    "cayley forward": cayley_flops,
    "cayley backward": cayley_backward_flops,
    "cayley rebuild": cayley_flops,
    "bottleneck forward": lambda step: bottleneck_flops(step, products=dict.fromkeys(step.bottlenecks, 2)),
    # d inner = dy U^T and dU = inner^T dy; dD = x^T d narrow and dx = d narrow D^T
    "bottleneck backward": lambda step: bottleneck_flops(step, products=dict.fromkeys(step.bottlenecks, 4)),
    "whole_linear forward": trained_linear_flops,
    "whole_linear backward": lambda step: 2 * trained_linear_flops(step),
    "attention forward": lambda step: attention_flops(step, products=2),
    "attention backward": lambda step: attention_flops(step, products=5, first=step.first_backward),
}
HEAD_FLOPS: dict[str, Formula] = {
    "head forward": head_flops,
    "head backward": head_flops,
    # recomputed logits, and the head's gradient
    "whole_head backward": lambda step: 2 * _head_is_trained(step) * head_flops(step),
    "new_tokens forward": lambda step: row_flops(step) * (not _head_is_trained(step)),
    "new_tokens backward": _rows_backward,
}


def not_recomputed(step: StepShape) -> tuple[str, ...]:
    """Returns the projections whose outputs the backward pass does not need.

    They are those whose output is only added to the residual stream after all that reads it: no norm, trained vector
    or bottleneck adapter.
    """
    layout = NORM_PLACEMENTS[step.model.layout]
    unread = {OUT: layout.parallel and "self_attn" not in step.bottlenecks}
    unread[DOWN] = layout.after_mlp is None and "mlp" not in step.bottlenecks
    unread[ROUTED_DOWN] = unread[DOWN]
    unread[SHARED_DOWN] = unread[DOWN] and not (step.experts is not None and step.experts.shared_gate)
    scaled = {*step.dora, *(name for name, on_inputs in step.vectors.items() if not on_inputs)}
    return tuple(name for name, last in unread.items() if last and name not in scaled)


def bottleneck_recompute_flops(step: StepShape) -> int:
    """Returns the FLOP of recomputed bottleneck adapters: both products, or the first if no norm reads the result."""
    layout = NORM_PLACEMENTS[step.model.layout]
    is_read = {"self_attn": not layout.parallel, "mlp": layout.after_mlp is not None}
    return bottleneck_flops(step, products={name: 1 + read for name, read in is_read.items()})


# Recomputation in the backward pass per remat policy.
FULL: dict[str, Formula] = {
    "frozen again": lambda step: frozen_flops(step, first=step.first_backward, without=not_recomputed(step)),
    "experts again": lambda step: expert_flops(step, first=step.first_backward, without=not_recomputed(step)),
    "shared_gate again": lambda step: shared_gate_flops(step, first=step.first_backward),
    "router again": lambda step: router_flops(step, first=step.first_backward),
    "lora again": lambda step: lora_down_flops(step) + lora_up_flops(step, without=not_recomputed(step)),
    "dora again": dora_flops,
    "rotation again": lambda step: rotation_flops(step, without=not_recomputed(step)),
    "cayley again": lambda step: cayley_flops(step, without=not_recomputed(step)),
    "bottleneck again": bottleneck_recompute_flops,
    "whole_linear again": lambda step: trained_linear_flops(step, without=not_recomputed(step)),
    "attention again": attention_recompute_flops,
}
RECOMPUTED: dict[str, dict[str, Formula]] = {"none": {}, "names": {}, "full": FULL, "offload": FULL}


def flops(step: StepShape) -> dict[str, int]:
    """Returns the FLOP of one optimizer step by part: A (forward + backward + recomputation + head)."""
    parts = LAYER_FLOPS | RECOMPUTED[step.remat] | HEAD_FLOPS
    return {name: step.batch[0] * part(step) for name, part in parts.items()}
