"""What adapters begin with where that is a part of the weights (PiSSA, LoftQ), and the base without that part.

A run keeps it in RUN/initial.safetensors: its base is made again from the model's files and these numbers, and its
adapter can be told as a change of the model as it was.

Dimension key: L layers, K in, R rank, N out.
"""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from qlora_jax.config import LoraArgs
from qlora_jax.io.loader import Rest
from qlora_jax.io.model_source import ModelSource
from qlora_jax.io.tensor_map import layer_name
from qlora_jax.models.add_adapters import Factors, our_names, ranks_and_scalings
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.nn.linear import named_key
from qlora_jax.quant import dequantize, pissa_loftq, quantize

FILE = "initial.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initial:
    """By our names, as `partition` has LoRA parameters: {"model.layers.mlp.up_proj": {"lora_a": ..., "lora_b": ...}}.

    Attributes:
      factors: what A and B begin with.
      taken: A and B that the base is short of; empty where it is the whole weights.
    """

    factors: Factors
    taken: Factors


@dataclasses.dataclass(frozen=True)
class Target:
    """One tensor that an adapter is put on: our name of its projection, its layer, the adapter's rank and scaling."""

    name: str
    layer: int
    rank: int
    scaling: float


def targets_of(config: ModelConfig, spec: LoraArgs) -> dict[str, Target]:
    """By the name of the tensor on disk."""
    ours = our_names(config)
    found = ranks_and_scalings(list(ours), spec, config.num_layers)
    return {
        f"{layer_name(name, layer)}.weight": Target(ours[name], layer, rank, scaling)
        for name, (rank, scaling) in found.items()
        for layer in range(config.num_layers)
    }


def check_source(source: ModelSource, spec: LoraArgs) -> None:
    """Passes files whose weights can be decomposed.

    Raises:
      ValueError: they are quantized already.
    """
    if spec.init != "default" and any(entry.held for entry in source.tensors.values()):
        raise ValueError(
            f"lora.init={spec.init}: {source.path} is quantized already, and what that took from the weights is not "
            "known; give the 16-bit model, or set lora.init=default"
        )


class Splits:
    """Splits tensors as they are loaded, and remembers what was taken.

    Args:
      weights: how the rest will be held, which LoftQ asks.
    """

    def __init__(self, config: ModelConfig, weights: WeightFormat, spec: LoraArgs, key: jax.Array):
        self._targets, self._spec, self._key, self._layers = targets_of(config, spec), spec, key, config.num_layers
        self._split = pissa_loftq.pissa
        if spec.init == "loftq":
            held = functools.partial(_held, weights=weights)
            self._split = functools.partial(pissa_loftq.loftq, iterations=spec.loftq_iterations, held=held)
        self._initial: dict[str, dict[str, np.ndarray]] = {}
        self._taken: dict[str, dict[str, np.ndarray]] = {}

    def __call__(self, name: str, weight: np.ndarray) -> np.ndarray:
        """The rest of a tensor; the tensor itself where it has no adapter."""
        if name not in self._targets:
            return weight
        target, spec = self._targets[name], self._spec
        key = named_key(self._key, name)
        how = pissa_loftq.Decomposition(target.rank, target.scaling, spec.svd_niter, spec.dtype, key)
        split = self._split(weight.astype(np.float32), how)
        self._remember(self._initial, target, split.initial)
        if split.taken is not None and split.taken is not split.initial:
            self._remember(self._taken, target, split.taken)
        return split.rest

    def _remember(self, stacks: dict[str, dict[str, np.ndarray]], target: Target, factors: pissa_loftq.Factors) -> None:
        for leaf, values in factors._asdict().items():
            stack = stacks.setdefault(target.name, {}).setdefault(leaf, np.zeros((self._layers, *values.shape), "f4"))
            stack[target.layer] = values

    def initial(self) -> Initial:
        """Of all tensors, when they have been loaded."""
        pissa = self._spec.init == "pissa"
        return Initial(factors=self._initial, taken=self._initial if pissa else self._taken)


def _held(weight: np.ndarray, weights: WeightFormat) -> jax.Array:
    settings = {name: getattr(weights, name) for name in ("block_size", "double_quant", "nested_block_size")}
    return dequantize(quantize(weight, quant_type=str(weights.quant_type), **settings), np.float32)


def rest_by(initial: Initial, config: ModelConfig, spec: LoraArgs) -> Rest:
    """The same rests again, to the bit."""
    targets = targets_of(config, spec)

    def rest(name: str, weight: np.ndarray) -> np.ndarray:
        target = targets.get(name)
        if target is None or target.name not in initial.taken:
            return weight
        taken = initial.taken[target.name]
        a_KR, b_RN = (np.asarray(taken[leaf][target.layer]) for leaf in ("lora_a", "lora_b"))
        return pissa_loftq.without(weight.astype(np.float32), pissa_loftq.Factors(a_KR, b_RN), target.scaling)

    return rest


def write_initial(run: Path, initial: Initial) -> None:
    """RUN/initial.safetensors, whole or not at all."""
    tensors = {
        f"{kind}/{name}/{leaf}": np.ascontiguousarray(values)
        for kind, factors in (("factors", initial.factors), ("taken", initial.taken))
        for name, leaves in factors.items()
        for leaf, values in leaves.items()
        if kind == "factors" or factors is not initial.factors
    }
    partial = run / f"{FILE}.partial"
    save_file(tensors, partial)
    os.replace(partial, run / FILE)


def read_initial(run: Path, spec: LoraArgs) -> Initial | None:
    """What a run's adapters began with; None where that is no part of the weights.

    Raises:
      ValueError: the file is not there.
    """
    if spec.init == "default":
        return None
    if not (run / FILE).is_file():
        raise ValueError(
            f"{run / FILE} is not there, and without it the base of a run with lora.init={spec.init} can't be made "
            "again: copy it from where the run was trained"
        )
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {"factors": {}, "taken": {}}
    for key, values in load_file(run / FILE).items():
        kind, name, leaf = key.split("/")
        found[kind].setdefault(name, {})[leaf] = values
    return Initial(factors=found["factors"], taken=found["factors"] if spec.init == "pissa" else found["taken"])
