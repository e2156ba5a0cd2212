"""RUN/initial.safetensors: an adapter that started with a part of the weights (PiSSA, LoftQ).

With it, the base is rebuilt from the model's files, and the trained adapter can be exported as a change of the original
model. `write_tensors` and `read_tensors` are for other arrays of a run, too.

Dimension key: L layers, K in, R rank, N out.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qlora_jax.atomic_files import write_bytes
from qlora_jax.config import LoraArgs
from qlora_jax.io.digests import ArrayDigest, array_digest, changes, tree_digests
from qlora_jax.line_digests import warn_without_digests
from qlora_jax.methods.method import Factors
from qlora_jax.untrusted_json import decode_json

FILE = "initial.safetensors"
FACTORS, SUBTRACTED = "factors", "taken"  # the first parts of names in the file
LEAVES = ("lora_a", "lora_b")  # the last parts
DIGESTS = "digests"  # the key of the tensors' digests in the file's metadata
COPY_IT = "Copy the file from where the run was trained, or from a backup"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialAdapter:
    """Initial A and B by our names: {"model.layers.mlp.up_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}}.

    Attributes:
      factors: the initial values of A and B.
      subtracted: the A and B whose scaled product was subtracted from the base; empty if the base is unchanged.
    """

    factors: Factors
    subtracted: Factors


def write_initial(run: Path, initial: InitialAdapter) -> None:
    """Writes RUN/initial.safetensors with the digests of its tensors, completely or not at all."""
    tensors = {
        f"{kind}/{name}/{leaf}": values
        for kind, factors in ((FACTORS, initial.factors), (SUBTRACTED, initial.subtracted))
        for name, leaves in factors.items()
        for leaf, values in leaves.items()
        if kind == FACTORS or factors is not initial.factors
    }
    write_tensors(run / FILE, tensors)


def write_tensors(path: Path, tensors: Mapping[str, jax.Array | np.ndarray]) -> None:
    """Writes a safetensors file with the digests of its tensors, completely or not at all."""
    found = {name: np.ascontiguousarray(np.asarray(values)) for name, values in tensors.items()}
    digests = {name: array_digest(values) for name, values in found.items()}
    write_bytes(path, save(found, {DIGESTS: json.dumps(digests)}))


def read_initial(run: Path, spec: LoraArgs) -> InitialAdapter | None:
    """Reads the initial adapter of a run; None if the run's adapters did not start with a part of the weights.

    Raises:
      ValueError: the file is missing or damaged.
    """
    if spec.init == "default":
        return None
    path = run / FILE
    if not path.is_file():
        raise ValueError(
            f"{path}: missing, and the base of a run with lora.init={spec.init} cannot be rebuilt without it. {COPY_IT}"
        )
    tensors = read_tensors(path)
    found = {FACTORS: _tree(path, tensors, FACTORS), SUBTRACTED: _tree(path, tensors, SUBTRACTED)}
    subtracted = found[FACTORS] if spec.init == "pissa" else found[SUBTRACTED]
    return InitialAdapter(factors=found[FACTORS], subtracted=subtracted)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads a file of `write_tensors` in a run's folder.

    Raises:
      ValueError: the file is damaged.
    """
    tensors, digests = _read_file(path)
    if digests is None:
        warn_without_digests(path.parent)
    elif differences := changes(tree_digests(tensors), digests):
        raise ValueError("\n  ".join([f"{path}: damaged, these tensors are not as saved. {COPY_IT}:", *differences]))
    return tensors


def _read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, ArrayDigest] | None]:
    """Reads (the tensors, their digests); None for a file from before there were digests.

    Raises:
      ValueError: it is not a safetensors file, or is cut off.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
        digests = decode_json(metadata[DIGESTS], dict[str, ArrayDigest], DIGESTS) if DIGESTS in metadata else None
    except (SafetensorError, TypeError, ValueError) as error:  # TypeError: of a dtype that NumPy does not have
        raise ValueError(f"{path}: damaged: {error}. {COPY_IT}") from error
    return tensors, digests


def _tree(path: Path, tensors: Mapping[str, np.ndarray], kind: str) -> Factors:
    """Returns the A and B of one kind by our names."""
    tree: dict[str, dict[str, np.ndarray]] = {}
    for key, values in tensors.items():
        start, _, rest = key.partition("/")
        name, _, leaf = rest.rpartition("/")
        if start not in (FACTORS, SUBTRACTED) or leaf not in LEAVES:
            raise ValueError(f"{path}: damaged: {key!r} is not the name of an initial tensor. {COPY_IT}")
        if start == kind:
            tree.setdefault(name, {})[leaf] = values
    return tree
