"""Runs of consecutive layers of one kind, for models whose layers differ in their adapters or in their MLPs.

Adapters are stacked over the layers that have one, and the MLPs of a mixture of experts over the dense or the sparse
layers, so layers that lack them take no memory. Each run has a separate scan, over its part of the trained stacks and
without what its layers lack. Dimension key: L layers.
"""

import itertools
from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import PyTree

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.mlp import MixtureMLP
from qlora_jax.nn.linear import gather_layer
from qlora_jax.nn.variables import StatePath

MLP, MLP_START = "mlp", "mlp_start"  # attributes of the block


def layer_runs(block: nnx.Module, config: ModelConfig) -> list[range]:
    """Returns the runs in order; one if all layers have the same adapters and are all dense or all sparse."""
    chosen = [frozenset(layers) for layers in _partial_adapters(block, config).values()]
    if config.experts is not None:
        chosen.append(frozenset(config.experts.layers))
    same = itertools.groupby(range(config.num_layers), key=lambda layer: [layer in layers for layers in chosen])
    runs = [list(group) for _, group in same]
    return [range(run[0], run[-1] + 1) for run in runs]


def split_run(block: nnx.Module, run: range, config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns (structure, trained leaves, frozen leaves) of the block for the layers of a run.

    Trained leaves have the layers of the run, frozen leaves all layers that have them.
    """
    chosen = _partial_adapters(block, config)
    graphdef, lora, base = nnx.split(block, nnx.LoRAParam, ...)
    if not chosen and config.experts is None:
        return graphdef, lora, base
    own = nnx.merge(graphdef, lora, base)
    for path, layers in chosen.items():
        if run.start not in layers:
            *linear, attribute = path
            setattr(_at(own, linear), attribute, nnx.data(None))
    mlp = getattr(own, MLP)
    if isinstance(mlp, MixtureMLP):
        setattr(own, MLP, mlp.in_layers(run))
        setattr(own, MLP_START, mlp_start(run, config))
    graphdef, lora, base = nnx.split(own, nnx.LoRAParam, ...)
    cut = [
        (path, variable.replace(_rows(variable.get_value(), _first_row(chosen.get(path[:-1]), run), len(run))))
        for path, variable in nnx.to_flat_state(lora)
    ]
    return graphdef, nnx.from_flat_state(cut), base


def mlp_start(run: range, config: ModelConfig) -> int:
    """Returns the number by which a run's layers differ from the rows of their MLP's stacks."""
    if config.experts is None:
        return 0
    earlier = sum(layer in config.experts.layers for layer in range(run.start))
    return run.start - earlier if run.start in config.experts.layers else earlier


def gather_run_layer(base: nnx.State, layer: jax.Array, run: range, config: ModelConfig) -> nnx.State:
    """Gathers one layer of each stack that is cut over devices; see `gather_layer`."""
    start = mlp_start(run, config)
    if start == 0:
        return gather_layer(base, layer)
    return nnx.State({name: gather_layer(part, layer - start if name == MLP else layer) for name, part in base.items()})


def _partial_adapters(block: nnx.Module, config: ModelConfig) -> dict[StatePath, tuple[int, ...]]:
    """Returns the layers of each adapter that is not on all of them, by its path in the block."""
    found = {}
    for path, node in nnx.iter_graph(block):
        if path and path[-1] == "adapter":
            layers = getattr(node, "adapted_layers", None)
            found[path] = config.layers_with(".".join(map(str, path[:-1]))) if layers is None else layers
    return {path: layers for path, layers in found.items() if len(layers) < config.num_layers}


def _first_row(layers: tuple[int, ...] | None, run: range) -> int:
    return run.start if layers is None else layers.index(run.start)


def _rows(stack: PyTree, first: int, count: int) -> PyTree:
    """Returns rows of a stack, which may be cut over devices along another axis."""
    return jax.tree.map(lambda leaf: leaf[first : first + count], stack)


def _at(module: nnx.Module, path: Sequence[object]) -> nnx.Module:
    for name in path:
        module = getattr(module, str(name))
    return module
