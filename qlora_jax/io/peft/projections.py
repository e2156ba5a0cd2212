"""The frozen A and B of a VeRA adapter in PEFT's files.

Dimension key: K in, N out, R rank; K and N are the largest of the adapter's projections.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qlora_jax.config import LoraArgs
from qlora_jax.io.peft.config import AdapterConfig
from qlora_jax.io.peft.stacks import check_fits
from qlora_jax.methods.vera import Projections, largest_shape, vera_projections
from qlora_jax.model_source import TensorEntry
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.partition import AdapterArrays

NAMES = ("base_model.vera_A", "base_model.vera_B")


def projection_tensors(projections: Projections) -> dict[str, np.ndarray]:
    """The tensors of A [R, K] and B [N, R], which an adapter has once."""
    return dict(zip(NAMES, projections, strict=True))


def read_projections(
    folder: Path,
    config: AdapterConfig,
    entries: Sequence[TensorEntry],
    lora: AdapterArrays,
    args: LoraArgs,
    model: ModelConfig,
) -> Projections | None:
    """Reads A and B; None if they equal, to the bit, those that `vera_projections` draws for the adapter's settings.

    An adapter without them (save_projection=false) has the drawn ones, as in PEFT.

    Raises:
      ValueError: one of them is missing or too small for the model, or a rank differs; all problems are named.
    """
    found = {entry.name: entry for entry in entries if entry.name in NAMES}
    ranks = {name: leaves["lambda_d"].shape[-1] for name, leaves in lora.items()}
    problems = [f"{name}: rank {rank}, expected r={args.rank}" for name, rank in ranks.items() if rank != args.rank]
    if found or config.get("save_projection", True):
        n, k = largest_shape(model, args)
        problems += _problems(found, {NAMES[0]: (args.rank, k), NAMES[1]: (n, args.rank)}, args.rank)
    check_fits(folder, problems)
    if not found:
        return None
    own = Projections(*(np.asarray(found[name].read(), np.float32) for name in NAMES))
    return None if all(map(np.array_equal, own, vera_projections(model, args))) else own


def _problems(found: Mapping[str, TensorEntry], least: Mapping[str, tuple[int, int]], rank: int) -> list[str]:
    """Describes the tensors that are missing or smaller than `least`, or have another rank."""
    problems = []
    for rank_axis, (name, (rows, columns)) in enumerate(least.items()):
        shape = found[name].shape if name in found else None
        if shape is None:
            problems.append(f"{name} is missing")
        elif len(shape) != 2 or shape[rank_axis] != rank or shape[0] < rows or shape[1] < columns:
            problems.append(f"{name}: shape {list(shape)}, expected at least {[rows, columns]}, of rank {rank}")
    return problems
