"""Embedding and head whose rows are cut over devices, and are never gathered.

Tokens and hidden states are gathered instead. Each device of a group looks up its rows, or multiplies with them, for
the tokens of all. The results are then added up, and each device gets those for its tokens. These functions run inside
shard_map, equally often on all devices of a group.

Dimension key: M or C tokens of this device, G tokens of its group, D embed, V vocab.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.nn.lm_head.head import Head, HeadWithRows, TrainableHead
from qlora_jax.nn.lm_head.tiles import RunningSums, sum_over_tiles
from qlora_jax.sharding import FSDP, Shard


def look_up(table_VD: Shard, tokens_M: Int[Array, " M"]) -> Float[Array, "M D"]:
    """Returns the row of each token, to the bit but for the sign of zeros."""
    place_G = gather_tokens(tokens_M) - table_VD.start
    part: jax.Array = table_VD.part
    rows_GD = part.at[place_G].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return sum_own_tokens(rows_GD)  # all devices but one add 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShardedHead:
    """A frozen head whose rows are cut over devices; otherwise as `Head`."""

    weight_VD: Shard
    bias_V: Shard | None = None
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    scale: float | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def own(self) -> Head:
        """The head with only this device's rows."""
        bias_V = None if self.bias_V is None else self.bias_V.part
        return Head(self.weight_VD.part, bias_V, self.softcap, scale=self.scale)

    @property
    def shards(self) -> int:
        """The number of devices of a group."""
        return self.weight_VD.count

    def any_in_group(self, wanted_C: Bool[Array, " C"]) -> Bool[Array, ""]:
        """Returns True on all devices of the group if any of them wants a token."""
        return lax.pmax(jnp.any(wanted_C).astype(jnp.int32), FSDP) > 0

    def token_rows(self, tokens_C: Int[Array, " C"]) -> Float[Array, "C D"]:
        """Returns the row of each token."""
        return look_up(self.weight_VD, tokens_C)

    def slope(self, logits: Float[Array, "..."]) -> Float[Array, "..."] | None:
        """Returns d capped / d uncapped at these capped logits, or None without a scale and a softcap."""
        return self.own.slope(logits)

    def logits(self, hidden_MD: Float[Array, "M D"]) -> Float[Array, "M V"]:
        """Returns the logits of this device's tokens in f32."""
        logits_GV = self.own.logits(gather_tokens(hidden_MD))
        return lax.all_to_all(logits_GV, FSDP, split_axis=0, concat_axis=1, tiled=True)


AnyHead = Head | ShardedHead | HeadWithRows | TrainableHead


def at_temperature[Given: AnyHead](head: Given, temperature: float) -> Given:
    """Returns the head whose logits, after softcap and scale, are divided by `temperature`."""
    if temperature == 1.0:
        return head
    if isinstance(head, HeadWithRows):
        return dataclasses.replace(head, frozen=at_temperature(head.frozen, temperature))
    softcap, scale = head.softcap, 1.0 if head.scale is None else head.scale
    return dataclasses.replace(
        head, softcap=None if softcap is None else softcap / temperature, scale=scale / temperature
    )


def sum_over_head(
    hidden_CD: jax.Array, head: Head | ShardedHead, targets_C: jax.Array, **required: bool
) -> RunningSums:
    """Sums over all rows of the head, for this device's tokens.

    Args:
      required: arguments of `sum_over_tiles`.
    """
    if isinstance(head, Head):
        return sum_over_tiles(hidden_CD, head, targets_C, **required)
    start = head.weight_VD.start
    places_G = gather_tokens(targets_C) - start
    return _merged(sum_over_tiles(gather_tokens(hidden_CD), head.own, places_G, **required), start)


def _merged(run: RunningSums, start: jax.Array) -> RunningSums:
    """Adds up the group's sums over its rows, and returns those of this device's tokens.

    Args:
      run: this device's sums for the tokens of all, with `first_C` counted from its row `start`.
    """
    largest_G = lax.pmax(run.largest_C, FSDP)
    shrink_G = jnp.exp(run.largest_C - largest_G)
    weighted_CD, first_C = None, None
    if run.weighted_CD is not None:
        weighted_CD = sum_own_tokens(run.weighted_CD * shrink_G[:, None])
    if run.first_C is not None:
        ids_G = jnp.where(run.largest_C == largest_G, start + run.first_C, jnp.iinfo(jnp.int32).max)
        first_C = own_tokens(lax.pmin(ids_G, FSDP))
    return RunningSums(
        largest_C=own_tokens(largest_G),
        sum_C=sum_own_tokens(run.sum_C * shrink_G),
        target_C=sum_own_tokens(run.target_C),  # 0 where the target is another device's row
        weighted_CD=weighted_CD,
        first_C=first_C,
        logit_C=None if run.logit_C is None else sum_own_tokens(run.logit_C * shrink_G),
    )


def gather_tokens(x_C: jax.Array) -> jax.Array:
    """Gathers the tokens of the group."""
    return lax.all_gather(x_C, FSDP, tiled=True)


def sum_own_tokens(x_G: jax.Array) -> jax.Array:
    """Sums over the group, and returns the part of this device's tokens."""
    return lax.psum_scatter(x_G, FSDP, scatter_dimension=0, tiled=True)


def own_tokens(x_G: jax.Array) -> jax.Array:
    """Returns the part of this device's tokens."""
    size = x_G.shape[0] // lax.axis_size(FSDP)
    return lax.dynamic_slice_in_dim(x_G, lax.axis_index(FSDP) * size, size)
