"""Prepares a model for training by the method that its settings name."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from qlora_jax.config import LoraArgs
from qlora_jax.methods.merge_into import multiply_by_codes
from qlora_jax.methods.method import Factors, Given, method_of
from qlora_jax.methods.peft_form import NO_ARRAYS
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelParts, partition
from qlora_jax.models.trainable_embeddings import add_tables
from qlora_jax.nn.sequence_head import HeadSpec


def attach_method(
    model: CausalLM,
    spec: LoraArgs,
    key: jax.Array,
    initial: Factors | None = None,
    mesh: Mesh | None = None,
    frozen: Mapping[str, np.ndarray] = NO_ARRAYS,
) -> None:
    """Adds adapters to the targeted projections and parameters of `model`, in place; they change nothing until trained.

    With the methods `full`, `ln_tuning` and `bitfit`, weights of the model become trainable instead. The initial values
    of an adapter depend on `key` and its name only, not on the other targets or on the mesh.

    Args:
      spec: the `lora` section of a config.
      key: draws A.
      initial: initial A and B in place of drawn ones (`lora.init`), in the form of `ModelParts.lora`.
      mesh: devices that the weights, A and B are cut over; each draws its part of A and B. None for the
        default device.
      frozen: arrays in place of those of `Method.frozen_arrays`, which the method adds to the base.

    Raises:
      ValueError: a pattern that matches nothing, some layers of a stack with a method that requires all, a rank below
        1, blocks that do not divide a projection's inputs, 4-bit weights or experts with the method `full`, a model
        without a bias with `bitfit`, or adapters that `lora.merge_into` cannot hold.
    """
    method_of(spec.method).attach(model, spec, Given(key=key, initial=initial, frozen=frozen, mesh=mesh))
    if spec.merge_into is not None:
        multiply_by_codes(model, spec)


def abstract_parts(
    config: ModelConfig, weights: WeightFormat, spec: LoraArgs, new_ids: tuple[int, ...], head: HeadSpec | None
) -> ModelParts:
    """Returns the parts of a model with its adapters, tables and head, as ShapeDtypeStructs.

    Args:
      new_ids: ids of the new tokens, whose rows train.
      head: the sequence head, if there is one.

    Raises:
      ValueError: as `attach_method`.
    """

    def parts() -> ModelParts:
        model, key = CausalLM(config, weights), jax.random.key(0)
        attach_method(model, spec, key)
        if head is not None:
            model.add_sequence_head(head, key)
        add_tables(model, new_ids, spec)
        return partition(model)

    return jax.eval_shape(parts)


def check_targets(config: ModelConfig, spec: LoraArgs) -> None:
    """Raises ValueError, as `attach_method` would, if the settings name layers that a model does not have."""
    method_of(spec.method).targets(config, spec)
