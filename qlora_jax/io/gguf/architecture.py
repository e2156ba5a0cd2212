"""The mapping of one GGUF architecture to Hugging Face: tensor names, metadata keys, and changes by the converter."""

import dataclasses
import re
from collections.abc import Mapping

MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# GGUF's name of a tensor whose leaf differs from Hugging Face's.
LEAVES = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias", "attn_sinks.weight": "self_attn.sinks"}
EXPERT = re.compile(r"\.experts\.(\d+)\.")

ROPE_FACTORS = "rope_freqs.weight"  # the divisor of each rotary frequency in Llama 3.1's scaling
LONGROPE_FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}

RMS_EPS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
PATTERN = "attention.sliding_window_pattern"  # one number, or per layer whether it has a window
TEMPERATURE = "attention.temperature_scale"
# Of models of images and text, for each position of a token (time, height, width, one more that is 0 on text) the
# number of rotary pairs that turn by it.
SECTIONS = "rope.dimension_sections"
DEEPSTACK = "n_deepstack_layers"  # number of the first layers that add features of images


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A model that shares an architecture with others.

    Attributes:
      model_type, class_name: Hugging Face's names.
      rope_per_window: its config has the rotary embeddings of layers without and with a window apart.
    """

    model_type: str
    class_name: str
    rope_per_window: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The mapping of one GGUF architecture to Hugging Face.

    Attributes:
      name: value of general.architecture, and prefix of the keys.
      model_type, class_name: Hugging Face's names.
      modules: Hugging Face's module by GGUF's name, for those that differ from MODULES.
      layers: prefix of the layers' names.
      permutes_rotary_rows: the converter moved the rows of q and k, so that rotary pairs are neighbours.
      rotary_halves: the converter moved the rows of q and k, so that rotary pairs, neighbours before, are halves.
      fused_by_part: the converter moved the rows of fused queries, keys and values from Hugging Face's order (per head)
        to all queries, all keys, all values.
      norm_offset: the constant that the converter added to every norm's weight.
      eps: the key of the norms' epsilon -> Hugging Face's attribute.
      attributes: further optional keys -> Hugging Face's attributes.
      absent: values of such attributes without their key.
      required: further keys that every file has -> Hugging Face's attributes.
      only: keys that may have only one value; written files have it.
      neutral: keys that may have only one value, which changes nothing; they are not written.
      equal: keys that may have only the value of another key, which changes nothing; they are not written.
      sections: SECTIONS is required; a token of text has equal positions, so the rotation is the plain one.
      ignored: prefixes of keys of other parts of the model, such as an image tower.
      biases: attributes without a key -> the tensor whose presence implies them.
      partial: the attribute for the rotated fraction of a head; None if all of it is rotated.
      fixed: attributes that the architecture implies.
      query_scalar_layers: a model with this many layers scales queries by embed_dim / heads, others by head_dim; GGUF
        has no key for it, so llama.cpp decides by the number of layers. 0: the architecture has no separate scale.
      query_scale: the attribute for the scale of the scores; a file without the key means head_dim^-1/2.
      rope_attributes: further optional keys -> attributes of the config's rope scaling.
      window_period: in a file without PATTERN, all layers but every such one have a window; 0: windows have no pattern,
        or it is an attribute.
      window_layers: only a model with this many layers has windows, whatever the file says; 0: any model.
      variants: key -> the model that a file with this key contains.
      also: further model_types of Hugging Face that use this architecture.
      rope_tables: tensors of rotary factors that llama.cpp reads; without one it cannot scale each frequency.
      never: name suffixes of tensors that llama.cpp cannot load in this architecture.
      always: name suffixes of tensors that llama.cpp requires in this architecture.
      untruncated_yarn: YaRN is the family's default scaling, and does not round the limits of its ramp. GGUF has no key
        for that, and llama.cpp rounds them.
      square: llama.cpp assumes num_heads * head_dim = embed_dim.
    """

    name: str
    model_type: str
    class_name: str
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layers: str = "model.layers"
    permutes_rotary_rows: bool = False
    rotary_halves: bool = False
    fused_by_part: bool = False
    norm_offset: float = 0.0
    eps: Mapping[str, str] = dataclasses.field(default_factory=lambda: RMS_EPS)
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    absent: Mapping[str, int | float | bool] = dataclasses.field(default_factory=dict)
    required: Mapping[str, str] = dataclasses.field(default_factory=dict)
    only: Mapping[str, int] = dataclasses.field(default_factory=dict)
    neutral: Mapping[str, int | bool] = dataclasses.field(default_factory=dict)
    equal: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sections: bool = False
    ignored: tuple[str, ...] = ()
    biases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    partial: str | None = None
    fixed: Mapping[str, str | int | None] = dataclasses.field(default_factory=dict)
    query_scalar_layers: int = 0
    query_scale: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rope_attributes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    window_period: int = 0
    window_layers: int = 0
    variants: Mapping[str, Variant] = dataclasses.field(default_factory=dict)
    also: tuple[str, ...] = ()
    rope_tables: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    square: bool = False
    untruncated_yarn: bool = False

    def hugging_face_name(self, layer: str | None, part: str, leaf: str, expert: str | None = None) -> str | None:
        """Maps ("3", "attn_q", "weight") to "model.layers.3.self_attn.q_proj.weight"; None for an unknown part.

        Args:
          expert: number of the expert, which exactly the parts of experts have.
        """
        module = self.modules.get(part, MODULES.get(part))
        name = LEAVES.get(f"{part}.{leaf}", None if module is None else f"{module}.{leaf}")
        if name is None or (".experts." in name) != (expert is not None):
            return None
        name = name.replace(".experts.", f".experts.{expert}.")
        return name if layer is None else f"{self.layers}.{layer}.{name}"

    def gguf_name(self, name: str) -> str:
        """Maps "model.layers.3.self_attn.q_proj.weight" to "blk.3.attn_q.weight".

        Raises:
          KeyError: the architecture has no such name.
        """
        # The architecture's modules come last, so they override those of MODULES with the same name.
        parts = {module: part for part, module in {**MODULES, **self.modules}.items()}
        if not name.startswith(f"{self.layers}."):
            module, leaf = name.rsplit(".", 1)
            return f"{parts[module]}.{leaf}"
        layer, name = name.removeprefix(f"{self.layers}.").split(".", 1)
        special = {theirs: ours for ours, theirs in LEAVES.items()}
        if name in special:
            return f"blk.{layer}.{special[name]}"
        expert = EXPERT.search(name)
        module, leaf = EXPERT.sub(".experts.", name).rsplit(".", 1)
        return f"blk.{layer}.{parts[module]}{f'.{expert[1]}' if expert else ''}.{leaf}"
