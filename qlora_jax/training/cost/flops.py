"""The FLOP of one optimizer step by formula: floating-point operations of its matrix products.

Pure arithmetic on a ModelConfig and shapes; tests compare the counts with the compiled program. Elementwise work
(norms, rotations, activations, softmax, the optimizer) is not counted.

Dimension key: A micro-batches, B rows, T positions, M = B T, L layers, D embed, N q-heads, K kv-heads, H head_dim,
F mlp, V vocab; `out` and `in` are the features of a projection.
"""

import math
from collections.abc import Callable

import jax

from pallas_kernels.attention import costs
from pallas_kernels.attention import cpu as attention_cpu
from pallas_kernels.attention.bounds import Block
from pallas_kernels.attention.dispatch import choose as choose_attention
from pallas_kernels.attention.tile_mask import Tiling
from pallas_kernels.devices import FUSED_FROM, Device
from pallas_kernels.nf4_matmul.costs import product_flops
from qlora_jax.methods.adapter_cost import Work
from qlora_jax.methods.merge_into import merged_work
from qlora_jax.methods.method import method_of
from qlora_jax.models.config import ROUTER
from qlora_jax.nn.lm_head import tiles as lm_head_tiles
from qlora_jax.training.cost.step_shape import EMBEDDING, HEAD, SHARED_GATE, StepShape

# FLOP per micro-batch of all layers


def frozen_flops(step: StepShape, *, first: int = 0, without: tuple[str, ...] = ()) -> int:
    """Returns the sum over products with frozen weights and layers of 2 M out in: y = x W^T, and dx = dy W."""
    return sum(
        step.layers(name, first) * step.adapter.products.get(name, 1) * product_flops(step.rows, shape)
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


def attention_runs(step: StepShape) -> str:
    """Returns the implementation of attention; for GPUs, that of cards which have the kernels."""
    device = Device(platform=step.weights.platform, kind="", compute_capability=FUSED_FROM)
    return str(choose_attention(device, step.weights.dtype, step.model.head_dim).name)


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


def attention_flops(step: StepShape, *, backward: bool = False, first: int = 0) -> int:
    """Returns products * 2 B N H pairs, over the layers from `first` on.

    2 products forward (q k^T, p v), 5 backward (q k^T again, dp, dk, dv, dq); `costs` has those of `mma`. The pairs are
    those of the tiles that are visited. Without windows these are C^2 I (I + 1) / 2. With a window of w, query chunk i
    starts at key chunk (i C - w + 1) / C.
    """
    length, seen = step.batch[2], step.model.visible_counts(step.batch[2])[first:]
    products = 5 if backward else 2
    if attention_runs(step) == "tiles":
        tiles = tiling(step)
        return _flops_per_pair(step) * products * tiles.chunk**2 * sum(_visited(tiles, window) for window in seen)
    passes = ((products, Block(attention_cpu.BLOCK, attention_cpu.BLOCK)),)
    if attention_runs(step) == "mma":
        passes = costs.forward_passes(step.model.head_dim)
        if backward:
            passes = costs.backward_passes(step.model.head_dim, capped=step.model.attention_softcap is not None)
    each = [products * sum(costs.visited_pairs(length, window, block) for window in seen) for products, block in passes]
    return _flops_per_pair(step) * sum(each)


def _visited(tiles: Tiling, window: int) -> int:
    """Returns the key chunks visited by all query chunks; unrolled attention ignores windows."""
    limit = tiles.length if tiles.unrolled else window
    return sum(i + 1 - max(i * tiles.chunk - limit + 1, 0) // tiles.chunk for i in range(tiles.chunks))


def attention_recompute_flops(step: StepShape) -> int:
    """Returns the FLOP of recomputed attention: those of forward, or half if the compiler shares q k^T with backward.

    It shares them if attention is unrolled.
    """
    shared = attention_runs(step) == "tiles" and tiling(step).unrolled
    return attention_flops(step, first=step.first_backward) // (1 + shared)


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
    "attention forward": lambda step: attention_flops(step),
    "attention backward": lambda step: attention_flops(step, backward=True, first=step.first_backward),
}
HEAD_FLOPS: dict[str, Formula] = {
    "head forward": head_flops,
    "head backward": head_flops,
    # recomputed logits, and the head's gradient
    "whole_head backward": lambda step: 2 * _head_is_trained(step) * head_flops(step),
    "new_tokens forward": lambda step: row_flops(step) * (not _head_is_trained(step)),
    "new_tokens backward": _rows_backward,
}


# Recomputation in the backward pass per remat policy.
FULL: dict[str, Formula] = {
    "frozen again": lambda step: frozen_flops(step, first=step.first_backward, without=step.not_recomputed),
    "experts again": lambda step: expert_flops(step, first=step.first_backward, without=step.not_recomputed),
    "shared_gate again": lambda step: shared_gate_flops(step, first=step.first_backward),
    "router again": lambda step: router_flops(step, first=step.first_backward),
    "attention again": attention_recompute_flops,
}
BUT_ATTENTION = {name: part for name, part in FULL.items() if name != "attention again"}
RECOMPUTED: dict[str, dict[str, Formula]] = {
    **{"none": {}, "names": {}, "attention": BUT_ATTENTION, "full": FULL},
    **{"offload": FULL, "offload_attention": BUT_ATTENTION},
}


def method_work(step: StepShape) -> tuple[Work, ...]:
    """Returns the FLOP that the finetuning method adds to a micro-batch, by named scope."""
    method = method_of(step.lora.method)
    return method.work(step) if step.lora.merge_into is None else merged_work(step, method.merged_products)


def flops(step: StepShape) -> dict[str, int]:
    """Returns the FLOP of one optimizer step by part: A (forward + backward + recomputation + head)."""
    again = RECOMPUTED[step.remat]
    parts = {name: part(step) for name, part in (LAYER_FLOPS | again | HEAD_FLOPS).items()}
    for work in method_work(step):
        directions = {"forward": work.forward, "backward": work.backward, "rebuild": work.rebuild}
        directions |= {"again": work.again} if again else {}
        parts |= {f"{work.scope} {direction}": flop for direction, flop in directions.items() if flop}
    return {name: step.batch[0] * part for name, part in parts.items()}
