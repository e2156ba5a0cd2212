"""The real training step with arguments that are shapes alone: what is compiled for a card that is not there.

Nothing is allocated, so a 65B step is made as quickly as a 135M one. The functions are `training.step.gradients` and
`training.step.update` themselves.

Dimension key: A micro-batches accumulated, B rows of a micro-batch, T positions.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.models.add_adapters import add_lora
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelParts, partition
from qlora_jax.models.trainable_embeddings import add_tables
from qlora_jax.optim import make_optimizer
from qlora_jax.training.step import gradients, update

TOTAL_STEPS = 1000  # of the schedule; it is a constant of the compiled update and changes no byte

Abstract = Any  # the pytree that training has, its leaves ShapeDtypeStructs


class Program(NamedTuple):
    """A jitted function and the abstract arguments to compile it with: `function.lower(*args, **kwargs).compile()`."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractStep:
    """What one optimizer step is given, every leaf a `jax.ShapeDtypeStruct`.

    Attributes:
      key: dropout's key, or None where there is no dropout.
      state: of the optimizer.
    """

    parts: ModelParts
    batch: dict[str, jax.ShapeDtypeStruct]
    key: jax.ShapeDtypeStruct | None
    remat: str
    optimizer: optax.GradientTransformation
    state: Abstract

    def gradients(self) -> Program:
        """`training.step.gradients`, ready to compile."""
        args = (self.parts, self.batch, self.key)
        return Program(gradients, args, {"remat": self.remat})

    def update(self) -> Program:
        """`training.step.update`, ready to compile; gradients look like the LoRA parameters."""
        return Program(update, (self.optimizer, self.parts.lora, self.state, self.parts.lora), {})


def abstract_step(
    model: ModelConfig,
    weights: WeightFormat,
    lora: LoraArgs,
    *,
    batch: tuple[int, int, int],
    new_ids: tuple[int, ...] = (),
    packed: bool = False,
    remat: str = "names",
    optim: OptimArgs | None = None,
) -> AbstractStep:
    """The step that a run with these settings takes, on the device that `weights.platform` names.

    Args:
      batch: (A, B, T).
      new_ids: of tokens whose rows train.
      packed: whether rows of the batch are packs of several.
      remat: a key of REMAT_POLICIES.
      optim: the default optimizer where it is None.

    Raises:
      ValueError: activations are to wait in host memory, and the device has no other.
    """
    if remat == "offload" and weights.platform == "cpu":
        raise ValueError(
            "train.remat=offload: a CPU's arrays are in host memory already, so nothing would be saved; set "
            "train.remat=full"
        )
    parts = jax.eval_shape(lambda: partition(_adapted(model, weights, lora, new_ids)))
    optimizer = make_optimizer(optim or OptimArgs(), TOTAL_STEPS)
    return AbstractStep(
        parts=parts,
        batch=abstract_batch(*batch, packed=packed),
        key=jax.eval_shape(lambda: jax.random.key(0)) if lora.dropout else None,
        remat=remat,
        optimizer=optimizer,
        state=jax.eval_shape(optimizer.init, parts.lora),
    )


def _adapted(config: ModelConfig, weights: WeightFormat, lora: LoraArgs, new_ids: tuple[int, ...]) -> CausalLM:
    model = CausalLM(config, weights)
    add_lora(model, lora, jax.random.key(0))
    add_tables(model, new_ids, lora)
    return model


def abstract_batch(
    accumulated: int, rows: int, length: int, *, packed: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """`inputs`, `targets` int32 and `weights` f32, and `segments` int32 where rows are packs, each [A, B, T]."""
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if packed:
        dtypes["segments"] = jnp.int32
    return {name: jax.ShapeDtypeStruct((accumulated, rows, length), dtype) for name, dtype in dtypes.items()}
