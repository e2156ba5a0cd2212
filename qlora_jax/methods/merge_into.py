"""Prepares a model to train with the weights that its export will store (`lora.merge_into`).

Projections with an adapter compute with the codes of their merged weights, which each pass makes anew. All else that
the file rounds is rounded once, so that training sees it too: other projections, experts, and the tables.

The rule is that of io/gguf/writer.py: matrices are rounded, and routers and vectors are not; rows that are not whole
blocks stay in 16 bits. An export reads its file back and compares the tensors that it finds rounded.
"""

import math
import operator
from typing import NamedTuple

from qlora_jax.config import LoraArgs
from qlora_jax.methods.adapter_cost import AdapterShape, StepSizes, Work, within_layers
from qlora_jax.methods.low_rank_cost import ranked_projections
from qlora_jax.methods.targets import target_layers
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM, Embedding
from qlora_jax.nn.linear import QLinear
from qlora_jax.nn.merged_linear import MergedCodes, rounded_table
from qlora_jax.nn.variables import Frozen


class MergeFormat(NamedTuple):
    """A format of `lora.merge_into`.

    Fields:
      kind: of the codes, a key of ENCODERS.
      block: weights that share a scale.
      projections_only: experts and tables stay in 16 bits, as in bitsandbytes' folders.
    """

    kind: str
    block: int = 32
    projections_only: bool = False


FORMATS = {
    "q4_0": MergeFormat("Q4_0"),
    "q8_0": MergeFormat("Q8_0"),
    "nf4": MergeFormat("nf4", 64, projections_only=True),
}


def train_merged(model: CausalLM, merge_into: str) -> None:
    """Makes a model with adapters compute with the weights that its export will store, in place.

    Raises:
      ValueError: a projection has adapters in some layers only, or rows that are not whole blocks; with all problems.
    """
    found, config = FORMATS[merge_into], model.config
    chosen = {
        name: (operator.attrgetter(name)(model.model.layers), len(config.layers_with(name)))
        for name in config.linear_shapes()
    }
    if problems := [each for linear, layers in chosen.values() for each in _problems(linear, layers, found)]:
        raise ValueError("\n  ".join([f"lora.merge_into: {merge_into} cannot hold this model's adapters:", *problems]))
    for linear, layers in chosen.values():
        if linear.shape[1] % found.block == 0:
            linear.merging = MergedCodes((found.kind,) * layers)
            if linear.adapter is None:
                linear.replace_by_codes()
    if found.projections_only:
        return
    for name, (_, inputs) in config.expert_shapes().items():
        place = operator.attrgetter(name)(model.model.layers)
        if inputs % found.block == 0:
            codes = MergedCodes((found.kind,) * len(config.layers_with(name)))
            place.weight = Frozen(codes.stack(place.weight.get_value(), None))
    for table in tables(model).values():
        if config.embed_dim % found.block == 0:
            table.weight = Frozen(rounded_table(table.weight.get_value(), found.kind))


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
    head = {"lm_head": model.lm_head} if model.has_lm_head else {}
    return {"model.embed_tokens": model.model.embed_tokens, **head}


def _problems(linear: QLinear, layers: int, of: MergeFormat) -> list[str]:
    problems = []
    if linear.shape[1] % of.block and (linear.adapter is not None or of.projections_only):
        found = f"found {linear.shape[1]} inputs, expected a multiple of {of.block}"
        problems.append(f"{linear.name}: {found}. Leave it out of lora.target_modules, or choose another format")
    adapted = getattr(linear.adapter, "adapted_layers", None)
    if adapted is not None and len(adapted) < layers:
        problems.append(f"{linear.name}: found adapters in {len(adapted)} layers, expected all {layers}. Choose all")
    return problems
