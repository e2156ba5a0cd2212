"""The optimizer's state of a method that corrects gradients between their norm and the update."""

import jax
import optax
from jax.sharding import PartitionSpec as P

from qlora_jax.methods.method import Correction
from qlora_jax.models.partition import Lora, join_leaves, lora_specs, split_leaves
from qlora_jax.optim.page_pool import Transfers
from qlora_jax.optim.updates import global_norm, in_f32
from qlora_jax.sharding import named
from qlora_jax.training.compiled_step import CompiledGradients
from qlora_jax.training.metrics.metrics_file import Record
from qlora_jax.training.optimizer_state import OptimizerState, OptimizerStateManager, UpdateResult
from qlora_jax.training.paging_budget import Workload


class CorrectedStateManager(OptimizerStateManager):
    """Updates the trained leaves through another manager, which does not know those that stay fixed.

    The norm, by which gradients are clipped, is that of the gradients before the correction. So it is as if the
    method's optimizer followed PyTorch's `clip_grad_norm_`.

    Args:
      inner: the manager of the trained leaves.
      gradients: the run's gradients, by whose shapes and mesh the results are placed.
    """

    def __init__(self, inner: OptimizerStateManager, correction: Correction, gradients: CompiledGradients):
        self._inner, self._untrained, mesh = inner, gradients.parts.untrained, gradients.mesh
        whole = None if mesh is None else named(mesh, P())
        cut = None if mesh is None else (named(mesh, lora_specs(gradients.trained, mesh)), whole)

        def norm_and_correct(grads: Lora, computed: dict[str, jax.Array]) -> tuple[Lora, jax.Array]:
            return correction.apply(grads, computed), global_norm(in_f32(grads))

        self._compute = jax.jit(correction.compute, out_shardings=whole)
        self._correct = jax.jit(norm_and_correct, donate_argnums=0, out_shardings=cut)
        self._computed: dict[str, jax.Array] | None = None  # once, because fixed leaves never change

    def _split(self, lora: Lora) -> tuple[Lora, Lora]:
        return split_leaves(lora, self._untrained)

    def init(self, lora: Lora) -> OptimizerState:
        return self._inner.init(self._split(lora)[0])

    def make_room(self, state: OptimizerState, work: Workload) -> tuple[OptimizerState, int, Transfers]:
        return self._inner.make_room(state, work)

    def update(
        self, lora: Lora, state: OptimizerState, grads: Lora, room: int, norm: jax.Array | None = None
    ) -> UpdateResult:
        trained, fixed = self._split(lora)
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
        return self._inner.checkpoint_template(self._split(lora)[0])

    def from_checkpoint(self, tree: optax.OptState) -> OptimizerState:
        return self._inner.from_checkpoint(tree)

    def describe(self) -> str:
        return self._inner.describe()
