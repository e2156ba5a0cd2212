"""Losses of the routers of a mixture of experts, added to those of another objective.

With f_e the mean, over layers and tokens, of the choices of expert e, and p_e that of its probability:

  load balancing   aux_loss_coef E sum_e f_e p_e        (Fedus et al. 2022; transformers' load_balancing_loss_func)
  router z-loss    z_loss_coef mean logsumexp(logits)^2  (Zoph et al. 2022), over layers and tokens

Both are of the whole step: one large batch without padding, however it is split into micro-batches and over devices.

Dimension key: A micro-batches, B rows, T positions, S sparse layers, E experts.
"""

import dataclasses
import operator
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from qlora_jax.config.objectives import RowKind
from qlora_jax.config.schema import RouterArgs
from qlora_jax.data.batching.packing import Batch
from qlora_jax.models.config import ROUTER, ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelParts, combine
from qlora_jax.nn.router import SIGMOID, Routing
from qlora_jax.objectives.objective import Arrays, Objective, TokenValue, Totals, token_values

FILLED = "filled"  # batch array [A, B, 1]: positions that each row fills; the others are padding
TOKENS, COUNT = "routed tokens", "count"  # sums over a step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedOutputs:
    """The outputs of an objective for some rows, and the sums of their routing."""

    outputs: PyTree
    routing: Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """An objective with the losses of routers, whose outputs are `RoutedOutputs`.

    Without losses, the outputs are there only for metrics.

    Attributes:
      objective: the other loss.
      aux_loss_coef, z_loss_coef: factors of the two losses.
    """

    objective: Objective
    aux_loss_coef: float = 0.0
    z_loss_coef: float = 0.0

    @property
    def row_kind(self) -> RowKind:
        """Returns the kind of rows of the objective."""
        return self.objective.row_kind

    @property
    def sequences_per_row(self) -> int:
        """Returns the number of sequences per row of the objective."""
        return self.objective.sequences_per_row

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the values per row that the objective reads."""
        return self.objective.values

    @property
    def token_values(self) -> Mapping[str, TokenValue]:
        """Returns the arrays per token that the objective reads."""
        return token_values(self.objective)

    @property
    def kl_pairs(self) -> bool:
        """Returns True if the objective pairs rows for a KL estimate."""
        return self.objective.kl_pairs

    @property
    def is_coupled(self) -> bool:
        """Returns True with load balancing, because f is a mean over the step."""
        return self.objective.is_coupled or self.aux_loss_coef > 0

    def outputs(self, model: CausalLM, hidden_MD: Float[Array, "M D"], micro: Arrays) -> PyTree:
        """Returns the outputs of the objective; `step.row_outputs` adds the routing."""
        return self.objective.outputs(model, hidden_MD, micro)

    def totals(self, batch: Arrays) -> Totals:
        """Returns the totals of the objective, the number of tokens, and the count by which losses are divided."""
        own = {TOKENS: jnp.sum(batch[FILLED]).astype(jnp.float32), COUNT: self.objective.count(batch)}
        return self.objective.totals(batch) | own

    def row_losses(self, outputs: RoutedOutputs, arrays: Arrays, totals: Totals) -> Float[Array, "*AB"]:
        """Returns the losses of rows; each has its tokens' part of the routers' losses, times the step's count."""
        losses = self.objective.row_losses(outputs.outputs, arrays, totals)
        routing, tokens = outputs.routing, totals[TOKENS]
        if self.z_loss_coef > 0:
            losses = losses + totals[COUNT] * self.z_loss_coef * z_parts(routing, tokens)
        if self.aux_loss_coef > 0:
            losses = losses + totals[COUNT] * self.aux_loss_coef * load_balancing_parts(routing, tokens)
        return losses

    def count(self, batch: Arrays) -> Float[Array, ""]:
        """Returns the count that the objective divides by."""
        return self.objective.count(batch)


def routed(objective: Objective, model: ModelConfig, router: RouterArgs) -> Objective:
    """Returns the objective with the losses of a mixture's routers; unchanged for a model without experts.

    Raises:
      ValueError: losses that the model's routers do not have.
    """
    if model.experts is None:
        for name, value in dataclasses.asdict(router).items():
            if value:
                raise ValueError(f"router.{name}: found {value}, but the model has no experts. Remove it")
        return objective
    if router.aux_loss_coef and model.experts.score == SIGMOID:
        raise ValueError(
            f"router.aux_loss_coef: found {router.aux_loss_coef}, but the model's routers score experts by a sigmoid "
            "and balance them by a bias, and this loss is defined for a softmax. Remove it"
        )
    return Routed(objective=objective, aux_loss_coef=router.aux_loss_coef, z_loss_coef=router.z_loss_coef)


def check_routers_learn(objective: Objective, parts: ModelParts) -> None:
    """Raises ValueError for losses of routers that no trained parameter changes, because none is before a router."""
    if not isinstance(objective, Routed) or not objective.aux_loss_coef + objective.z_loss_coef:
        return
    model = combine(parts)
    if not any(_is_before_a_router(name, model) for name in parts.trained):
        names = [name for name in ("aux_loss_coef", "z_loss_coef") if getattr(objective, name)]
        raise ValueError(
            f"{', '.join(f'router.{name}' for name in names)}: no trained parameter is before a router (found "
            f"{', '.join(parts.trained)}), so the loss has no gradient. Remove this setting, train adapters of "
            f"attention, or set lora.target_parameters to [{model.config.hugging_face_name(ROUTER)}]"
        )


def _is_before_a_router(name: str, model: CausalLM) -> bool:
    """Returns True if trained parameters of a module change the inputs or the weights of a router."""
    experts, inner = model.config.experts, name.removeprefix("model.layers.")
    assert experts is not None, "a Routed objective has a model with experts"
    if inner == name:
        return name == "model.embed_tokens"
    layers = getattr(operator.attrgetter(f"model.layers.{inner}.adapter")(model), "adapted_layers", None)
    layers = model.config.layers_with(inner) if layers is None else layers
    last, is_behind = experts.layers[-1], inner.startswith("mlp.") and inner != ROUTER
    return any(layer < last or (layer == last and not is_behind) for layer in layers)


def step_arrays(objective: Objective, batch: Batch) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch that the compiled step reads."""
    return batch.arrays() | ({FILLED: batch.filled[..., None]} if isinstance(objective, Routed) else {})


def unrouted(outputs: PyTree) -> PyTree:
    """Returns only the outputs of the objective."""
    return outputs.outputs if isinstance(outputs, RoutedOutputs) else outputs


def counted_positions(micro: Arrays) -> Float[Array, "B T"]:
    """Returns 1 for positions that a row fills, 0 for padding."""
    length = micro["inputs"].shape[-1]
    return (jnp.arange(length, dtype=jnp.int32)[None] < micro[FILLED]).astype(jnp.float32)


def load_balancing_parts(routing: Routing, tokens: Float[Array, ""]) -> Float[Array, "*AB"]:
    """Returns each row's part of E sum_e f_e p_e, if `routing` has all rows of the step.

    Args:
      tokens: those of the step.
    """
    layers, experts = routing.counts_BSE.shape[-2:]
    f_E = jnp.sum(routing.counts_BSE.reshape(-1, experts), axis=0) / (layers * tokens)
    return experts * jnp.sum(routing.probs_BSE, axis=-2) @ f_E / (layers * tokens)


def z_parts(routing: Routing, tokens: Float[Array, ""]) -> Float[Array, "*AB"]:
    """Returns each row's part of the mean of logsumexp(logits)^2 over layers and tokens of the step."""
    return jnp.mean(routing.z_BS, axis=-1) / tokens
