"""Prepares a model to train with the weights that its export will store (`lora.merge_into`).

Projections with an adapter compute with the codes of their merged weights, which each pass makes anew. All else that
the file rounds is rounded once, so that training sees it too: other projections, experts, and the tables.

The rule is that of io/gguf/writer.py: matrices are rounded, and routers and vectors are not; rows that are not whole
blocks stay in 16 bits. An export reads its file back and compares the tensors that it finds rounded.
"""

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.formats.block_encoders import BLOCK_ENCODERS
from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS, INT_SCALES, PART, int_type
from qlora_jax.config import LoraArgs
from qlora_jax.config.exports import MIXTURES
from qlora_jax.config.methods import MERGED_FOLDERS
from qlora_jax.methods.adapter_cost import AdapterShape, StepSizes, Work, within_layers
from qlora_jax.methods.low_rank_cost import ranked_projections
from qlora_jax.methods.targets import target_layers
from qlora_jax.models.config import INT4, MXFP4, NVFP4, ModelConfig
from qlora_jax.models.decoder import CausalLM, Embedding
from qlora_jax.models.partition import ModelParts
from qlora_jax.nn.linear import QLinear
from qlora_jax.nn.merged_linear import Kinds, MergedCodes, rounded_table
from qlora_jax.nn.variables import Frozen
from qlora_jax.quant.encoders import ENCODERS
from qlora_jax.quant.settings import QuantSettings

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class MergeFormat(NamedTuple):
    """A format of `lora.merge_into`.

    Fields:
      kind: of the codes, a key of ENCODERS, or INT4, whose groups depend on the model; None: `lora.merge_types` has the
        kind of each tensor.
      projections_only: experts and tables stay in 16 bits, as in bitsandbytes' folders.
    """

    kind: str | None
    projections_only: bool = False


FORMATS = {
    "q4_0": MergeFormat("Q4_0"),
    "q8_0": MergeFormat("Q8_0"),
    **{name: MergeFormat(name, projections_only=True) for name in MERGED_FOLDERS},
    **dict.fromkeys(MIXTURES, MergeFormat(None)),
}
DENSE = "F16"  # the type of matrices whose rows are not whole blocks
GGUF_KINDS = {DENSE, "F32", *(name for name in BLOCK_ENCODERS if not name.startswith("INT"))}


def file_kinds(config: ModelConfig, lora: LoraArgs) -> dict[str, Kinds]:
    """Returns the type in the file of each matrix that it may round: per layer of a stack, or of a table.

    Raises:
      ValueError: `lora.merge_types` lacks a matrix, or has another or an unknown type; with all problems.
    """
    found = FORMATS[str(lora.merge_into)]
    if found.kind is not None:
        matrices = file_matrices(config, found.projections_only)
        kind = _integer_groups([inputs for inputs, _ in matrices.values()]) if found.kind == INT4 else found.kind
        block = block_weights(kind)
        return {name: (DENSE if inputs % block else kind,) * layers for name, (inputs, layers) in matrices.items()}
    problems, kinds = [], {}
    for name, (inputs, layers) in file_matrices(config).items():
        words = lora.merge_types.get(name, "").split()
        kinds[name] = tuple(words) * layers if len(words) == 1 else tuple(words)
        unknown = sorted({*words} - GGUF_KINDS)
        if len(kinds[name]) != layers:
            problems.append(f"{name}: found {len(words)} types, expected 1 or {layers}")
        elif unknown or any(inputs % block_weights(word) for word in words):
            odd = f", whose blocks divide rows of {inputs}"
            problems.append(f"{name}: found {', '.join(unknown or words)}, expected types of GGUF{odd}")
    problems += [f"{name}: found for a model without this matrix" for name in lora.merge_types.keys() - kinds.keys()]
    if problems:
        raise ValueError("\n  ".join(["lora.merge_types: not the types of this model. Correct these:", *problems]))
    return kinds


def _integer_groups(inputs: Iterable[int]) -> str:
    """Returns the largest groups of integers that divide the inputs of all projections, as fused projections need."""
    divisor = math.gcd(*inputs)
    return int_type(4, PART if divisor % PART else divisor, INT_SCALES["_BF16"])


def planned(lora: LoraArgs, config: ModelConfig) -> LoraArgs:
    """Returns the settings with any types for a mixture that has none: plans know no file, and sizes differ little."""
    if lora.merge_into not in MIXTURES or lora.merge_types:
        return lora
    sizes = {"Q4_K": 256, "Q8_0": 32, DENSE: 1}
    types = {
        name: next(kind for kind, block in sizes.items() if inputs % block == 0)
        for name, (inputs, _) in file_matrices(config).items()
    }
    return dataclasses.replace(lora, merge_types=types)


def block_weights(kind: str) -> int:
    """Returns the weights of a row that a block of codes has; 1: the type has no blocks."""
    if kind in BLOCK_ENCODERS:
        return BLOCK_FORMATS[BLOCK_ENCODERS[kind].ggml_type].weights
    return {NVFP4: PART, MXFP4: PART}.get(kind, QuantSettings().block_size) if kind in ENCODERS else 1


def file_matrices(config: ModelConfig, projections_only: bool = False) -> dict[str, tuple[int, int]]:
    """Returns (inputs, layers) of the matrices that a file may round; 1 layer for a table."""
    shapes = {name: shape for name, (shape, _) in config.linear_shapes().items()}
    shapes |= {} if projections_only else config.expert_shapes()
    stacks = {name: (shape[1], len(config.layers_with(name))) for name, shape in shapes.items()}
    heads = () if projections_only else (EMBEDDING,) if config.tie_embeddings else (EMBEDDING, HEAD)
    return stacks | dict.fromkeys(heads, (config.embed_dim, 1))


def multiply_by_codes(model: CausalLM, lora: LoraArgs) -> None:
    """Makes a model with adapters compute with the weights that its export will store, in place.

    Raises:
      ValueError: a projection has adapters in some layers only, or rows that are not whole blocks; with all problems.
    """
    found, config = file_kinds(model.config, lora), model.config
    linears = {name: operator.attrgetter(name)(model.model.layers) for name in config.linear_shapes()}
    required = FORMATS[str(lora.merge_into)].projections_only
    if problems := [each for name, one in linears.items() for each in _problems(one, found[name], required)]:
        start = f"lora.merge_into: {lora.merge_into} cannot hold this model's adapters:"
        raise ValueError("\n  ".join([start, *problems]))
    for name, linear in linears.items():
        if is_coded(found[name]):
            linear.merging = MergedCodes(found[name])
            if linear.adapter is None:
                linear.replace_by_codes()
            elif lora.merge_from:
                linear.rounds = Frozen(jnp.asarray(True))
    for name in config.expert_shapes().keys() & found.keys():
        place = operator.attrgetter(name)(model.model.layers)
        if is_coded(found[name]):
            place.weight = Frozen(MergedCodes(found[name]).stack(place.weight.get_value(), None))
    for name, table in tables(model).items():
        if is_coded(found.get(name, ())):
            table.weight = Frozen(rounded_table(table.weight.get_value(), found[name][0]))


def without_rounding(parts: ModelParts) -> ModelParts:
    """Returns the model whose products have base and adapter apart, of settings with `lora.merge_from`."""
    pairs = [
        (path, leaf.replace(jax.device_put(np.asarray(False), leaf[...].sharding)) if path[-1] == "rounds" else leaf)
        for path, leaf in nnx.to_flat_state(parts.base)
    ]
    return dataclasses.replace(parts, base=nnx.from_flat_state(pairs))


def is_coded(kinds: Kinds) -> bool:
    """Returns True if all layers of a stack are in codes."""
    return bool(kinds) and all(kind in ENCODERS for kind in kinds)


def replace_by_codes(model: CausalLM) -> None:
    """Replaces weights and adapters by the codes of merged weights, in place."""
    for name in model.config.linear_shapes():
        linear: QLinear = operator.attrgetter(name)(model.model.layers)
        if linear.merging:
            linear.replace_by_codes()


def merged_shape(config: ModelConfig, spec: LoraArgs) -> AdapterShape:
    """Returns the facts about adapters that are merged in each pass: their gradients read the inputs."""
    layers = within_layers(config, target_layers(config, spec))
    return AdapterShape(layers=layers, reads=layers)


def merged_work(sizes: StepSizes, products: int | None) -> tuple[Work, ...]:
    """Returns the FLOP of A B for each product, forward and backward, and those of gradients.

    The gradients of A and B take 2 M R (2 K + 2 N), and of B alone half of that. Other methods need the gradient of the
    weight, 2 M N K; passing it on to A and B takes three times A B, and to other arrays is not counted.

    Args:
      products: `Method.merged_products`.
    """
    lora, shapes, merges, gradients = sizes.lora, dict(sizes.shapes()), 0, 0
    ranked = {} if products is None else ranked_projections(sizes.model, lora)
    for name, layers in merged_shape(sizes.model, lora).layers.items():
        rank = ranked[name].rank if name in ranked else 0
        merge = 2 * rank * math.prod(shapes[name]) * len(layers)
        merges += merge
        if products:
            gradients += products * 2 * sizes.rows * rank * sum(shapes[name]) * len(layers)
        else:
            gradients += 2 * sizes.rows * math.prod(shapes[name]) * len(layers) + 3 * merge
    return Work("merge", merges, merges, per_micro_batch=True), Work("lora", 0, gradients)


def tables(model: CausalLM) -> dict[str, Embedding]:
    """Returns embedding and head by name."""
    head = {HEAD: model.lm_head} if model.has_lm_head else {}
    return {EMBEDDING: model.model.embed_tokens, **head}


def _problems(linear: QLinear, kinds: Kinds, required: bool) -> list[str]:
    problems, adapted = [], getattr(linear.adapter, "adapted_layers", None)
    if not is_coded(kinds) and (linear.adapter is not None or required):
        dense = ", ".join(sorted({kind for kind in kinds if kind not in ENCODERS}))
        found = f"found rows of {linear.shape[1]} inputs, whose type is {dense}"
        problems.append(f"{linear.name}: {found}. Leave it out of lora.target_modules, or choose another format")
    if adapted is not None and len(adapted) < len(kinds):
        problems.append(
            f"{linear.name}: found adapters in {len(adapted)} layers, expected all {len(kinds)}. Choose all"
        )
    return problems
