"""Objectives with labels: one class, several labels at once, or a number; the losses are those of transformers.

Dimension key: B rows, S slots, C classes or labels.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.objectives.head_objective import LabelledObjective
from qlora_jax.objectives.objective import LABELS, Arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(LabelledObjective):
    """The cross-entropy of one class; labels [B, S] are indices of classes."""

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the labels."""
        return {LABELS: ()}

    def sequence_losses(self, outputs: Float[Array, "*B S C"], arrays: Arrays) -> Float[Array, "*B S"]:
        """Returns -log p(class)."""
        is_class = jax.nn.one_hot(arrays[LABELS].astype(jnp.int32), outputs.shape[-1])
        return -jnp.sum(jax.nn.log_softmax(outputs) * is_class, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiLabel(LabelledObjective):
    """The mean binary cross-entropy of C labels; labels [B, S, C] are 1 for those that apply, else 0."""

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the labels."""
        return {LABELS: (self.head.outputs,)}

    def sequence_losses(self, outputs: Float[Array, "*B S C"], arrays: Arrays) -> Float[Array, "*B S"]:
        """Returns the mean over labels of -y log s(x) - (1 - y) log s(-x)."""
        applies = arrays[LABELS]
        return jnp.mean(-applies * jax.nn.log_sigmoid(outputs) - (1 - applies) * jax.nn.log_sigmoid(-outputs), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression(LabelledObjective):
    """The squared error of one number; labels [B, S] are the numbers."""

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the labels."""
        return {LABELS: ()}

    def sequence_losses(self, outputs: Float[Array, "*B S C"], arrays: Arrays) -> Float[Array, "*B S"]:
        """Returns the squared difference."""
        return (outputs[..., 0] - arrays[LABELS]) ** 2
