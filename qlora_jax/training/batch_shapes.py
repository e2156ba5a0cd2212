"""Shapes of the arrays of a batch, which `Batch.arrays` fills and the compiled step takes.

Dimension key: A accumulated micro-batches, B rows per micro-batch, T positions, S slots.
"""

from typing import Literal

from qlora_jax.data.batching.batches import PRESENT
from qlora_jax.data.batching.packing import slot_count
from qlora_jax.objectives.objective import Objective
from qlora_jax.objectives.router_losses import FILLED, Routed

Shape = tuple[int, ...]
Dtype = Literal["int32", "float32"]


def batch_shapes(
    batch: tuple[int, int, int], objective: Objective, *, packed: bool, branching: bool
) -> dict[str, tuple[Shape, Dtype]]:
    """Returns the shape and dtype of each array; all elements have 4 bytes.

    Args:
      batch: (A, B, T).
      packed: True if each row of a batch packs several data rows.
      branching: True if data rows have branches.
    """
    found: dict[str, tuple[Shape, Dtype]] = {name: (batch, "int32") for name in ("inputs", "targets")}
    found["weights"] = batch, "float32"
    if isinstance(objective, Routed):
        found[FILLED] = (*batch[:2], 1), "int32"
    found |= {name: (batch, "int32") for name in _structure(objective, packed=packed, branching=branching)}
    if not objective.sequences_per_row:
        return found
    slots = slot_count(batch[2], packed=packed, sequences=objective.sequences_per_row)
    for name, inner in {PRESENT: (), **objective.values}.items():
        found[name] = (*batch[:2], slots, *inner), "float32"
    return found


def _structure(objective: Objective, *, packed: bool, branching: bool) -> list[str]:
    """Returns the names of the arrays that divide rows into segments and sequences."""
    names = ["segments"] if packed or branching else []
    names += ["parents", "depths"] if branching else []
    return [*names, "sequences"] if objective.sequences_per_row else names
