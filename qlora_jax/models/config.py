"""The features of a decoder. A family file maps a Hugging Face config to them."""

import collections
import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from pallas_kernels.nf4_matmul.preferred_layout import preferred_layout
from qlora_jax.nn.activations import ClampedSwiglu, GateActivation
from qlora_jax.nn.rope import LENGTH_DEPENDENT, SCALINGS, QueryPositionScale, Rope
from qlora_jax.nn.router import RoutingRule

# Modules of a layer's MLP, by the layers that have them.
OF_SPARSE = ("gate", "experts", "shared_experts", "shared_expert_gate")
OF_DENSE = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
MAX_EXPERTS = 1 << 12  # per layer; a multiple of the largest published models'
# transformers' parameters that have all experts of a layer: the projections that each of them fuses, in order.
FUSED_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig(RoutingRule):
    """The experts of the sparse layers, and the rule that chooses among them.

    Attributes:
      count: E, the experts of a layer.
      mlp_dim: F, inner width of one expert.
      layers: numbers of the sparse layers, ascending; the MLP of every other layer is dense.
      selection_bias: True if a bias is added to the scores only for the choice.
      router_bias: True if the router adds a bias to its logits.
      bias: True if the projections of experts add a bias.
      interleaved: True if transformers' parameter `gate_up_proj` has alternating outputs of gate and up. Here
        they are two weights.
      shared_mlp_dim: inner width of the expert that every token uses; 0: no such expert.
      shared_gate: True if the shared expert's result is multiplied by the sigmoid of a linear layer with one output.
    """

    count: int
    mlp_dim: int
    layers: tuple[int, ...]
    selection_bias: bool = False
    router_bias: bool = False
    bias: bool = False
    interleaved: bool = False
    shared_mlp_dim: int = 0
    shared_gate: bool = False

    def layers_with(self, module: str, num_layers: int) -> tuple[int, ...]:
        """Returns the layers whose MLP has a module, such as `gate_proj` or `experts`."""
        if module in OF_SPARSE:
            return self.layers
        every = range(num_layers)
        return tuple(layer for layer in every if layer not in self.layers) if module in OF_DENSE else tuple(every)

    def shapes(self, width: int) -> dict[str, tuple[int, int]]:
        """Returns {name within a layer: (N, K) of one expert} for a residual stream of `width`."""
        inner = {f"mlp.experts.{name}": (self.mlp_dim, width) for name in ("gate_proj", "up_proj")}
        return inner | {"mlp.experts.down_proj": (width, self.mlp_dim)}

    def other_parameters(self, width: int) -> int:
        """Returns the parameters of a sparse layer's router and of the gate of its shared expert."""
        return self.count * (width + self.router_bias) + self.shared_gate * width


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormPlacement:
    """The norms of a block, each by its Hugging Face name; None: no norm.

    Attributes:
      before_attention, before_mlp: norm of the input of attention or MLP.
      after_attention, after_mlp: norm of the result, before it is added to the residual stream.
      parallel: True if attention and MLP read the same residual stream, and both results are added to it.
    """

    before_attention: str | None = None
    after_attention: str | None = None
    before_mlp: str | None = None
    after_mlp: str | None = None
    parallel: bool = False

    @property
    def norms(self) -> tuple[str, ...]:
        """The distinct names."""
        names = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(dict.fromkeys(name for name in names if name is not None))


ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
ROUTER = "mlp.gate"  # our name within a layer
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


def _feature[T](default: T) -> T:
    """Declares a feature added after the first release: at its default it is not part of a fingerprint."""
    return dataclasses.field(default=default, metadata={"later": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The features of one decoder-only language model, which models/decoder.py and attention.py implement.

    Attributes:
      vocab_size: V, rows of the embedding.
      embed_dim: D, width of the residual stream.
      num_layers: L.
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads; N % K == 0.
      head_dim: H.
      mlp_dim: F, inner width of the MLP.
      norm_eps: added to the mean square (RMSNorm) or the variance (LayerNorm).
      rope: rotary embedding and its scaling; dimensions of a head beyond `rope.dim` are not rotated.
      tie_embeddings: True if the head is the embedding.
      qkv_bias, o_bias, mlp_bias: True if these projections add a bias.
      max_positions: longest sequence of pretraining.
      layout: a key of NORM_PLACEMENTS.
      norm: "rms", "layer" (with a bias), or "layer without bias".
      norm_offset: added to the weight of every norm.
      qk_norm: norm of queries and keys before rotation: of each "head", or over the whole "width"; None: no norm.
      clip_qkv: largest absolute value of queries and keys (after their norm, before rotation) and of values; None: no
        limit.
      windows: per layer, the number of positions that a query sees; None: all. Empty: no layer has a window.
      ropes: per layer, its rotary embedding; None: no rotation. Empty: all layers have `rope`.
      rope_interleaved: True if rotary pairs are neighbouring dimensions; False: they are half the rotated ones apart.
      query_scale: factor of the scores; None: H^-1/2.
      query_position_scale: factor of queries that grows with their position; None: 1.
      attention_softcap, head_softcap: c of c tanh(x / c) on scores and on logits; None: no cap.
      embed_scale: factor of the embedding's result; None: 1.
      residual_scale: factor of the results of attention and MLP that are added to the residual stream; None: 1.
      logit_scale: factor of the logits, before their cap; None: 1.
      attention_sinks: True if each query head has a logit that takes part in its softmax and has no value.
      activation: a key of nn.activations.ACTIVATIONS, or "clamped_swiglu" with `swiglu_alpha` and `swiglu_limit`.
      swiglu_alpha, swiglu_limit: numbers of nn.activations.ClampedSwiglu.
      gated: True for an MLP down(act(gate(x)) * up(x)), False for down(act(up(x))).
      fused_qkv: order of one fused projection: "parts" (all queries, all keys, all values) or "heads" (query, key and
        value of the first head, of the second, ...); None: three projections.
      fused_gate_up: True if one projection computes gate, then up.
      head_bias: True if the head adds a bias.
      names: (our name, Hugging Face's name) of each module whose names differ.
      experts: the experts of sparse layers; None: the MLP of every layer is dense.
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
    clip_qkv: float | None = _feature(None)
    windows: tuple[int | None, ...] = _feature(())
    ropes: tuple[Rope | None, ...] = _feature(())
    rope_interleaved: bool = _feature(False)
    query_scale: float | None = _feature(None)
    query_position_scale: QueryPositionScale | None = _feature(None)
    attention_softcap: float | None = _feature(None)
    head_softcap: float | None = _feature(None)
    embed_scale: float | None = _feature(None)
    residual_scale: float | None = _feature(None)
    logit_scale: float | None = _feature(None)
    attention_sinks: bool = _feature(False)
    activation: str = _feature("silu")
    swiglu_alpha: float | None = _feature(None)
    swiglu_limit: float | None = _feature(None)
    gated: bool = _feature(True)
    fused_qkv: str | None = _feature(None)
    fused_gate_up: bool = _feature(False)
    head_bias: bool = _feature(False)
    names: tuple[tuple[str, str], ...] = _feature(())
    experts: ExpertsConfig | None = _feature(None)

    def linear_shapes(self) -> dict[str, tuple[tuple[int, int], bool]]:
        """Returns {name within a layer: ((N out, K in), True if it has a bias)} of each projection.

        These are the plain matrices: of attention, of dense MLPs and of shared experts.
        """
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        apart = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        of_attention = {"qkv_proj": q + 2 * kv} if self.fused_qkv else apart
        return {
            **{f"self_attn.{name}": ((n, self.embed_dim), self.qkv_bias) for name, n in of_attention.items()},
            "self_attn.o_proj": ((self.embed_dim, q), self.o_bias),
            **self._mlp_shapes(),
        }

    def _mlp_shapes(self) -> dict[str, tuple[tuple[int, int], bool]]:
        experts, widths = self.experts, {}
        if experts is None or len(experts.layers) < self.num_layers:
            widths["mlp."] = self.mlp_dim
        if experts is not None and experts.shared_mlp_dim:
            widths["mlp.shared_experts."] = experts.shared_mlp_dim
        found = {}
        for prefix, f in widths.items():
            of_gated = {"gate_up_proj": 2 * f} if self.fused_gate_up else {"gate_proj": f, "up_proj": f}
            inner = of_gated if self.gated else {"up_proj": f}
            found |= {f"{prefix}{name}": ((n, self.embed_dim), self.mlp_bias) for name, n in inner.items()}
            found[f"{prefix}down_proj"] = ((self.embed_dim, f), self.mlp_bias)
        return found

    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns {name within a layer: (N out, K in) of one expert} of each projection of routed experts."""
        return {} if self.experts is None else self.experts.shapes(self.embed_dim)

    def expert_targets(self) -> dict[str, tuple[int, int]]:
        """Returns {name within a layer: (N out, K in) of one expert} of what an adapter on experts attaches to.

        The names are transformers' names of parameters; `gate_up_proj` stands for gate, then up.
        """
        shapes = self.expert_shapes()
        if not shapes:
            return {}
        (f, d), down = shapes["mlp.experts.gate_proj"], shapes["mlp.experts.down_proj"]
        return {"mlp.experts.gate_up_proj": (2 * f, d), "mlp.experts.down_proj": down}

    def layers_with(self, name: str) -> tuple[int, ...]:
        """Returns the layers that have a module, by its name within a layer, such as `mlp.experts.gate_proj`."""
        group, _, inner = name.partition(".")
        if self.experts is None or group != "mlp":
            return tuple(range(self.num_layers))
        return self.experts.layers_with(inner.partition(".")[0], self.num_layers)

    def norm_widths(self) -> dict[str, int]:
        """Name within a layer -> width, for each norm."""
        heads = {"q_norm": self.num_heads, "k_norm": self.num_kv_heads}
        over = {None: {}, "head": dict.fromkeys(heads, 1), "width": heads}[self.qk_norm]
        return {
            **{name: self.embed_dim for name in NORM_PLACEMENTS[self.layout].norms},
            **{f"self_attn.{name}": count * self.head_dim for name, count in over.items()},
        }

    def visible_counts(self, length: int) -> list[int]:
        """Returns per layer how many of `length` positions a query sees at most."""
        windows = self.windows or (None,) * self.num_layers
        return [length if window is None else min(window, length) for window in windows]

    @property
    def gate_activation(self) -> GateActivation:
        """The activation of a gated MLP, for `nn.activations.gated_activation`."""
        if self.activation != "clamped_swiglu":
            return self.activation
        assert self.swiglu_alpha is not None and self.swiglu_limit is not None, "clamped_swiglu has both numbers"
        return ClampedSwiglu(self.swiglu_alpha, self.swiglu_limit)

    @property
    def rotations_depend_on_length(self) -> bool:
        """True if the rotation of a position depends on the length of its row."""
        kinds = {rope.scaling.kind for rope in (self.rope, *self.ropes) if rope is not None}
        return bool(kinds & set(LENGTH_DEPENDENT))

    def parameters(self) -> int:
        """Returns the number of parameters of the base."""
        return self._parameters(0 if self.experts is None else self.experts.count)

    def active_parameters(self) -> int:
        """Returns the number of parameters that one token uses; embedding and head count in full."""
        return self._parameters(0 if self.experts is None else self.experts.per_token)

    def _parameters(self, experts_per_layer: int) -> int:
        norm_leaves = 2 if self.norm == "layer" else 1
        sinks = self.num_layers * self.num_heads * self.attention_sinks
        linear = sum(
            len(self.layers_with(name)) * (n * k + n * has_bias)
            for name, ((n, k), has_bias) in self.linear_shapes().items()
        )
        norms = norm_leaves * (self.num_layers * sum(self.norm_widths().values()) + self.embed_dim)
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * self.embed_dim
        others = sinks + norms + tables + self.head_bias * self.vocab_size
        return linear + self._sparse_parameters(experts_per_layer) + others

    def _sparse_parameters(self, experts_per_layer: int) -> int:
        if self.experts is None:
            return 0
        of_expert = sum(n * k + n * self.experts.bias for n, k in self.expert_shapes().values())
        others = self.experts.other_parameters(self.embed_dim)
        return len(self.experts.layers) * (experts_per_layer * of_expert + others)

    def hugging_face_name(self, name: str) -> str:
        """Returns the Hugging Face name of `model.layers.mlp.up_proj`, with or without the layer's index."""
        dotted = f".{name}."
        for ours, theirs in self.names:
            dotted = dotted.replace(f".{ours}.", f".{theirs}.")
        return dotted.strip(".")

    def fingerprint_features(self) -> dict[str, object]:
        """Returns the features as plain values, without later features at their defaults, so that fingerprints stay."""
        described = dataclasses.asdict(self)
        later = [field for field in dataclasses.fields(self) if "later" in field.metadata]
        unused = {field.name for field in later if getattr(self, field.name) == field.default}
        return {name: value for name, value in described.items() if name not in unused}


STORED = "stored"  # quant_type: linear layers keep the codes that the files have
NVFP4 = "nvfp4"  # quant_type: linear layers in blocks of NVFP4
INT4, MXFP4 = "int4", "mxfp4"  # values of lora.merge_into; int4 is groups of integers there
IN_BLOCKS = (STORED, NVFP4)  # values of quant_type that meshes do not cut
QUANTIZED, DENSE = "4-bit", "dense"  # formats of layers; others are types of blocks


def count_by_type(types: Iterable[str]) -> str:
    """Returns types of layers as text, each with its number of layers: "12 layers in Q4_K, 1 layer in Q6_K"."""
    counts = collections.Counter(types).most_common()
    return ", ".join(f"{count} layer{'s' * (count > 1)} in {kind}" for kind, count in counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """The format of the frozen weights in memory.

    Attributes:
      quant_type: NVFP4 or a key of CODE_TABLES, for the linear layers; None: dense, in `dtype`; STORED: see `stored`.
      block_size: weights that share one scale.
      double_quant: True if scales are quantized to 8 bits.
      nested_block_size: scales that share one scale.
      dense: (projection's name within a layer, indices of its dense layers), for projections quantized in part.
      stored: (projection's name within a layer, the type of blocks or DENSE of each of its layers).
      platform: `cpu`, `gpu` or `tpu`, as JAX names it; determines the layout of the codes.
      dtype: dtype of embedding, head, norms, biases and activations.
      experts_on_host: True if the weights of routed experts are in host memory (models/partition.py).
    """

    quant_type: str | None = "nf4"
    block_size: int = 64
    double_quant: bool = True
    nested_block_size: int = 256
    dense: tuple[tuple[str, tuple[int, ...]], ...] = ()
    stored: tuple[tuple[str, tuple[str, ...]], ...] = ()
    platform: str = "cpu"
    dtype: str = "bfloat16"
    experts_on_host: bool = False

    @property
    def stored_counts(self) -> str:
        """The types of the codes of a file, each with its number of layers; empty if none are kept."""
        return count_by_type(kind for _, formats in self.stored for kind in formats if kind != DENSE)

    def formats(self, name: str, num_layers: int) -> tuple[str, ...]:
        """Returns the format of each layer of a projection: QUANTIZED, DENSE, or a type of blocks."""
        if self.quant_type is None:
            return (DENSE,) * num_layers
        if self.quant_type == STORED:
            return dict(self.stored)[name]
        dense = dict(self.dense).get(name, ())
        return tuple(DENSE if layer in dense else QUANTIZED for layer in range(num_layers))

    def parts(self, name: str, num_layers: int) -> dict[str, tuple[int, ...]]:
        """Returns {format: indices of a projection's layers that have it, ascending}; DENSE is last."""
        formats = self.formats(name, num_layers)
        in_order = sorted(dict.fromkeys(formats), key=lambda each: each == DENSE)
        return {each: tuple(at for at, found in enumerate(formats) if found == each) for each in in_order}

    def layout_for(self, shape: tuple[int, int]) -> str:
        """Returns the layout of a weight (N, K)."""
        return preferred_layout(self.platform, shape, self.block_size)


def config_differences(ours: ModelConfig, theirs: ModelConfig) -> list[tuple[str, str, str]]:
    """(name, ours, theirs) of every feature that computes something else, at f32 precision."""
    pairs = [(f.name, getattr(ours, f.name), getattr(theirs, f.name)) for f in dataclasses.fields(ModelConfig)]
    return [(name, _short(one), _short(other)) for name, one, other in pairs if not _equal(one, other)]


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    text = f"{value.theta:g} {value.scaling.kind}" if isinstance(value, Rope) else repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _equal(ours: object, theirs: object) -> bool:
    """True if two values are equal at f32 precision; rotations are compared by the angles that they compute."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    if isinstance(ours, Rope) and isinstance(theirs, Rope):
        return _equal_rotations(ours, theirs)
    if isinstance(ours, QueryPositionScale) and isinstance(theirs, QueryPositionScale):
        return _equal(dataclasses.astuple(ours), dataclasses.astuple(theirs))
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs


def _equal_rotations(ours: Rope, theirs: Rope) -> bool:
    if ours.dim != theirs.dim:
        return False
    # Some scalings change their angles beyond the trained context, so both sides of it are compared.
    for length in (1, 2 * ours.max_positions):
        (frequencies, factor), (others, other) = (SCALINGS[rope.scaling.kind](rope, length) for rope in (ours, theirs))
        if not (np.allclose(frequencies, others, rtol=1e-5, atol=0) and math.isclose(factor, other, rel_tol=1e-6)):
            return False
    return True
