"""One optimizer step, as two compiled functions: gradients of the accumulated loss, and the update; and forward passes.

The two are separate so that an update can be paged, and so that a new length bucket compiles the gradients only.

Dimension key: A accumulated micro-batches, B rows per micro-batch, T positions, M = B T, D embed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from pallas_kernels.attention.branching import Branching
from qlora_jax.inference.mesh_inference import run_on_mesh
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import (
    Lora,
    ModelFunction,
    ModelParts,
    combine,
    join_leaves,
    lora_specs,
    parts_specs,
    split_leaves,
)
from qlora_jax.nn.random_keys import fold_in_rows
from qlora_jax.objectives.objective import Objective, Totals, read_by_losses
from qlora_jax.objectives.router_losses import Routed, RoutedOutputs, counted_positions
from qlora_jax.objectives.sequences import ComparedLogps, compared_logps
from qlora_jax.objectives.sft import SUPERVISED
from qlora_jax.optim.optax_chain import state_specs
from qlora_jax.optim.updates import apply_updates, global_norm, in_f32
from qlora_jax.sharding import DATA, ROWS, AnyMesh, cut_axis, gather_rows, own_rows, shards_of, sum_over

# Clips each leaf just before its update. The default order on CPUs clips all first, which holds the gradients twice.
LEAF_BY_LEAF = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

PLACES = "places"  # batch array [A, B]: each row's place in its step, for dropout or noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLoss:
    """The losses of one step.

    Attributes:
      total: the sum over all rows; the loss is total / count.
      count: the number of tokens, sequences or pairs that the objective averages over.
      row_losses_AB: the sum of each row.
      outputs: the objective's outputs for all rows, with leaves [A, B, ...]; None if they are the losses themselves.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]
    row_losses_AB: Float[Array, "A B"]
    outputs: PyTree = None


def row_nll(
    model: CausalLM,
    micro: dict[str, jax.Array],
    *,
    remat: str,
    keys_B: jax.Array | None,
    neftune_noise_alpha: float | None = None,
) -> Float[Array, " B"]:
    """Returns each row's sum over its tokens of weight * -log p(target), in f32; the arguments of `row_outputs`."""
    return row_outputs(SUPERVISED, model, micro, remat=remat, keys_B=keys_B, neftune_noise_alpha=neftune_noise_alpha)


def row_outputs(
    objective: Objective,
    model: CausalLM,
    micro: dict[str, jax.Array],
    *,
    remat: str,
    keys_B: jax.Array | None,
    neftune_noise_alpha: float | None = None,
) -> PyTree:
    """Returns the objective's outputs for the rows of a micro-batch, with leaves [B, ...].

    Args:
      micro: one micro-batch: `inputs`, `targets`, `weights`, each [B, T], and what `Batch.arrays` adds to them.
      remat: a key of REMAT_POLICIES.
      keys_B: the key of each row; None without dropout and noise.
      neftune_noise_alpha: scale of the noise on embeddings; None: no noise.
    """
    how = {"remat": remat, "keys_B": keys_B, "neftune_noise_alpha": neftune_noise_alpha, **text_separation(micro)}
    if isinstance(objective, Routed):
        hidden_MD, routing = model.hidden_with_routing(micro["inputs"], counted_positions(micro), **how)
        return RoutedOutputs(outputs=objective.outputs(model, hidden_MD, micro), routing=routing)
    return objective.outputs(model, model.hidden(micro["inputs"], **how), micro)


def text_separation(micro: dict[str, jax.Array]) -> dict[str, Any]:
    """Returns the arguments of `CausalLM.hidden` that separate the data rows and branches of a micro-batch."""
    branching = Branching(micro["parents"], micro["depths"]) if "parents" in micro else None
    return {"segments_BT": micro.get("segments"), "branching": branching}


@functools.partial(jax.jit, static_argnames=("remat", "mesh", "neftune_noise_alpha", "objective"))
def gradients(
    parts: ModelParts,
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    scale: Float[Array, ""] | None = None,
    *,
    remat: str,
    mesh: AnyMesh | None = None,
    neftune_noise_alpha: float | None = None,
    objective: Objective = SUPERVISED,
) -> tuple[Lora, StepLoss]:
    """Returns the gradients of the objective's loss, (sum of row losses) / count, over all micro-batches; and losses.

    The result is that of one large batch, however its tokens are split into micro-batches and over devices. Gradients
    are summed over micro-batches in the parameters' dtype, f32 or bf16, as in torch, and over devices in f32.

    Args:
      batch: `inputs` and `targets` int32, `weights` f32 and, with packing, `segments` int32, each [A, B, T]; and the
        other arrays that the objective reads (`Batch.arrays`).
      key: the key of this step, which is folded with the place of each row in it, so that dropout masks and noise
        depend neither on micro-batches nor on the mesh; None without dropout and noise.
      scale: factor of the loss in the backward pass, by which the gradients are divided at the end (`loss_scale`).
      remat: a key of REMAT_POLICIES.
      mesh: the devices that share the rows of a batch and the model; None: one device. Gradients lie like the LoRA
        parameters.
      neftune_noise_alpha: scale of the noise on embeddings; None: no noise.
      objective: the loss; its arrays are in the batch.
    """
    if key is not None:
        shape_AB = batch["weights"].shape[:2]
        batch = batch | {PLACES: jnp.arange(math.prod(shape_AB), dtype=jnp.int32).reshape(shape_AB)}
    how = {"remat": remat, "neftune_noise_alpha": neftune_noise_alpha, "objective": objective}
    per_device = functools.partial(_gradients, **how)
    if mesh is None:
        return per_device(parts, batch, key, scale)
    specs = parts_specs(parts, mesh)
    run = jax.shard_map(
        functools.partial(per_device, mesh=mesh, specs=specs),
        mesh=mesh,
        in_specs=(specs, P(None, ROWS), P(), P()),
        out_specs=(specs.trained, P()),
        check_vma=False,  # kernels' results carry no such types
    )
    return run(parts, batch, key, scale)


def _gradients(
    parts: ModelParts,
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    scale: Float[Array, ""] | None,
    *,
    objective: Objective,
    remat: str,
    neftune_noise_alpha: float | None,
    mesh: AnyMesh | None = None,
    specs: ModelParts | None = None,
) -> tuple[Lora, StepLoss]:
    """Returns the result of `gradients` of one device, which has its own part of `parts` and `batch` on a mesh."""

    trained, fixed = split_leaves(parts.lora, parts.untrained)

    def outputs(trained: Lora, micro: dict[str, jax.Array]) -> PyTree:
        lora = join_leaves(trained, fixed) if fixed else trained
        keys_B = None if key is None else fold_in_rows(key, micro[PLACES])
        model = _model(parts.with_lora(lora), specs, mesh)
        how = {"remat": remat, "keys_B": keys_B, "neftune_noise_alpha": neftune_noise_alpha}
        return row_outputs(objective, model, micro, **how)

    # The backward pass adds each layer's gradient in place, so a micro-batch needs no second set of gradients.
    total = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), trained)
    totals = {name: sum_over(each, mesh) for name, each in objective.totals(batch).items()}
    backpropagate = _all_rows_at_once if objective.is_coupled else _each_micro_batch
    count = sum_over(objective.count(batch), mesh)
    factor = jnp.ones((), jnp.float32) if scale is None else scale / count
    row_losses_AB, found = backpropagate(objective, outputs, trained, total, batch, totals, mesh, factor)
    loss = StepLoss(total=jnp.sum(row_losses_AB), count=count, row_losses_AB=row_losses_AB, outputs=found)
    cuts = jax.tree.map(lambda _: P(), total) if specs is None else specs.trained
    divisor = count if scale is None else scale
    return jax.tree.map(functools.partial(_divided, divisor=divisor, mesh=mesh), total, cuts), loss


def _each_micro_batch(
    objective: Objective,
    outputs: Callable[[Lora, dict[str, jax.Array]], PyTree],
    trained: Lora,
    total: PyTree,
    batch: dict[str, jax.Array],
    totals: Totals,
    mesh: AnyMesh | None,
    factor: Float[Array, ""],
) -> tuple[Float[Array, "A B"], PyTree]:
    """Adds the gradients of factor x the rows' losses to the references in `total`; returns (losses, outputs) of all.

    Every device gets all rows' losses and adds them in the same order, so that the sum does not depend on the mesh.
    """

    def summed(trained: Lora, micro: dict[str, jax.Array]):
        found = outputs(trained, micro)
        losses_B = objective.row_losses(found, micro, totals)
        return jnp.sum(losses_B), (losses_B, None if found is losses_B else found)

    def accumulate(_, micro):
        _, backward, found = jax.vjp(functools.partial(summed, micro=micro), trained, has_aux=True)
        backward.with_refs(total)(factor)
        return None, found

    _, found = jax.lax.scan(accumulate, None, batch)
    return jax.tree.map(lambda leaf: gather_rows(leaf, mesh, axis=1), found)


def _all_rows_at_once(
    objective: Objective,
    outputs: Callable[[Lora, dict[str, jax.Array]], PyTree],
    trained: Lora,
    total: PyTree,
    batch: dict[str, jax.Array],
    totals: Totals,
    mesh: AnyMesh | None,
    factor: Float[Array, ""],
) -> tuple[Float[Array, "A B"], PyTree]:
    """Returns the result of `_each_micro_batch` for losses that depend on the outputs of other rows, too.

    The outputs of the whole step come first, and with them the derivative of the loss by each output. Then each
    micro-batch is backpropagated with its part of this derivative.
    """
    own, backpropagate = _outputs_first(outputs, trained, batch)
    read = {name: batch[name] for name in read_by_losses(objective)}
    found, arrays = jax.tree.map(lambda leaf: gather_rows(leaf, mesh, axis=1), (own, read))

    def summed(found: PyTree):
        losses_AB = objective.row_losses(found, arrays, totals)
        return factor * jnp.sum(losses_AB), losses_AB

    by_outputs, row_losses_AB = jax.grad(summed, has_aux=True)(found)
    backpropagate(total, jax.tree.map(lambda leaf: own_rows(leaf, mesh, axis=1), by_outputs))
    return row_losses_AB, found


def _outputs_first(
    outputs: Callable[[Lora, dict[str, jax.Array]], PyTree], trained: Lora, batch: dict[str, jax.Array]
) -> tuple[PyTree, Callable[[PyTree, PyTree], None]]:
    """Returns (outputs of all micro-batches, a function that adds their gradients to references for given cotangents).

    One micro-batch is computed once. Several are computed again, each just before its backward pass, so that the
    activations of one are in memory at a time (Gao et al. 2021, GradCache).
    """

    def forward(micro: dict[str, jax.Array]):
        return jax.vjp(lambda trained: outputs(trained, micro), trained)

    if len(batch["weights"]) == 1:
        found, backward = forward(jax.tree.map(lambda leaf: leaf[0], batch))

        def backpropagate(total: PyTree, cotangents: PyTree) -> None:
            backward.with_refs(total)(jax.tree.map(lambda leaf: leaf[0], cotangents))

        return jax.tree.map(lambda leaf: leaf[None], found), backpropagate

    def backpropagate_each(total: PyTree, cotangents: PyTree) -> None:
        def accumulate(_, micro_and_cotangents):
            micro, cotangents = micro_and_cotangents
            forward(micro)[1].with_refs(total)(cotangents)
            return None, None

        jax.lax.scan(accumulate, None, (batch, cotangents))

    _, found = jax.lax.scan(lambda _, micro: (None, outputs(trained, micro)), None, batch)
    return found, backpropagate_each


def _divided(total: jax.Ref, spec: P, *, divisor: Float[Array, ""], mesh: AnyMesh | None) -> jax.Array:
    summed = jax.freeze(total)
    # The derivative of the gather in the scan has summed cut leaves over `fsdp` already.
    axes = ROWS if cut_axis(spec) is None else (DATA,)
    return (sum_over(summed.astype(jnp.float32), mesh, axes) / divisor).astype(summed.dtype)


def _model(parts: ModelParts, specs: ModelParts | None, mesh: AnyMesh | None) -> CausalLM:
    """Returns the model; on a mesh, its cut leaves are Shards."""
    return combine(parts if mesh is None or specs is None else shards_of(parts, specs, mesh))


@functools.partial(
    jax.jit, static_argnames=("optimizer", "mesh"), donate_argnames=("lora", "state"), compiler_options=LEAF_BY_LEAF
)
def update(
    optimizer: optax.GradientTransformation,
    lora: Lora,
    state: optax.OptState,
    grads: Lora,
    norm: Float[Array, ""] | None = None,
    *,
    mesh: AnyMesh | None = None,
) -> tuple[Lora, optax.OptState, Float[Array, ""]]:
    """Returns (LoRA parameters, optimizer state, the gradients' global norm before clipping) after one step.

    Donates `lora` and `state`. On a mesh, each device updates its own parts, with the norm of all.

    Args:
      norm: the global norm, if `grads` were changed after it was computed.
    """
    if mesh is None:
        return _update(optimizer, lora, state, grads, norm)
    specs = lora_specs(lora, mesh)
    states = state_specs(optimizer, lora, specs)
    run = jax.shard_map(
        functools.partial(_update, optimizer, specs=specs),
        mesh=mesh,
        in_specs=(specs, states, specs, P()),
        out_specs=(specs, states, P()),
        check_vma=False,
    )
    return run(lora, state, grads, norm)


def _update(
    optimizer: optax.GradientTransformation,
    lora: Lora,
    state: optax.OptState,
    grads: Lora,
    norm: Float[Array, ""] | None,
    specs: PyTree | None = None,
) -> tuple[Lora, optax.OptState, Float[Array, ""]]:
    """Returns the result of `update` of one device, which has its own part of the arguments on a mesh."""
    grads = in_f32(grads)
    if norm is None:
        norm = global_norm(grads, specs)  # before the update, which sees only a part of the gradients
    updates, state = optax.with_extra_args_support(optimizer).update(grads, state, lora, norm=norm)
    return cast(Lora, apply_updates(lora, updates)), state, norm


@functools.partial(ModelFunction, static_argnames="mesh")
def evaluation_loss(
    parts: ModelParts, batch: dict[str, jax.Array], *, mesh: AnyMesh | None = None
) -> Float[Array, " B"]:
    """Returns each row's sum of losses in nats, without dropout; `batch` as in `step.gradients`, without the axis A."""
    return _forward(SUPERVISED, parts, batch, mesh)


@functools.partial(ModelFunction, static_argnames=("objective", "mesh"))
def evaluation_outputs(
    parts: ModelParts, batch: dict[str, jax.Array], *, objective: Objective, mesh: AnyMesh | None = None
) -> PyTree:
    """Returns the objective's outputs for each row, without dropout; `batch` is as in `evaluation_loss`."""
    return _forward(objective, parts, batch, mesh)


def _forward(objective: Objective, parts: ModelParts, batch: dict[str, jax.Array], mesh: AnyMesh | None) -> PyTree:
    def outputs(parts: ModelParts, batch: dict[str, jax.Array]) -> PyTree:
        return row_outputs(objective, combine(parts), batch, remat="none", keys_B=None)

    return _of_all_rows(outputs, parts, batch, mesh)


@functools.partial(ModelFunction, static_argnames="mesh")
def compared_outputs(
    both: tuple[ModelParts, ModelParts], batch: dict[str, jax.Array], *, mesh: AnyMesh | None = None
) -> ComparedLogps:
    """Returns log p of each row's sequences and their divergence from a reference, without dropout.

    Args:
      both: the model and its reference.
      batch: as in `evaluation_loss`.
    """

    def outputs(both: tuple[ModelParts, ModelParts], batch: dict[str, jax.Array]) -> ComparedLogps:
        model, reference = (combine(parts) for parts in both)
        how = {"remat": "none", "keys_B": None, **text_separation(batch)}
        hidden_MD, reference_MD = (one.hidden(batch["inputs"], **how) for one in (model, reference))
        return compared_logps(model, hidden_MD, reference, reference_MD, batch)

    return _of_all_rows(outputs, both, batch, mesh)


def _of_all_rows(
    outputs: Callable[[PyTree, dict[str, jax.Array]], PyTree],
    parts: PyTree,
    batch: dict[str, jax.Array],
    mesh: AnyMesh | None,
) -> PyTree:
    """Returns the outputs of all rows on every device; `parts` are those of a model, or of several."""

    def per_device(parts: PyTree, batch: dict[str, jax.Array]) -> PyTree:
        return jax.tree.map(lambda leaf: gather_rows(leaf, mesh, axis=0), outputs(parts, batch))

    return run_on_mesh(per_device, parts, (batch,), mesh, P())
