"""The decoder of all model families: stacked layers in one scan, for training and for decoding with a cache.

Attribute paths equal the Hugging Face names of a Llama without the layer's index: `model.layers.self_attn.q_proj` has
the weights of all `model.layers.{i}.self_attn.q_proj`, stacked on a leading axis. Families with other names map them
in ModelConfig.names.

Dimension key: B batch, T positions, D embed, N q-heads, K kv-heads, H head_dim, F mlp, V vocab, L
layers, M = B T.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PyTree

from pallas_kernels.attention import KVPages
from pallas_kernels.attention.branching import Branching
from qlora_jax.models.attention import Attention, Positions
from qlora_jax.models.config import NORM_PLACEMENTS, ModelConfig, WeightFormat
from qlora_jax.models.mlp import MLP, TOKENS_AT_ONCE, MixtureMLP, RoutingSums, SparseMLP, by_chunks, qlinear
from qlora_jax.models.prefetched_layers import fetch_layer, prefetching_scan, split_host
from qlora_jax.models.remat import LAYER_INPUT, REMAT_POLICIES, remat_policy
from qlora_jax.nn.frozen_weight import gather_layer
from qlora_jax.nn.linear import QLinear
from qlora_jax.nn.lm_head.head import Head, HeadWithRows, TrainableHead, with_codes
from qlora_jax.nn.lm_head.new_token_rows import NewTokenRows, TrainableTable
from qlora_jax.nn.lm_head.sharded_vocabulary import AnyHead, ShardedHead, look_up
from qlora_jax.nn.neftune import add_noise
from qlora_jax.nn.norm import LayerNorm, RMSNorm
from qlora_jax.nn.random_keys import fold_in_each, name_number, named_key
from qlora_jax.nn.router import Routing
from qlora_jax.nn.sequence_head import INIT_STD, HeadSpec, SequenceHead
from qlora_jax.nn.variables import Frozen, StatePath
from qlora_jax.sharding import Shard, gathered, part_bytes

# Runs of consecutive layers of one kind, for models whose layers differ in their adapters or in their MLPs.
#
# Adapters are stacked over the layers that have one, and the MLPs of a mixture of experts over the dense or the sparse
# layers, so layers that lack them take no memory. Each run has a separate scan, over its part of the trained stacks and
# without what its layers lack.

MLP_NAME, MLP_START = "mlp", "mlp_start"  # attributes of the block


def layer_runs(block: nnx.Module, config: ModelConfig) -> list[range]:
    """Returns the runs in order; one if all layers have the same adapters and are all dense or all sparse."""
    chosen = [frozenset(layers) for layers in _partial_adapters(block, config).values()]
    if config.experts is not None:
        chosen.append(frozenset(config.experts.layers))
    same = itertools.groupby(range(config.num_layers), key=lambda layer: [layer in layers for layers in chosen])
    runs = [list(group) for _, group in same]
    return [range(run[0], run[-1] + 1) for run in runs]


def split_run(block: nnx.Module, run: range, config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns (structure, trained leaves, frozen leaves) of the block for the layers of a run.

    Trained leaves have the layers of the run, frozen leaves all layers that have them.
    """
    chosen = _partial_adapters(block, config)
    graphdef, lora, base = nnx.split(block, nnx.LoRAParam, ...)
    if not chosen and config.experts is None:
        return graphdef, lora, base
    own = nnx.merge(graphdef, lora, base)
    for path, layers in chosen.items():
        if run.start not in layers:
            *linear, attribute = path
            setattr(_at(own, linear), attribute, nnx.data(None))
    mlp = getattr(own, MLP_NAME)
    if isinstance(mlp, MixtureMLP):
        setattr(own, MLP_NAME, mlp.in_layers(run))
        setattr(own, MLP_START, mlp_start(run, config))
    graphdef, lora, base = nnx.split(own, nnx.LoRAParam, ...)
    cut = [
        (path, variable.replace(_rows(variable.get_value(), _first_row(chosen.get(path[:-1]), run), len(run))))
        for path, variable in nnx.to_flat_state(lora)
    ]
    return graphdef, nnx.from_flat_state(cut), base


def mlp_start(run: range, config: ModelConfig) -> int:
    """Returns the number by which a run's layers differ from the rows of their MLP's stacks."""
    if config.experts is None:
        return 0
    earlier = sum(layer in config.experts.layers for layer in range(run.start))
    return run.start - earlier if run.start in config.experts.layers else earlier


def gather_run_layer(base: nnx.State, layer: jax.Array, run: range, config: ModelConfig) -> nnx.State:
    """Gathers one layer of each stack that is cut over devices; see `gather_layer`."""
    start = mlp_start(run, config)
    if start == 0:
        return gather_layer(base, layer)
    return nnx.State(
        {name: gather_layer(part, layer - start if name == MLP_NAME else layer) for name, part in base.items()}
    )


def _partial_adapters(block: nnx.Module, config: ModelConfig) -> dict[StatePath, tuple[int, ...]]:
    """Returns the layers of each adapter that is not on all of them, by its path in the block."""
    found = {}
    for path, node in nnx.iter_graph(block):
        if path and path[-1] == "adapter":
            layers = getattr(node, "adapted_layers", None)
            found[path] = config.layers_with(".".join(map(str, path[:-1]))) if layers is None else layers
    return {path: layers for path, layers in found.items() if len(layers) < config.num_layers}


def _first_row(layers: tuple[int, ...] | None, run: range) -> int:
    return run.start if layers is None else layers.index(run.start)


def _rows(stack: PyTree, first: int, count: int) -> PyTree:
    """Returns rows of a stack, which may be cut over devices along another axis."""
    return jax.tree.map(lambda leaf: leaf[first : first + count], stack)


def _at(module: nnx.Module, path: Sequence[object]) -> nnx.Module:
    for name in path:
        module = getattr(module, str(name))
    return module


NEFTUNE = name_number("neftune")  # folded into the key of a row; layers fold their index
SCORE = "score"  # name of the sequence head among the trained parameters


def _norm(config: ModelConfig, shape: tuple[int, ...], dtype: str) -> RMSNorm | LayerNorm:
    ones = jnp.ones(shape, dtype)
    if config.norm == "rms":
        return RMSNorm(ones, config.norm_eps, config.norm_offset)
    return LayerNorm(ones, jnp.zeros_like(ones) if config.norm == "layer" else None, config.norm_eps)


def _scaled(x_MD: jax.Array, scale: float | None) -> jax.Array:
    """Returns scale x, computed in f32."""
    return x_MD if scale is None else (x_MD.astype(jnp.float32) * scale).astype(x_MD.dtype)


class Block(nnx.Module):
    """Attention and MLP with their norms; inside the scan, base leaves have all layers and adapters one."""

    def __init__(self, config: ModelConfig, weights: WeightFormat):
        def group[M](prefix: str, of: Iterable[str], make: Callable[[str], M]) -> dict[str, M]:
            return {n.removeprefix(prefix): make(n) for n in of if n.startswith(prefix)}

        def linear(name: str) -> QLinear:
            return qlinear(name, config, weights)

        def norm(name: str) -> RMSNorm | LayerNorm:
            return _norm(config, (config.num_layers, widths[name]), weights.dtype)

        shapes, widths = config.linear_shapes(), config.norm_widths()
        for name in NORM_PLACEMENTS[config.layout].norms:
            setattr(self, name, norm(name))
        attention = group("self_attn.", shapes, linear), group("self_attn.", widths, norm)
        self.self_attn = Attention(*attention, config, weights.dtype)
        self.mlp = MLP(group("mlp.", shapes, linear), config) if config.experts is None else MixtureMLP(config, weights)
        self.mlp_start = 0  # layer minus row in the stacks of `mlp`; `layer_runs` sets it in a mixture of experts
        self.layout = NORM_PLACEMENTS[config.layout]
        self.residual_scale = config.residual_scale

    def __call__(
        self, x_MD, positions: Positions, layer, keys_B, cache: KVPages | None, counted_BT=None, *, recomputed=False
    ):
        """Returns (residual stream, cache, sums of the router); no sums without a router or `counted_BT`.

        Args:
          recomputed: the backward pass repeats the layer's products; long rows then pass the MLP in chunks.
        """
        layout, scale = self.layout, self.residual_scale
        rows, length = positions.index_BT.shape
        cut_rows = rows if recomputed and length > TOKENS_AT_ONCE else None
        mlp = functools.partial(self._mlp, layer, keys_B, counted_BT, cut_rows)
        to_attention_MD = self._normed(layout.before_attention, x_MD, layer)
        attended_MD, cache = self.self_attn(to_attention_MD, positions, layer, keys_B, cache)
        attended_MD = _scaled(self._normed(layout.after_attention, attended_MD, layer, "attention_normed"), scale)
        if layout.parallel:
            shared = layout.before_mlp == layout.before_attention
            to_mlp_MD = to_attention_MD if shared else self._normed(layout.before_mlp, x_MD, layer)
            given_MD, sums = mlp(to_mlp_MD)
            return x_MD + attended_MD + _scaled(given_MD, scale), cache, sums
        x_MD = checkpoint_name(x_MD + attended_MD, "attention_residual")
        given_MD, sums = mlp(self._normed(layout.before_mlp, x_MD, layer))
        return x_MD + _scaled(self._normed(layout.after_mlp, given_MD, layer, "mlp_normed"), scale), cache, sums

    def _mlp(self, layer, keys_B, counted_BT, cut_rows: int | None, x_MD) -> tuple[jax.Array, RoutingSums | None]:
        """Returns (MLP of x, sums of the router); with `cut_rows`, the number of rows, a dense one chunk by chunk."""
        mlp, row = self.mlp, layer - self.mlp_start if self.mlp_start else layer
        if not isinstance(mlp, MLP):
            assert isinstance(mlp, SparseMLP)
            return mlp(x_MD, row, keys_B, counted_BT)
        if cut_rows is None:
            return mlp(x_MD, row, keys_B), None
        return by_chunks(lambda x_CD, keys_1: mlp(x_CD, row, keys_1), x_MD, keys_B, cut_rows), None

    def _normed(self, norm: str | None, x_MD: jax.Array, layer: jax.Array, kept_as: str | None = None) -> jax.Array:
        """Returns norm(x), or x if `norm` is None; `kept_as` names x for remat policies."""
        if norm is None:
            return x_MD
        return getattr(self, norm)(x_MD if kept_as is None else checkpoint_name(x_MD, kept_as), layer)


class Embedding(nnx.Module):
    """A frozen table [V, D]. Some of its rows, or a full copy, may train; a head may have a bias [V]."""

    def __init__(self, table: Float[Array, "V D"], *, bias: Float[Array, " V"] | None = None):
        self.weight = Frozen(table)
        self.bias = None if bias is None else Frozen(bias)
        self.adapter: NewTokenRows | TrainableTable | None = nnx.data(None)  # data: it may be set later

    def set_rows(self, ids: tuple[int, ...], dtype: DTypeLike) -> None:
        """Adds trainable rows for the tokens `ids`, each initialized to the mean row of the table."""
        bias_V = None if self.bias is None else self.bias[...]
        self.adapter = NewTokenRows.init(self.weight[...], bias_V, ids, dtype) if ids else None

    def make_trainable(self, ids: tuple[int, ...], dtype: DTypeLike) -> None:
        """Replaces the frozen table by a trainable copy in `dtype`.

        Rows of the tokens `ids` are initialized to the mean row. The empty frozen table that remains has the compute
        dtype.
        """
        assert len(self.weight[...]), "the frozen table was replaced already: load the base again"
        whole_VD = self.weight[...].astype(dtype)
        rows = NewTokenRows.init(self.weight[...], None, ids, dtype) if ids else None
        self.adapter = TrainableTable(whole_VD if rows is None else rows.insert_into(whole_VD))
        self.weight = Frozen(self.weight[...][:0])

    def __call__(self, tokens_M: Int[Array, " M"]) -> Float[Array, "M D"]:
        """Returns the row of each token."""
        if self.adapter is not None:
            return self.adapter.lookup(tokens_M, self.weight[...])
        table_VD = self.weight.get_value()
        if isinstance(table_VD, Shard):
            return look_up(table_VD, tokens_M)
        return table_VD.at[tokens_M].get(mode="promise_in_bounds")

    @property
    def num_ids(self) -> int:
        """Number of ids that have a row, the rows of new tokens included. A look-up of any other id is undefined."""
        if isinstance(self.adapter, TrainableTable):
            return len(self.adapter.weight[...])
        ids = () if self.adapter is None else self.adapter.ids
        return max(len(self.weight[...]), *(number + 1 for number in ids), 0)

    def head(self, softcap: float | None, scale: float | None) -> AnyHead:
        """Returns the language model head with this table as its weight."""
        weight_VD, bias_V = self.weight.get_value(), None if self.bias is None else self.bias.get_value()
        if isinstance(weight_VD, Shard):
            assert self.adapter is None, "tables with trained rows are whole on every device"
            return ShardedHead(weight_VD, bias_V, softcap, scale)
        frozen = Head(weight_VD, bias_V, softcap, scale=scale)
        if self.adapter is None:
            return frozen
        if isinstance(self.adapter, TrainableTable):
            return TrainableHead(self.adapter.weight[...], softcap, scale)
        bias_N = None if self.adapter.bias is None else self.adapter.bias[...]
        return HeadWithRows.of(frozen, self.adapter.rows[...], bias_N, self.adapter.ids)


class Decoder(nnx.Module):
    """Embedding, L blocks in one scan, or one per run of layers of one kind (`layer_runs`), final norm."""

    def __init__(self, config: ModelConfig, weights: WeightFormat):
        self.config = config
        self.embed_tokens = Embedding(jnp.zeros((config.vocab_size, config.embed_dim), weights.dtype))
        self.layers = Block(config, weights)
        self.norm = _norm(config, (config.embed_dim,), weights.dtype)

    def __call__(
        self,
        tokens_BT,
        positions: Positions,
        *,
        remat: str,
        keys_B=None,
        neftune_noise_alpha: float | None = None,
        cache: KVPages | None = None,
        counted_BT=None,
    ):
        """Returns (normalized hidden states, cache, sums of each run of sparse layers, stacked over its layers)."""
        x_MD = self._embedded(tokens_BT.reshape(-1))
        if keys_B is not None and neftune_noise_alpha is not None:
            x_MD = add_noise(x_MD, neftune_noise_alpha, fold_in_each(keys_B, NEFTUNE))
        positions = positions.with_bounds(self.config, x_MD.dtype) if cache is None else positions
        carry, sums = (x_MD, cache), []
        for run in layer_runs(self.layers, self.config):
            carry, of_run = self._scan(run, carry, positions, remat, keys_B, counted_BT)
            sums += [] if of_run is None else [of_run]
        x_MD, cache = carry
        return self.norm(x_MD), cache, sums

    def _scan(self, run: range, carry, positions: Positions, remat: str, keys_B, counted_BT):
        """Returns ((hidden states, cache) after the layers of a run, sums of their routers)."""
        graphdef, lora, base = split_run(self.layers, run, self.config)
        stacks, base = split_host(base)
        frozen, structure = jax.tree.flatten((base, positions, keys_B, counted_BT))
        recomputed = REMAT_POLICIES[remat].recomputes_products

        def step(carry, lora_of_layer, layer, fetched, frozen):
            x_MD, cache = carry
            base, positions, keys_B, counted_BT = jax.tree.unflatten(structure, frozen)
            x_MD = checkpoint_name(x_MD, LAYER_INPUT)
            # Gathered inside jax.checkpoint, under no name that a policy saves: the backward pass gathers once more,
            # for recomputation and for its own products, and nothing that was gathered is kept.
            lora_of_layer, base_of_layer = gathered(lora_of_layer), gather_run_layer(base, layer, run, self.config)
            layer_keys_B = None if keys_B is None else fold_in_each(keys_B, layer)
            block = nnx.merge(graphdef, lora_of_layer, base_of_layer, fetched)
            x_MD, cache, sums = block(x_MD, positions, layer, layer_keys_B, cache, counted_BT, recomputed=recomputed)
            return (x_MD, cache), sums

        def checkpointed(step: Callable) -> Callable:
            policy = remat_policy(remat, self.layers)
            # XLA unrolls the scan of a run of one layer, and would then share the recomputation with the forward pass.
            unrolled = len(run) == 1 < self.config.num_layers
            return step if policy is None else jax.checkpoint(step, policy=policy, prevent_cse=unrolled)

        if stacks:
            fetching = functools.partial(fetch_layer, first=run.start - mlp_start(run, self.config))
            at_position = checkpointed(lambda carry, part, at, *rest: step(carry, part, run.start + at, *rest))
            return prefetching_scan(at_position, fetching, len(run), carry, lora, stacks, frozen)
        body = checkpointed(lambda carry, per_layer: step(carry, per_layer[1], per_layer[0], nnx.State({}), frozen))
        return jax.lax.scan(body, carry, (jnp.arange(run.start, run.stop, dtype=jnp.int32), lora))

    def _embedded(self, tokens_M: jax.Array) -> jax.Array:
        x_MD = self.embed_tokens(tokens_M)
        scale = self.config.embed_scale
        return x_MD if scale is None else x_MD * jnp.asarray(scale, x_MD.dtype)  # rounded as transformers rounds it


class CausalLM(nnx.Module):
    """A decoder and its head. All leaves of a new model are placeholders, which `io.loading.loader` fills.

    Args:
      config: the model's features.
      weights: format of the frozen weights.
    """

    def __init__(self, config: ModelConfig, weights: WeightFormat):
        self.config = config
        self.model = Decoder(config, weights)
        if not config.tie_embeddings:
            bias = jnp.zeros((config.vocab_size,), weights.dtype) if config.head_bias else None
            self.lm_head = Embedding(jnp.zeros((config.vocab_size, config.embed_dim), weights.dtype), bias=bias)
        self.score: SequenceHead | None = nnx.data(None)  # data: it may be set later
        self.head_codes: Frozen | None = nnx.data(None)  # the head in codes, for decoding

    def add_sequence_head(self, spec: HeadSpec, key: Key[Array, ""], init_std: float = INIT_STD) -> None:
        """Adds a head that scores whole sequences, in place of the language-model head, whose memory is freed."""
        self.score = SequenceHead.init(named_key(key, SCORE), self.config.embed_dim, spec, init_std)
        if self.has_lm_head:
            del self.lm_head

    @property
    def has_lm_head(self) -> bool:
        """True if the language-model head is a separate table."""
        return hasattr(self, "lm_head")

    @property
    def head(self) -> AnyHead:
        """The head, which maps hidden states to logits; its weight is the embedding if they are tied.

        Raises:
          ValueError: the model scores whole sequences.
        """
        if self.score is not None:
            raise ValueError(
                "model: it has no language-model head (found a head for whole sequences, as objectives such as "
                "classification train). Use predict for new texts, and evaluate with labels, pairs or embeddings"
            )
        table = self.model.embed_tokens if self.config.tie_embeddings else self.lm_head
        head = table.head(self.config.head_softcap, self.config.logit_scale)
        if self.head_codes is None:
            return head
        assert not isinstance(head, ShardedHead), "a head in codes is for one device"
        return with_codes(head, self.head_codes.get_value())

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        remat: str = "none",
        keys_B: Key[Array, " B"] | None = None,
        neftune_noise_alpha: float | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        branching: Branching | None = None,
    ) -> Float[Array, "M D"]:
        """Returns the normalized last hidden state of each token; attention is causal, positions start at 0 per text.

        A row is one text, padded on its right where no real token sees it, or several texts.

        Args:
          remat: a key of REMAT_POLICIES.
          keys_B: the key of each row in this step; None: no dropout and no noise.
          neftune_noise_alpha: scale of the noise on embeddings; None: no noise.
          segments_BT: id of each token's text in its row, ascending; padding on the left is a text too.
          branching: the texts that segments continue; they share their hidden states. Ids of segments must ascend.

        Raises:
          ValueError: `branching` without `segments_BT`.
        """
        positions = self._positions(tokens_BT, segments_BT, branching)
        training = {"keys_B": keys_B, "neftune_noise_alpha": neftune_noise_alpha}
        return self.model(tokens_BT, positions, remat=remat, **training)[0]

    def hidden_with_routing(
        self,
        tokens_BT: Int[Array, "B T"],
        counted_BT: Float[Array, "B T"],
        *,
        remat: str = "none",
        keys_B: Key[Array, " B"] | None = None,
        neftune_noise_alpha: float | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        branching: Branching | None = None,
    ) -> tuple[Float[Array, "M D"], Routing]:
        """Returns `hidden`, and sums over each row of the choices and probabilities of every sparse layer's router.

        Args:
          counted_BT: 1 for tokens that count in these sums, 0 for padding. Padding has hidden states too, and attention
            only keeps real tokens from seeing it, so nothing but the caller says where it is.

        Raises:
          ValueError: the model has no experts.
        """
        if self.config.experts is None:
            raise ValueError("hidden_with_routing: the model has no experts. Call hidden.")
        positions = self._positions(tokens_BT, segments_BT, branching)
        training = {"keys_B": keys_B, "neftune_noise_alpha": neftune_noise_alpha}
        hidden_MD, _, of_runs = self.model(tokens_BT, positions, remat=remat, counted_BT=counted_BT, **training)
        counts_SBE, probs_SBE, z_SB = (jnp.concatenate(parts) for parts in zip(*of_runs, strict=True))
        counts_BSE, probs_BSE, z_BS = (jnp.swapaxes(sums, 0, 1) for sums in (counts_SBE, probs_SBE, z_SB))
        tokens_B = counted_BT.sum(axis=1)
        return hidden_MD, Routing(counts_BSE=counts_BSE, probs_BSE=probs_BSE, z_BS=z_BS, tokens_B=tokens_B)

    def _positions(self, tokens_BT: jax.Array, segments_BT: jax.Array | None, branching: Branching | None) -> Positions:
        batch, length = tokens_BT.shape
        index_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        spans = None
        if segments_BT is not None:
            index_BT = _index_in_segment(segments_BT)
        if branching is not None:
            if segments_BT is None:
                raise ValueError("hidden: found branching without segments_BT. Pass the ids of segments too.")
            index_BT, spans, segments_BT = index_BT + branching.depths_BT, branching.spans(segments_BT), None
        return Positions.of(self.config, index_BT, segments_BT, length, spans)

    def extend(
        self,
        tokens_BT: Int[Array, "B T"],
        rows_BT: Int[Array, "B T"],
        index_BT: Int[Array, "B T"],
        cache: KVPages,
        length: int | None = None,
    ) -> tuple[Float[Array, "M D"], KVPages]:
        """Returns hidden states of tokens that continue rows of a cache, and the cache with them.

        Args:
          rows_BT: row of the cache of each token.
          index_BT: position of each token in its row; -1 is padding.
          length: largest number of positions of these rows, for rotations that depend on it; None: the model's.
        """
        positions = Positions.of(self.config, index_BT, None, length or self.config.max_positions)
        positions = dataclasses.replace(positions, rows_BT=rows_BT)
        hidden_MD, longer, _ = self.model(tokens_BT, positions, remat="none", cache=cache)
        assert longer is not None  # the model returns a cache if it gets one
        return hidden_MD, longer


def bytes_of(config: ModelConfig, weights: WeightFormat) -> int:
    """Returns the bytes of a base's weights in memory; none needs to be read."""
    return part_bytes(nnx.state(nnx.eval_shape(lambda: CausalLM(config, weights))))


def _index_in_segment(segments_BT: jax.Array) -> jax.Array:
    """Counts the earlier positions of the same segment."""
    batch, length = segments_BT.shape
    index_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index_BT - jax.lax.cummax(jnp.where(begins_BT, index_BT, 0), axis=1)
