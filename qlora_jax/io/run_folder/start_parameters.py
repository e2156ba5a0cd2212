"""The parameters that a run starts with, from which reference log-probabilities and rewards are computed.

RUN/start.safetensors stores those of a model in memory. Other runs compute them again from their settings.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import jax
import numpy as np

from qlora_jax.config.methods import METHODS
from qlora_jax.io.digests import json_digest, tree_digests, whole
from qlora_jax.io.initial_file import read_tensors, write_tensors
from qlora_jax.models.partition import AdapterArrays, Lora

FILE = "start.safetensors"
STATE_KEY = "initial_adapter"  # key of the digest of the run's initial parameters, in a checkpoint's JSON


def start_digest(lora: AdapterArrays | Lora) -> str:
    """Returns the digest of the parameters that change the model; that of no arrays if none does.

    A low-rank adapter whose B is 0 changes nothing, whatever its A, so that runs of all seeds share it. All processes
    of a run call this together.
    """
    return json_digest(tree_digests({name: _effective(leaves) for name, leaves in sorted(lora.items())}))


NO_CHANGE = start_digest({})


def _effective(leaves: Mapping[str, jax.Array | np.ndarray]) -> dict[str, jax.Array | np.ndarray]:
    """Returns the leaves of a module that change its output."""
    off = {
        name
        for switch, switched in dict.fromkeys((declared.switches, declared.switched) for _, declared in METHODS.items())
        if switch and leaves.keys() >= {*switch} and not any(np.any(np.asarray(whole(leaves[name]))) for name in switch)
        for name in switched
    }
    return {name: leaf for name, leaf in leaves.items() if name not in off}


def write_start(run: Path, lora: AdapterArrays) -> None:
    """Writes RUN/start.safetensors with the digests of its tensors, completely or not at all."""
    tensors = {f"{name}/{leaf}": np.asarray(array) for name, leaves in lora.items() for leaf, array in leaves.items()}
    write_tensors(run / FILE, tensors)


def read_start(run: Path) -> AdapterArrays | None:
    """Reads the parameters that a run started with; None if it has not stored them.

    Raises:
      ValueError: the file is damaged.
    """
    path = run / FILE
    if not path.is_file():
        return None
    tree: dict[str, dict[str, np.ndarray]] = {}
    for key, values in read_tensors(path).items():
        name, _, leaf = key.rpartition("/")
        tree.setdefault(name, {})[leaf] = values
    return cast(AdapterArrays, tree)
