"""Runs of consecutive layers with the same adapters, for models of which only some layers have one.

Adapters are stacked over the layers that have one, so others take no memory. Each run has a separate scan, over its
part of these stacks and without the adapters that its layers lack. Dimension key: L layers.
"""

import itertools
from typing import Any

import jax
from flax import nnx

Path = tuple[Any, ...]


def layer_runs(block: nnx.Module, num_layers: int) -> list[range]:
    """Returns the runs in order; one if every adapter of the block is on all layers."""
    chosen = [frozenset(layers) for layers in _adapted_layers(block).values()]
    same = itertools.groupby(range(num_layers), key=lambda layer: [layer in layers for layers in chosen])
    runs = [list(group) for _, group in same]
    return [range(run[0], run[-1] + 1) for run in runs]


def split_run(block: nnx.Module, run: range) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns (structure, trained leaves, frozen leaves) of the block for the layers of a run.

    Trained leaves have the layers of the run, frozen leaves all L.
    """
    chosen = _adapted_layers(block)
    graphdef, lora, base = nnx.split(block, nnx.LoRAParam, ...)
    if not chosen:
        return graphdef, lora, base
    own = nnx.merge(graphdef, lora, base)
    for path, layers in chosen.items():
        if run.start not in layers:
            *linear, attribute = path
            setattr(_at(own, linear), attribute, nnx.data(None))
    graphdef, lora, base = nnx.split(own, nnx.LoRAParam, ...)
    cut = [
        (path, variable.replace(_rows(variable.get_value(), _first_row(chosen.get(path[:-1]), run), len(run))))
        for path, variable in nnx.to_flat_state(lora)
    ]
    return graphdef, nnx.from_flat_state(cut), base


def _adapted_layers(block: nnx.Module) -> dict[Path, tuple[int, ...]]:
    """Returns the layers of each adapter that is not on all of them, by its path in the block."""
    found = ((path, getattr(node, "adapted_layers", None)) for path, node in nnx.iter_graph(block))
    return {path: layers for path, layers in found if layers is not None}


def _first_row(layers: tuple[int, ...] | None, run: range) -> int:
    return run.start if layers is None else layers.index(run.start)


def _rows(stack: Any, first: int, count: int) -> Any:
    """Returns rows of a stack, which may be cut over devices along another axis."""
    return jax.tree.map(lambda leaf: leaf[first : first + count], stack)


def _at(module: nnx.Module, path: list[Any]) -> nnx.Module:
    for name in path:
        module = getattr(module, str(name))
    return module
