"""One optimizer step, as two compiled functions: gradients of the accumulated loss, and the update.

They are separate so that an update can be paged, and so that a new length bucket compiles the gradients only.

Dimension key: A accumulated micro-batches, B rows per micro-batch, T positions, M = B T.
"""

import dataclasses
import functools
import math
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.model_sharding import lora_specs, parts_specs
from qlora_jax.models.partition import Lora, ModelParts, combine, join_leaves, split_leaves
from qlora_jax.nn.dropout import fold_in_rows
from qlora_jax.nn.loss import token_nll
from qlora_jax.optim.apply_updates import apply_updates, in_f32
from qlora_jax.optim.clipping import global_norm
from qlora_jax.optim.mesh_state import state_specs
from qlora_jax.sharding import DATA, ROWS, AnyMesh, cut_axis, gather_rows, shards_of, sum_over

# Clips each leaf just before its update. The default order on CPUs clips all first, which holds the gradients twice.
LEAF_BY_LEAF = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

PLACES = "places"  # of rows in their step, [A, B] in a batch with dropout or noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLoss:
    """The losses of one step, in nats.

    Attributes:
      nll: the sum over all supervised tokens.
      tokens: the number of supervised tokens.
      row_nll_AB: the sum of each row.
    """

    nll: Float[Array, ""]
    tokens: Float[Array, ""]
    row_nll_AB: Float[Array, "A B"]


def row_nll(
    model: CausalLM,
    micro: dict[str, jax.Array],
    *,
    remat: str,
    keys_B: jax.Array | None,
    neftune_noise_alpha: float | None = None,
) -> Float[Array, " B"]:
    """Returns each row's sum over its tokens of weight * -log p(target), in f32.

    Args:
      micro: one micro-batch: `inputs`, `targets`, `weights` and, with packing, `segments`, each [B, T].
      remat: a key of REMAT_POLICIES.
      keys_B: the key of each row; None without dropout and noise.
      neftune_noise_alpha: scale of the noise on embeddings; None: no noise.
    """
    targets_BT, weights_BT = micro["targets"], micro["weights"]
    hidden_MD = model.hidden(
        micro["inputs"],
        remat=remat,
        keys_B=keys_B,
        neftune_noise_alpha=neftune_noise_alpha,
        segments_BT=micro.get("segments"),
    )
    with jax.named_scope("head"):
        nll_M = token_nll(hidden_MD, model.head, targets_BT.reshape(-1), weights_BT.reshape(-1) > 0)
    return jnp.sum(nll_M.reshape(weights_BT.shape) * weights_BT, axis=1)


@functools.partial(jax.jit, static_argnames=("remat", "mesh", "neftune_noise_alpha"))
def gradients(
    parts: ModelParts,
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    *,
    remat: str,
    mesh: AnyMesh | None = None,
    neftune_noise_alpha: float | None = None,
) -> tuple[Lora, StepLoss]:
    """Returns the gradients of (sum of losses) / (number of supervised tokens) over all micro-batches, and the losses.

    The result is that of one large batch, however its tokens are split into micro-batches and over devices. Gradients
    are summed over micro-batches in the parameters' dtype, f32 or bf16, as in torch, and over devices in f32.

    Args:
      batch: `inputs` and `targets` int32, `weights` f32 and, with packing, `segments` int32, each [A, B, T].
      key: the key of this step, which is folded with the place of each row in it, so that dropout masks and noise
        depend neither on micro-batches nor on the mesh; None without dropout and noise.
      remat: a key of REMAT_POLICIES.
      mesh: the devices that share the rows of a batch and the model; None: one device. Gradients lie like the LoRA
        parameters.
      neftune_noise_alpha: scale of the noise on embeddings; None: no noise.
    """
    if key is not None:
        shape_AB = batch["weights"].shape[:2]
        batch = batch | {PLACES: jnp.arange(math.prod(shape_AB), dtype=jnp.int32).reshape(shape_AB)}
    per_device = functools.partial(_gradients, remat=remat, neftune_noise_alpha=neftune_noise_alpha)
    if mesh is None:
        return per_device(parts, batch, key)
    specs = parts_specs(parts, mesh)
    run = jax.shard_map(
        functools.partial(per_device, mesh=mesh, specs=specs),
        mesh=mesh,
        in_specs=(specs, P(None, ROWS), P()),
        out_specs=(specs.trained, P()),
        check_vma=False,  # kernels' results carry no such types
    )
    return run(parts, batch, key)


def _gradients(
    parts: ModelParts,
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    *,
    remat: str,
    neftune_noise_alpha: float | None,
    mesh: AnyMesh | None = None,
    specs: ModelParts | None = None,
) -> tuple[Lora, StepLoss]:
    """Returns the result of `gradients` of one device, which has its own part of `parts` and `batch` on a mesh."""

    trained, fixed = split_leaves(parts.lora, parts.untrained)

    def summed(trained: Lora, micro: dict[str, jax.Array]):
        lora = join_leaves(trained, fixed) if fixed else trained
        keys_B = None if key is None else fold_in_rows(key, micro[PLACES])
        model = _model(parts.with_lora(lora), specs, mesh)
        rows_B = row_nll(model, micro, remat=remat, keys_B=keys_B, neftune_noise_alpha=neftune_noise_alpha)
        return jnp.sum(rows_B), rows_B

    # The backward pass adds each layer's gradient in place, so a micro-batch needs no second set of gradients.
    total = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), trained)

    def accumulate(_, micro):
        _, backward, rows_B = jax.vjp(functools.partial(summed, micro=micro), trained, has_aux=True)
        backward.with_refs(total)(jnp.ones((), jnp.float32))
        return None, rows_B

    _, row_nll_AB = jax.lax.scan(accumulate, None, batch)
    # Every device gets all rows' losses and adds them in the same order, so that the sum does not depend on the mesh.
    row_nll_AB = gather_rows(row_nll_AB, mesh, axis=1)
    tokens = sum_over(jnp.sum(batch["weights"]), mesh)
    loss = StepLoss(nll=jnp.sum(row_nll_AB), tokens=tokens, row_nll_AB=row_nll_AB)
    cuts = jax.tree.map(lambda _: P(), total) if specs is None else specs.trained
    return jax.tree.map(functools.partial(_mean, tokens=tokens, mesh=mesh), total, cuts), loss


def _mean(total: jax.Ref, spec: P, *, tokens: Float[Array, ""], mesh: AnyMesh | None) -> jax.Array:
    summed = jax.freeze(total)
    # The derivative of the gather in the scan has summed cut leaves over `fsdp` already.
    axes = ROWS if cut_axis(spec) is None else (DATA,)
    return (sum_over(summed.astype(jnp.float32), mesh, axes) / tokens).astype(summed.dtype)


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


@functools.partial(jax.jit, static_argnames="mesh")
def evaluation_loss(
    parts: ModelParts, batch: dict[str, jax.Array], *, mesh: AnyMesh | None = None
) -> Float[Array, " B"]:
    """Returns each row's sum of losses in nats, without dropout; `batch` is as in `gradients`, without the axis A."""
    if mesh is None:
        return row_nll(combine(parts), batch, remat="none", keys_B=None)
    specs = parts_specs(parts, mesh)

    def per_device(parts: ModelParts, batch: dict[str, jax.Array]) -> jax.Array:
        rows_B = row_nll(_model(parts, specs, mesh), batch, remat="none", keys_B=None)
        return gather_rows(rows_B, mesh, axis=0)

    run = jax.shard_map(per_device, mesh=mesh, in_specs=(specs, P(ROWS)), out_specs=P(), check_vma=False)
    return run(parts, batch)
