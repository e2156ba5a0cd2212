"""What a decoder is made of, as features; a family file maps a Hugging Face config to them."""

import dataclasses
from typing import Any

from pallas_kernels.nf4_matmul.preferred_layout import preferred_layout
from qlora_jax.nn.rope import LENGTH_DEPENDENT, Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormPlacement:
    """Where the norms of a block stand, each by Hugging Face's name; None: there is none.

    Attributes:
      before_attention, before_mlp: of what the part reads.
      after_attention, after_mlp: of what it gives, before that is added to the residual stream.
      parallel: attention and MLP read the same residual stream, and both are added to it at once.
    """

    before_attention: str | None = None
    after_attention: str | None = None
    before_mlp: str | None = None
    after_mlp: str | None = None
    parallel: bool = False

    @property
    def norms(self) -> tuple[str, ...]:
        """The names, each once."""
        names = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(dict.fromkeys(name for name in names if name is not None))


ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
NORM_PLACEMENTS = {
    "pre": NormPlacement(before_attention=ATTENTION_NORM, before_mlp=MLP_NORM),
    "post": NormPlacement(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm"),
    "both": NormPlacement(
        before_attention=ATTENTION_NORM,
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
    "parallel": NormPlacement(before_attention=ATTENTION_NORM, before_mlp=MLP_NORM, parallel=True),
    "parallel, one norm": NormPlacement(before_attention=ATTENTION_NORM, before_mlp=ATTENTION_NORM, parallel=True),
}


def _feature(default: Any) -> Any:
    """A feature that came later: where it is at its default, a fingerprint does not tell of it."""
    return dataclasses.field(default=default, metadata={"later": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The features of one decoder-only language model, each of them honoured by models/decoder.py or attention.py.

    Attributes:
      vocab_size: V, rows of the embedding.
      embed_dim: D, width of the residual stream.
      num_layers: L.
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads; N % K == 0.
      head_dim: H.
      mlp_dim: F, inner width of the MLP.
      norm_eps: added to the mean square (RMSNorm) or the variance (LayerNorm).
      rope: rotary embedding and its scaling; where its `dim` is less than H, the rest of a head is not turned.
      tie_embeddings: the head is the embedding itself.
      qkv_bias, o_bias, mlp_bias: which projections add a bias.
      max_positions: longest sequence that the model was made for.
      layout: a key of NORM_PLACEMENTS.
      norm: "rms", or "layer" (with a bias).
      norm_offset: added to the weight of every norm.
      qk_norm: queries and keys are normalized before they are turned: each "head" alone, or over the whole "width".
      windows: of each layer, how many positions a query sees; None: all. Empty: no layer has one.
      ropes: of each layer, where they differ; None: positions are not turned. Empty: all have `rope`.
      query_scale: of the scores, instead of H^-1/2.
      attention_softcap, head_softcap: c of c tanh(x / c), on scores and on logits.
      embed_scale: the embedding's result is multiplied with it.
      activation: a key of nn.mlp.ACTIVATIONS.
      gated: the MLP is down(act(gate(x)) * up(x)) rather than down(act(up(x))).
      fused_qkv: one projection gives "parts" (all queries, all keys, all values) or "heads" (query, key and value of
        the first head, of the second, ...).
      fused_gate_up: one projection gives all of gate, then all of up.
      head_bias: the head adds a bias.
      names: (our name, Hugging Face's) of each module that is called otherwise there.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float
    rope: Rope
    tie_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    max_positions: int
    layout: str = _feature("pre")
    norm: str = _feature("rms")
    norm_offset: float = _feature(0.0)
    qk_norm: str | None = _feature(None)
    windows: tuple[int | None, ...] = _feature(())
    ropes: tuple[Rope | None, ...] = _feature(())
    query_scale: float | None = _feature(None)
    attention_softcap: float | None = _feature(None)
    head_softcap: float | None = _feature(None)
    embed_scale: float | None = _feature(None)
    activation: str = _feature("silu")
    gated: bool = _feature(True)
    fused_qkv: str | None = _feature(None)
    fused_gate_up: bool = _feature(False)
    head_bias: bool = _feature(False)
    names: tuple[tuple[str, str], ...] = _feature(())

    def linear_shapes(self) -> dict[str, tuple[tuple[int, int], bool]]:
        """Name within a layer -> ((N out, K in), has a bias), for each projection."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d, f = self.embed_dim, self.mlp_dim
        apart = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        of_attention = {"qkv_proj": q + 2 * kv} if self.fused_qkv else apart
        of_gated = {"gate_up_proj": 2 * f} if self.fused_gate_up else {"gate_proj": f, "up_proj": f}
        of_mlp = of_gated if self.gated else {"up_proj": f}
        return {
            **{f"self_attn.{name}": ((n, d), self.qkv_bias) for name, n in of_attention.items()},
            "self_attn.o_proj": ((d, q), self.o_bias),
            **{f"mlp.{name}": ((n, d), self.mlp_bias) for name, n in of_mlp.items()},
            "mlp.down_proj": ((d, f), self.mlp_bias),
        }

    def norm_widths(self) -> dict[str, int]:
        """Name within a layer -> width, for each norm."""
        heads = {"q_norm": self.num_heads, "k_norm": self.num_kv_heads}
        over = {None: {}, "head": dict.fromkeys(heads, 1), "width": heads}[self.qk_norm]
        return {
            **{name: self.embed_dim for name in NORM_PLACEMENTS[self.layout].norms},
            **{f"self_attn.{name}": count * self.head_dim for name, count in over.items()},
        }

    def visible_counts(self, length: int) -> list[int]:
        """Of `length` positions, how many a query of each layer sees."""
        windows = self.windows or (None,) * self.num_layers
        return [length if window is None else min(window, length) for window in windows]

    def has_plain_attention(self, length: int) -> bool:
        """Whether scores have no soft cap, and all layers see the same of `length` positions."""
        return self.attention_softcap is None and len(set(self.visible_counts(length))) == 1

    @property
    def supports_shared_prefix(self) -> bool:
        """Whether a row may be a text with several continuations: what a token sees is neither limited by a window nor
        turned by the length of its row."""
        kinds = {rope.scaling.kind for rope in (self.rope, *self.ropes) if rope is not None}
        return not any(self.windows or ()) and not kinds & set(LENGTH_DEPENDENT)

    def parameters(self) -> int:
        """How many numbers the base holds."""
        norm_leaves = 2 if self.norm == "layer" else 1
        linear = sum(n * k + n * has_bias for (n, k), has_bias in self.linear_shapes().values())
        norms = norm_leaves * (self.num_layers * sum(self.norm_widths().values()) + self.embed_dim)
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * self.embed_dim
        return self.num_layers * linear + norms + tables + self.head_bias * self.vocab_size

    def hugging_face_name(self, name: str) -> str:
        """`model.layers.mlp.up_proj` as the model's own checkpoints call it, with the layer's index or without."""
        dotted = f".{name}."
        for ours, theirs in self.names:
            dotted = dotted.replace(f".{ours}.", f".{theirs}.")
        return dotted.strip(".")

    def fingerprint_features(self) -> dict[str, Any]:
        """The features as plain values; those that came later only where they are used, so that fingerprints stay."""
        described = dataclasses.asdict(self)
        later = [field for field in dataclasses.fields(self) if "later" in field.metadata]
        unused = {field.name for field in later if getattr(self, field.name) == field.default}
        return {name: value for name, value in described.items() if name not in unused}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How the frozen weights are held.

    Attributes:
      quant_type: a key of CODE_TABLES for the linear layers, or None: dense, in `dtype`.
      dense: of projections by their names within a layer, the layers that are dense although others are quantized.
      platform: the device's, as jax names it; chooses the layout of the codes.
      dtype: of embedding, head, norms and biases, and of activations.
    """

    quant_type: str | None = "nf4"
    block_size: int = 64
    double_quant: bool = True
    nested_block_size: int = 256
    dense: tuple[tuple[str, tuple[int, ...]], ...] = ()
    platform: str = "cpu"
    dtype: str = "bfloat16"

    def dense_layers(self, name: str, num_layers: int) -> tuple[int, ...]:
        """Which layers of a projection are dense, ascending."""
        return tuple(range(num_layers)) if self.quant_type is None else dict(self.dense).get(name, ())

    def layout_for(self, shape: tuple[int, int]) -> str:
        """The layout that a weight of (N, K) gets."""
        return preferred_layout(self.platform, shape, self.block_size)
