"""The real training step with shapes as arguments, for lowering and compiling without the device or the weights.

Nothing is allocated, so a 65B step is built as quickly as a 135M one. The functions are `training.step.gradients` and
`training.step.update` themselves. On a mesh, whose devices may be absent, shapes have the shardings of a run's arrays.

Dimension key: A accumulated micro-batches, B rows per micro-batch, T positions.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.config.schema import RouterArgs
from qlora_jax.methods.attach import abstract_parts
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.partition import ModelParts, check_fetchable, parts_specs, with_experts_on_host
from qlora_jax.models.prefetched_layers import COPIES_AT_ONCE
from qlora_jax.objectives.head_objective import head_spec
from qlora_jax.objectives.objective import Objective
from qlora_jax.objectives.router_losses import check_routers_learn, routed
from qlora_jax.objectives.sft import SUPERVISED
from qlora_jax.optim import make_optimizer
from qlora_jax.optim.optax_chain import state_specs
from qlora_jax.sharding import FSDP, ROWS, AnyMesh, axis_size, placed_shapes
from qlora_jax.training.batch_shapes import batch_shapes
from qlora_jax.training.step import gradients, update

TOTAL_STEPS = 1000  # the schedule's length: a constant in the compiled update, without effect on its memory
# Near the card's limit, XLA's rematerialization would gather layers once more to save little memory.
GATHER_ONCE = {"xla_disable_hlo_passes": "rematerialization"}
# XLA would merge most gathers of a layer into two, which end before its first product, and on some cards hide none.
# Smaller ones hide behind products if several may start ahead. They run in order on one stream, because NCCL may
# deadlock with several.
GATHER_AHEAD = {
    "xla_gpu_enable_latency_hiding_scheduler": "True",
    "xla_gpu_all_gather_combine_threshold_bytes": str(4 * 2**20),
    "xla_gpu_experimental_parallel_collective_overlap_limit": "4",
    "xla_gpu_experimental_enable_collective_multi_streaming": "False",
}

AbstractLora = dict[str, dict[str, jax.ShapeDtypeStruct]]


class Program(NamedTuple):
    """A jitted function and the abstract arguments to lower it with: `function.lower(*args, **kwargs).compile()`."""

    function: jax.stages.Wrapped
    args: tuple[object, ...]
    kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractStep:
    """The arguments of one optimizer step, with `jax.ShapeDtypeStruct`s as leaves.

    Attributes:
      key: the key of dropout and noise; None without both.
      remat: a key of REMAT_POLICIES.
      state: the optimizer's state.
      neftune_noise_alpha: scale of the noise on embeddings; None: no noise.
      packed, branching: the structure of rows; see `batch_shapes`.
      mesh: the devices that share the rows and the model; None: one device.
      compiler_options: XLA's options for the gradients.
    """

    parts: ModelParts
    batch: dict[str, jax.ShapeDtypeStruct]
    key: jax.ShapeDtypeStruct | None
    remat: str
    optimizer: optax.GradientTransformation
    state: optax.OptState
    neftune_noise_alpha: float | None = None
    objective: Objective = SUPERVISED
    packed: bool = False
    branching: bool = False
    mesh: AnyMesh | None = None
    compiler_options: dict[str, str] = dataclasses.field(default_factory=dict)

    def gradients(self) -> Program:
        """Returns `training.step.gradients`, ready to compile."""
        args = (self.parts, self.batch, self.key)
        loss = {"neftune_noise_alpha": self.neftune_noise_alpha, "objective": self.objective}
        return Program(gradients, args, {"remat": self.remat, "mesh": self.mesh, **loss})

    def with_batch(self, batch: tuple[int, int, int]) -> "AbstractStep":
        """Returns the same step for batches (A, B, T)."""
        form = {"packed": self.packed, "branching": self.branching}
        return dataclasses.replace(self, batch=abstract_batch(batch, self.objective, mesh=self.mesh, **form))

    def update(self) -> Program:
        """Returns `training.step.update`, ready to compile; gradients have the shapes of the LoRA parameters."""
        trained = self.parts.trained
        return Program(update, (self.optimizer, trained, self.state, trained), {"mesh": self.mesh})


def abstract_step(
    model: ModelConfig,
    weights: WeightFormat,
    lora: LoraArgs,
    *,
    batch: tuple[int, int, int],
    new_ids: tuple[int, ...] = (),
    packed: bool = False,
    branching: bool = False,
    remat: str = "names",
    optim: OptimArgs | None = None,
    neftune_noise_alpha: float | None = None,
    objective: Objective = SUPERVISED,
    router: RouterArgs | None = None,
    mesh: AnyMesh | None = None,
) -> AbstractStep:
    """Builds the step of a run with these settings, for the platform `weights.platform`.

    Args:
      batch: (A, B, T), with the rows of all devices.
      new_ids: ids of the new tokens, whose embedding rows train.
      packed: True if each row of a batch packs several data rows.
      branching: True if data rows have branches.
      remat: a key of REMAT_POLICIES.
      optim: the optimizer's settings; None: the defaults.
      neftune_noise_alpha: scale of the noise on embeddings; None: no noise.
      objective: the loss.
      router: losses of a mixture's routers, which are added to it; None: no such losses.
      mesh: the devices; None: one device. Those of an AbstractMesh need not be present.

    Raises:
      ValueError: train.remat=offload on a CPU, whose arrays are in host memory already; or losses of routers that the
        model does not have, or that nothing trains.
    """
    if remat == "offload" and weights.platform == "cpu":
        raise ValueError(
            "train.remat=offload: a CPU's arrays are in host memory already, so offloading saves nothing. Set "
            "train.remat=full."
        )
    check_fetchable(weights, model)
    parts = abstract_parts(model, weights, lora, new_ids, head_spec(objective))
    objective = routed(objective, model, router or RouterArgs())
    check_routers_learn(objective, parts)
    optimizer = make_optimizer(optim or OptimArgs(), TOTAL_STEPS)
    state = jax.eval_shape(optimizer.init, parts.trained)
    is_random = lora.dropout > 0 or neftune_noise_alpha is not None
    key = jax.eval_shape(lambda: jax.random.key(0)) if is_random else None
    parts = with_experts_on_host(parts, weights)
    if mesh is not None:
        specs = parts_specs(parts, mesh)
        state = placed_shapes(state, state_specs(optimizer, parts.trained, specs.trained), mesh)
        parts, key = placed_shapes(parts, specs, mesh), placed_shapes(key, jax.tree.map(lambda _: P(), key), mesh)
    return AbstractStep(
        parts=parts,
        batch=abstract_batch(batch, objective, packed=packed, branching=branching, mesh=mesh),
        key=key,
        remat=remat,
        optimizer=optimizer,
        state=state,
        neftune_noise_alpha=neftune_noise_alpha,
        objective=objective,
        packed=packed,
        branching=branching,
        mesh=mesh,
        compiler_options=_compiler_options(weights, mesh),
    )


def _compiler_options(weights: WeightFormat, mesh: AnyMesh | None) -> dict[str, str]:
    if weights.platform != "gpu":
        return {}
    if weights.experts_on_host:
        return COPIES_AT_ONCE
    return GATHER_ONCE | GATHER_AHEAD if axis_size(mesh, FSDP) > 1 else {}


def abstract_batch(
    batch: tuple[int, int, int],
    objective: Objective = SUPERVISED,
    *,
    packed: bool = False,
    branching: bool = False,
    mesh: AnyMesh | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arrays of a batch (A, B, T), with their rows over the devices of the mesh."""
    sharding = None if mesh is None else NamedSharding(mesh, P(None, ROWS))
    shapes = batch_shapes(batch, objective, packed=packed, branching=branching)
    return {name: jax.ShapeDtypeStruct(*each, sharding=sharding) for name, each in shapes.items()}
