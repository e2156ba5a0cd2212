"""The optimizer's state of LoRA-FA, for B only. B's gradients are corrected between their norm and the update."""

from collections.abc import Mapping

import jax
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qlora_jax.methods.lora_fa import LoRAFA
from qlora_jax.models.model_sharding import lora_specs
from qlora_jax.models.partition import Lora, join_leaves, split_leaves
from qlora_jax.optim.apply_updates import in_f32
from qlora_jax.optim.clipping import global_norm
from qlora_jax.optim.lora_fa import correct, correction
from qlora_jax.optim.page_pool import Transfers
from qlora_jax.sharding import named
from qlora_jax.training.abstract_step import AbstractLora
from qlora_jax.training.metrics.metrics_file import Record
from qlora_jax.training.optimizer_state import OptimizerState, OptimizerStateManager, UpdateResult
from qlora_jax.training.paging_budget import Workload


class LoraFAStateManager(OptimizerStateManager):
    """Updates B through another manager, which does not know A.

    The norm, by which gradients are clipped, is that of the gradients before the correction. So it is as if PEFT's
    optimizer followed `clip_grad_norm_`.

    Args:
      inner: the manager of B and of other trained leaves.
      scalings: the scaling of each module's adapter, by our names.
      trained: the shapes of the trained leaves.
      mesh: the devices that A and B are on; None: one device.
    """

    def __init__(
        self, inner: OptimizerStateManager, scalings: Mapping[str, float], trained: AbstractLora, mesh: Mesh | None
    ):
        self._inner, self._scalings = inner, dict(scalings)
        whole = None if mesh is None else named(mesh, P())
        cut = None if mesh is None else (named(mesh, lora_specs(trained, mesh)), whole)
        self._compute = jax.jit(self._corrections, out_shardings=whole)
        self._correct = jax.jit(_norm_and_correct, donate_argnums=0, out_shardings=cut)
        self._computed: dict[str, jax.Array] | None = None  # once, because A never changes

    def _corrections(self, fixed: Lora) -> dict[str, jax.Array]:
        return {name: correction(leaves["lora_a"], self._scalings[name]) for name, leaves in fixed.items()}

    def init(self, lora: Lora) -> OptimizerState:
        return self._inner.init(_split(lora)[0])

    def make_room(self, state: OptimizerState, work: Workload) -> tuple[OptimizerState, int, Transfers]:
        return self._inner.make_room(state, work)

    def update(
        self, lora: Lora, state: OptimizerState, grads: Lora, room: int, norm: jax.Array | None = None
    ) -> UpdateResult:
        trained, fixed = _split(lora)
        if self._computed is None:
            self._computed = self._compute(fixed)
        grads, own_norm = self._correct(grads, self._computed)
        trained, state, norm, moved = self._inner.update(
            trained, state, grads, room, own_norm if norm is None else norm
        )
        return join_leaves(trained, fixed), state, norm, moved

    def metrics(self, state: OptimizerState, moved: Transfers) -> Record:
        return self._inner.metrics(state, moved)

    def to_checkpoint(self, state: OptimizerState) -> optax.OptState:
        return self._inner.to_checkpoint(state)

    def checkpoint_template(self, lora: Lora) -> optax.OptState:
        return self._inner.checkpoint_template(_split(lora)[0])

    def from_checkpoint(self, tree: optax.OptState) -> OptimizerState:
        return self._inner.from_checkpoint(tree)

    def describe(self) -> str:
        return self._inner.describe()


def _split(lora: Lora) -> tuple[Lora, Lora]:
    return split_leaves(lora, [leaf.name for leaf in LoRAFA.LEAVES if not leaf.trained])


def _norm_and_correct(grads: Lora, corrections: dict[str, jax.Array]) -> tuple[Lora, jax.Array]:
    return correct(grads, corrections), global_norm(in_f32(grads))
