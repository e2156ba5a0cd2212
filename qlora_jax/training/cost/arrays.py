"""The arrays of a step by shape, and the bytes of one device's part of each on a mesh.

Pure arithmetic, with the dimension key of qlora_jax.training.cost.flops. A stack's leading axis is that of its layers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jax.sharding import PartitionSpec as P

from pallas_kernels.formats.ggml_blocks import row_bytes
from pallas_kernels.formats.layouts import LAYOUTS
from qlora_jax.methods.bitfit import bias_targets, bias_widths
from qlora_jax.methods.expert_adapters import parameter_shapes
from qlora_jax.methods.method import norm_widths
from qlora_jax.methods.norms import norm_targets
from qlora_jax.methods.oft import block_elements
from qlora_jax.models.config import DENSE, QUANTIZED, STORED
from qlora_jax.sharding import FSDP, AnyMesh, axis_size, cut_axis, lora_spec, stack_spec, table_spec
from qlora_jax.training.cost.step_shape import F32, StepShape, is_routed

Spec = Callable[[Sequence[int], AnyMesh], P]


class Leaf(NamedTuple):
    """One array: its whole shape, the bytes of an element, and how it is cut over a mesh (None: whole everywhere)."""

    shape: tuple[int, ...]
    itemsize: int
    spec: Spec | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of the whole array."""
        return math.prod(self.shape) * self.itemsize

    def is_cut(self, mesh: AnyMesh | None) -> bool:
        """Returns True if each device of the mesh has a part of the array."""
        return mesh is not None and self.spec is not None and cut_axis(self.spec(self.shape, mesh)) is not None

    def parts(self, mesh: AnyMesh | None) -> int:
        """Returns the number of parts that the array is cut into."""
        return axis_size(mesh, FSDP) if self.is_cut(mesh) else 1

    def part_bytes(self, mesh: AnyMesh | None) -> int:
        """Returns the bytes of one device's part."""
        return self.nbytes // self.parts(mesh)


def quantized_leaves(step: StepShape, name: str, shape: tuple[int, int]) -> tuple[Leaf, list[Leaf]]:
    """Returns (codes, constants) of a projection's packed layers.

    Stacks with dense layers, and stored codes, are whole on every device.
    """
    (layers, *experts), weights = step.stack(name), step.weights
    formats = weights.formats(name, layers)
    if weights.quant_type == STORED:
        rows = [row_bytes(each, shape[1]) for each in formats if each != DENSE]
        if weights.experts_on_host and is_routed(name):
            rows = len(rows) * [max(rows, default=0)]  # nn/padded_stack.py
        return Leaf((sum(rows), *experts, shape[0]), 1), []
    stack, spec = (formats.count(QUANTIZED), *experts), None if DENSE in formats else stack_spec
    layout = LAYOUTS[weights.layout_for(shape)]
    blocks = layout.constants_shape(shape, weights.block_size)
    codes = Leaf((*stack, *layout.codes_shape(shape)), 1, spec)
    if not weights.double_quant:
        return codes, [Leaf((*stack, *blocks), F32, spec)]
    nested = -(-math.prod(blocks) // weights.nested_block_size)
    return codes, [Leaf((*stack, *blocks), 1, spec), Leaf((*stack, nested), F32, spec), Leaf(stack, F32, spec)]


def dense_leaf(step: StepShape, name: str, shape: tuple[int, int]) -> Leaf:
    """Returns a projection's dense layers."""
    layers, *experts = step.stack(name)
    return Leaf((len(step.weights.dense_layers(name, layers)), *experts, *shape), step.itemsize)


def router_leaves(step: StepShape) -> list[Leaf]:
    """Returns the routers, with their biases, and the gates of shared experts."""
    experts, width = step.experts, step.model.embed_dim
    if experts is None:
        return []
    layers = len(experts.layers)
    return [
        Leaf((layers, experts.count, width + experts.router_bias), step.itemsize),
        Leaf((layers, experts.selection_bias * experts.count), F32),
        Leaf((layers, experts.shared_gate, width), step.itemsize),
    ]


def table_leaves(step: StepShape) -> list[Leaf]:
    """Returns the frozen tables, embedding and head, and the head's bias. Tables with trained rows are whole."""
    model = step.model
    count = len(step.tables) - len(step.trained_tables)
    spec = None if step.new_tokens or step.trained_tables else table_spec
    return count * [Leaf((model.vocab_size, model.embed_dim), step.itemsize, spec)]


def head_bias_leaf(step: StepShape) -> Leaf:
    """Returns the head's bias, with a row per new token; its shape is (0,) if the head has none."""
    rows = step.model.head_bias * (step.head is None) * step.frozen * (step.model.vocab_size + step.new_tokens)
    return Leaf((rows,), step.itemsize, None if step.new_tokens or step.trained_tables else table_spec)


def vera_leaves(step: StepShape) -> list[Leaf]:
    """Returns VeRA's frozen A and B, of the largest sizes among its projections."""
    if not step.vera:
        return []
    shapes = [shape for name, shape in step.shapes() if name in step.vera]
    return [Leaf((max(sizes), step.lora.rank), step.itemsize) for sizes in zip(*shapes, strict=True)]


def trained_leaves(step: StepShape, *, fixed: bool = True) -> Iterator[Leaf]:
    """Yields the trained parameters; the leading axis is that of the layers, or of the trained rows of a table.

    Args:
      fixed: True to include the A of LoRA-FA, which has neither a gradient nor optimizer state.
    """
    layers = step.model.num_layers
    yield from (Leaf(shape, step.lora_itemsize, lora_spec) for shape in _matrices(step, fixed))
    yield from (Leaf(shape, step.lora_itemsize, lora_spec) for shape in _parameter_matrices(step))
    yield from (Leaf(shape, F32, lora_spec) for shape in _vectors(step))
    for name, size in trained_in_place(step):
        yield Leaf((layers, size), F32, lora_spec) if ".layers." in name else Leaf((1, size), F32)
    yield Leaf((_trained_rows(step), step.model.embed_dim), step.lora_itemsize)
    if step.head is not None:
        yield Leaf((step.model.embed_dim, step.head.outputs), F32)


def _matrices(step: StepShape, fixed: bool) -> Iterator[tuple[int, int, int]]:
    """Yields the shapes of the stacks of adapters' matrices, or of each weight in full finetuning."""
    for name, (n, k) in step.shapes():
        if not step.frozen:
            yield step.layers(name), n, k
        elif name in step.rotated:
            blocks, size = step.rotated[name]
            yield step.layers(name), blocks, block_elements(size)
        elif name in step.ranks and name not in step.vera:
            layers, rank = len(step.adapted_layers[name]), step.ranks[name]
            if fixed or not step.fixed_a:
                yield layers, k, rank
            yield layers, rank, n
    layers, width, rank = step.model.num_layers, step.model.embed_dim, step.lora.rank
    yield from len(step.bottlenecks) * [(layers, width, rank), (layers, rank, width)]


def _parameter_matrices(step: StepShape) -> Iterator[tuple[int, ...]]:
    """Yields the shapes of A and B of adapters on experts and routers."""
    shapes = dict(parameter_shapes(step.model).values())
    for name, rank in step.parameter_ranks.items():
        (n, k), layers, (_, *experts) = shapes[name], len(step.parameter_layers[name]), step.stack(name)
        if experts and step.lora.share_experts:
            experts = [1]
        yield layers, *experts, k, rank
        yield layers, *experts, rank, n


def _vectors(step: StepShape) -> Iterator[tuple[int, int]]:
    """Yields (layers, elements) of each trained vector of the adapters."""
    for name, (n, k) in step.shapes():
        layers = step.layers(name)
        if name in step.vectors:
            yield layers, k if step.vectors[name] else n
        if name in step.vera:
            yield layers, step.ranks[name]
            yield layers, n
        if name in step.dora:
            yield layers, n
    layers = step.model.num_layers
    yield from len(step.bottlenecks) * [(layers, step.lora.rank), (layers, step.model.embed_dim)]


def _trained_rows(step: StepShape) -> int:
    """Returns the trained rows of embedding and head: new tokens, and all rows of tables that train fully."""
    return len(step.tables) * step.new_tokens + len(step.trained_tables) * step.model.vocab_size


def _norm_leaves(step: StepShape) -> int:
    """Returns the number of vectors of a norm: 2 for a LayerNorm (weight, bias), else 1."""
    return 2 if step.model.norm == "layer" else 1


def trained_in_place(step: StepShape) -> list[tuple[str, int]]:
    """Returns (module, elements) of each norm's weight and each bias that trains in place of a frozen one.

    Modules have Hugging Face's names without the layer's index; those of a layer have as many vectors as layers.
    """
    model, norms, biases = step.model, norm_widths(step.model), bias_widths(step.model)
    if step.lora.method == "bitfit":
        return [(name, biases[name]) for name in bias_targets(model, step.lora)]
    if step.lora.method == "ln_tuning":
        return _norm_leaves(step) * [(name, norms[name]) for name in norm_targets(model, step.lora)]
    if step.frozen:
        return []
    return _norm_leaves(step) * [*norms.items()] + [(name, n) for name, n in biases.items() if name not in norms]
