"""The real training step with shapes as arguments, for lowering and compiling without the device or the weights.

Nothing is allocated, so a 65B step is built as quickly as a 135M one. The functions are `training.step.gradients` and
`training.step.update` themselves. On a mesh, whose devices may be absent, shapes have the shardings of a run's arrays.

Dimension key: A accumulated micro-batches, B rows per micro-batch, T positions.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.config.schema import RouterArgs
from qlora_jax.methods.attach import abstract_parts
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.partition import ModelParts, check_fetchable, parts_specs, with_experts_on_host
from qlora_jax.models.prefetched_layers import COPIES_AT_ONCE
from qlora_jax.models.remat import REMAT_POLICIES
from qlora_jax.objectives.head_objective import head_spec
from qlora_jax.objectives.objective import Objective
from qlora_jax.objectives.router_losses import check_routers_learn, routed
from qlora_jax.objectives.sft import SUPERVISED
from qlora_jax.optim import make_optimizer
from qlora_jax.optim.optax_chain import state_specs
from qlora_jax.sharding import FSDP, ROWS, AnyMesh, axis_size, placed_shapes
from qlora_jax.training.cost.step_shape import StepShape, batch_shapes
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

DEFAULT_OPTIM, NO_ROUTER_LOSSES = OptimArgs(), RouterArgs()

AbstractLora = dict[str, dict[str, jax.ShapeDtypeStruct]]


class Program(NamedTuple):
    """A jitted function and the abstract arguments to lower it with: `function.lower(*args, **kwargs).compile()`."""

    function: jax.stages.Wrapped
    args: tuple[object, ...]
    kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSpec:
    """The settings of an optimizer step, and the step itself with shapes as arguments; no array.

    Attributes:
      batch: (A, B, T), with the rows of all devices.
      remat: a key of REMAT_POLICIES.
      paged: True if the optimizer's state is in host memory while gradients are computed.
      new_ids: ids of the new tokens, whose embedding rows train.
      packed: True if each row of a batch packs several data rows.
      branching: True if data rows have branches.
      compared: True if held-out rows are compared with the reference, whose adapter stays in host memory.
      reward_model: bytes of a model that rewards replies, which stays on the device next to the one that trains.
      neftune_noise_alpha: scale of the noise on embeddings; None: no noise.
      router: losses of a mixture's routers, which are added to the objective's.
      mesh: the devices that share the rows and the model; None: one device. Those of an AbstractMesh may be absent.
    """

    model: ModelConfig
    weights: WeightFormat
    lora: LoraArgs
    batch: tuple[int, int, int]
    optim: OptimArgs = DEFAULT_OPTIM
    remat: str = "names"
    paged: bool = False
    new_ids: tuple[int, ...] = ()
    packed: bool = False
    branching: bool = False
    compared: bool = False
    reward_model: int = 0
    neftune_noise_alpha: float | None = None
    objective: Objective = SUPERVISED
    router: RouterArgs = NO_ROUTER_LOSSES
    mesh: AnyMesh | None = None

    def replace(self, **changes: object) -> "StepSpec":
        """Returns a copy with these fields replaced."""
        return dataclasses.replace(self, **changes)

    def resized(self, rows: int, length: int) -> "StepSpec":
        """Returns a copy with B rows of T positions, and at least as many rows per optimizer step."""
        accumulated, before, _ = self.batch
        return self.replace(batch=(-(-accumulated * before // rows), rows, length))

    @property
    def devices(self) -> int:
        """The number of devices."""
        return axis_size(self.mesh, *ROWS)

    @property
    def rows(self) -> int:
        """M, the tokens per micro-batch of one device."""
        return self.batch[1] * self.batch[2] // self.devices

    @functools.cached_property
    def sizes(self) -> StepShape:
        """One device's part of the step, from which operations and bytes are computed."""
        accumulated, rows, length = self.batch
        return StepShape(
            model=self.model,
            weights=self.weights,
            lora=self.lora,
            batch=(accumulated, rows // self.devices, length),
            remat=self.remat,
            optimizer=self.optim.name,
            new_tokens=len(self.new_ids),
            packed=self.packed,
            branching=self.branching,
            objective=self.objective,
            mesh=self.mesh,
        )

    @functools.cached_property
    def arrays(self) -> "StepArrays":
        """The arguments of the step's programs.

        Raises:
          ValueError: train.remat=offload on a CPU, whose arrays are in host memory already; or losses of routers that
            the model does not have, or that nothing trains.
        """
        if REMAT_POLICIES[self.remat].on_host and self.weights.platform == "cpu":
            raise ValueError(
                f"train.remat={self.remat}: a CPU's arrays are in host memory already, so offloading saves nothing. "
                f"Set train.remat={'full' if self.remat == 'offload' else 'attention'}."
            )
        check_fetchable(self.weights, self.model)
        parts = abstract_parts(self.model, self.weights, self.lora, self.new_ids, head_spec(self.objective))
        objective = routed(self.objective, self.model, self.router)
        check_routers_learn(objective, parts)
        optimizer = make_optimizer(self.optim, TOTAL_STEPS)
        state = jax.eval_shape(optimizer.init, parts.trained)
        is_random = self.lora.dropout > 0 or self.neftune_noise_alpha is not None
        key = jax.eval_shape(lambda: jax.random.key(0)) if is_random else None
        scale = jax.ShapeDtypeStruct((), jnp.float32) if self.weights.dtype == "float16" else None
        parts = with_experts_on_host(parts, self.weights)
        if self.mesh is not None:
            specs = parts_specs(parts, self.mesh)
            state = placed_shapes(state, state_specs(optimizer, parts.trained, specs.trained), self.mesh)
            parts = placed_shapes(parts, specs, self.mesh)
            key = placed_shapes(key, jax.tree.map(lambda _: P(), key), self.mesh)
            scale = placed_shapes(scale, jax.tree.map(lambda _: P(), scale), self.mesh)
        return StepArrays(parts, key, scale, optimizer, state, objective)

    def batch_arrays(self, batch: tuple[int, int, int] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the arrays of a batch (A, B, T), by default the step's, with its rows over the mesh's devices."""
        form = {"packed": self.packed, "branching": self.branching, "mesh": self.mesh}
        return abstract_batch(batch or self.batch, self.arrays.objective, **form)

    def gradients(self, batch: tuple[int, int, int] | None = None) -> Program:
        """Returns `training.step.gradients` for batches (A, B, T), by default the step's, ready to compile."""
        of = self.arrays
        loss = {"neftune_noise_alpha": self.neftune_noise_alpha, "objective": of.objective}
        args = (of.parts, self.batch_arrays(batch), of.key, of.scale)
        return Program(gradients, args, {"remat": self.remat, "mesh": self.mesh, **loss})

    def update(self) -> Program:
        """Returns `training.step.update`, ready to compile; gradients have the shapes of the LoRA parameters."""
        of = self.arrays
        return Program(update, (of.optimizer, of.parts.trained, of.state, of.parts.trained), {"mesh": self.mesh})

    @property
    def compiler_options(self) -> dict[str, str]:
        """XLA's options for the gradients."""
        if self.weights.platform != "gpu":
            return {}
        if self.weights.experts_on_host:
            return COPIES_AT_ONCE
        return GATHER_ONCE | GATHER_AHEAD if axis_size(self.mesh, FSDP) > 1 else {}


class StepArrays(NamedTuple):
    """The arguments of a step's programs beside the batch, with ShapeDtypeStructs as leaves, and what is static.

    Fields:
      key: the key of dropout and noise; None without both.
      scale: factor of the loss in float16; None in other dtypes.
      objective: the loss, with those of routers.
    """

    parts: ModelParts
    key: jax.ShapeDtypeStruct | None
    scale: jax.ShapeDtypeStruct | None
    optimizer: optax.GradientTransformation
    state: optax.OptState
    objective: Objective


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
