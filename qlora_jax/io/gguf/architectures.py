"""The GGUF architectures that are read and written: a table, in llama.cpp's names and Hugging Face's."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

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


ROUTED = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
NORMS_BEHIND = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
FOUR_NORMS = NORMS_BEHIND | {"ffn_norm": "pre_feedforward_layernorm"}

HEAD, OUTPUT_BIAS = "output.weight", ("attn_output.bias",)
ATTENTION_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias", *OUTPUT_BIAS)
MLP_BIASES = ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")

LAYER_EPS = {"attention.layer_norm_epsilon": "layer_norm_eps"}
SILU = {"hidden_act": "silu"}
ATTENTION_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
BIASES = ATTENTION_BIAS | {"mlp_bias": "blk.0.ffn_gate.bias"}
WINDOW = {"attention.sliding_window": "sliding_window"}
EXPERTS_USED = {"expert_used_count": "num_experts_per_tok"}
INNER_WIDTH = {"expert_feed_forward_length": "moe_intermediate_size"}
SAME_WIDTH = {"expert_feed_forward_length": "feed_forward_length"}
SOFTCAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}

TEXT = (
    Architecture(
        name="llama",
        model_type="llama",
        class_name="LlamaForCausalLM",
        permutes_rotary_rows=True,
        biases=BIASES,
        fixed=SILU,
        also=("mistral",),
        rope_tables=(ROPE_FACTORS,),
    ),
    Architecture(name="qwen2", model_type="qwen2", class_name="Qwen2ForCausalLM", fixed=SILU, square=True),
    Architecture(
        name="qwen3",
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        modules=QK_NORMS,
        biases=ATTENTION_BIAS,
        fixed=SILU,
        never=OUTPUT_BIAS,
    ),
    Architecture(
        name="smollm3",
        model_type="smollm3",
        class_name="SmolLM3ForCausalLM",
        permutes_rotary_rows=True,
        biases=BIASES,
        fixed=SILU | {"no_rope_layer_interval": 4},  # the only interval that llama.cpp supports
        never=(*OUTPUT_BIAS, *MLP_BIASES),
    ),
    Architecture(
        name="olmo2",
        model_type="olmo2",
        class_name="Olmo2ForCausalLM",
        modules=QK_NORMS | NORMS_BEHIND,
        attributes=WINDOW,
        biases=ATTENTION_BIAS,
        fixed=SILU,
        window_period=4,
        variants={
            "attention.sliding_window": Variant(model_type="olmo3", class_name="Olmo3ForCausalLM", rope_per_window=True)
        },
        also=("olmo3",),
        never=ATTENTION_BIASES,
        always=(HEAD,),
        square=True,
    ),
    Architecture(
        name="exaone4",
        model_type="exaone4",
        class_name="Exaone4ForCausalLM",
        modules=QK_NORMS | NORMS_BEHIND,
        attributes=WINDOW,
        fixed=SILU,
        window_period=4,
        window_layers=64,
        rope_tables=(ROPE_FACTORS,),
    ),
    Architecture(
        name="seed_oss",
        model_type="seed_oss",
        class_name="SeedOssForCausalLM",
        modules={"post_attention_norm": "post_attention_layernorm"},
        biases=BIASES | {"attention_out_bias": "blk.0.attn_output.bias"},
        fixed=SILU,
        never=(*OUTPUT_BIAS, *MLP_BIASES),
    ),
    Architecture(
        name="glm4",
        model_type="glm4",
        class_name="Glm4ForCausalLM",
        modules={
            "ffn_up": "mlp.gate_up_proj",
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        biases=ATTENTION_BIAS,
        partial="partial_rotary_factor",
        fixed=SILU,
    ),
    Architecture(
        name="granite",
        model_type="granite",
        class_name="GraniteForCausalLM",
        permutes_rotary_rows=True,
        attributes={
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        query_scale={"attention.scale": "attention_multiplier"},
        biases=BIASES,
        fixed=SILU,
        rope_tables=(ROPE_FACTORS,),
    ),
    Architecture(
        name="cohere2",
        model_type="cohere2",
        class_name="Cohere2ForCausalLM",
        eps=LAYER_EPS,
        attributes=WINDOW | {"logit_scale": "logit_scale"},
        biases=ATTENTION_BIAS,
        fixed=SILU,
        window_period=4,
        never=(*OUTPUT_BIAS, HEAD),
        square=True,
    ),
    Architecture(
        name="mistral3",
        model_type="mistral",
        class_name="MistralForCausalLM",
        permutes_rotary_rows=True,
        fixed=SILU | {"sliding_window": None},
        rope_attributes={
            "rope.scaling.yarn_log_multiplier": ("mscale_all_dim", "mscale"),
            TEMPERATURE: ("llama_4_scaling_beta",),
        },
        variants={TEMPERATURE: Variant(model_type="ministral3", class_name="Ministral3ForCausalLM")},
        also=("ministral3",),
        rope_tables=(ROPE_FACTORS,),
    ),
    Architecture(
        name="gemma",
        model_type="gemma",
        class_name="GemmaForCausalLM",
        norm_offset=1.0,
        biases=ATTENTION_BIAS,
        never=(*OUTPUT_BIAS, HEAD),
    ),
    Architecture(
        name="gemma2",
        model_type="gemma2",
        class_name="Gemma2ForCausalLM",
        modules=FOUR_NORMS,
        norm_offset=1.0,
        attributes=WINDOW | SOFTCAPS,
        biases=ATTENTION_BIAS,
        query_scalar_layers=46,
        never=(*OUTPUT_BIAS, HEAD),
    ),
    Architecture(
        name="gemma3",
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        modules=QK_NORMS | FOUR_NORMS,
        norm_offset=1.0,
        attributes=WINDOW
        | SOFTCAPS
        | {
            "attention.sliding_window_pattern": "sliding_window_pattern",
            "rope.freq_base_swa": "rope_local_base_freq",
        },
        biases=ATTENTION_BIAS,
        query_scalar_layers=62,
        ignored=("mm.", "vision."),  # Google's files of text models have them
        never=OUTPUT_BIAS,
    ),
    Architecture(
        name="phi2",
        model_type="phi",
        class_name="PhiForCausalLM",
        modules={
            "output_norm": "model.final_layernorm",
            "attn_output": "self_attn.dense",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        },
        eps=LAYER_EPS,
        partial="partial_rotary_factor",
        always=(HEAD,),
        square=True,
    ),
    Architecture(
        name="phi3",
        model_type="phi3",
        class_name="Phi3ForCausalLM",
        modules={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        attributes=WINDOW,
        partial="partial_rotary_factor",
        fixed=SILU,
        rope_tables=tuple(LONGROPE_FACTORS.values()),
        square=True,
    ),
    Architecture(
        name="gptneox",
        model_type="gpt_neox",
        class_name="GPTNeoXForCausalLM",
        modules={
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        layers="gpt_neox.layers",
        fused_by_part=True,
        eps=LAYER_EPS,
        attributes={"use_parallel_residual": "use_parallel_residual"},
        biases={"attention_bias": "blk.0.attn_qkv.bias"},
        partial="rotary_pct",
        always=(HEAD, "attn_qkv.bias"),
        square=True,
    ),
    Architecture(
        name="qwen2moe",
        model_type="qwen2_moe",
        class_name="Qwen2MoeForCausalLM",
        modules=ROUTED
        | {
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
        },
        required={
            "expert_count": "num_experts",
            **EXPERTS_USED,
            **INNER_WIDTH,
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        biases={"qkv_bias": "blk.0.attn_q.bias"},
        fixed=SILU | {"norm_topk_prob": False, "decoder_sparse_step": 1},
        square=True,
    ),
    Architecture(
        name="qwen3moe",
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        modules=ROUTED | QK_NORMS,
        required={"expert_count": "num_experts", **EXPERTS_USED, **INNER_WIDTH},
        biases=ATTENTION_BIAS,
        fixed=SILU | {"norm_topk_prob": True, "decoder_sparse_step": 1},
        neutral={
            "expert_gating_func": 1,  # softmax
            "expert_weights_norm": True,
            "expert_shared_feed_forward_length": 0,  # in files of Qwen3-Coder
        },
        never=OUTPUT_BIAS,
    ),
    Architecture(
        name="olmoe",
        model_type="olmoe",
        class_name="OlmoeForCausalLM",
        modules=ROUTED | QK_NORMS,
        required={"expert_count": "num_experts", **EXPERTS_USED},
        biases=ATTENTION_BIAS,
        fixed=SILU | {"norm_topk_prob": False},
        equal=SAME_WIDTH,
        never=OUTPUT_BIAS,
        always=(HEAD,),
        square=True,
    ),
    Architecture(
        name="glm4moe",
        model_type="glm4_moe",
        class_name="Glm4MoeForCausalLM",
        modules=ROUTED
        | QK_NORMS
        | {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
            "ffn_up_shexp": "mlp.shared_experts.up_proj",
            "ffn_down_shexp": "mlp.shared_experts.down_proj",
        },
        attributes={
            "leading_dense_block_count": "first_k_dense_replace",
            "expert_weights_scale": "routed_scaling_factor",
            "expert_weights_norm": "norm_topk_prob",
            "expert_group_count": "n_group",
            "expert_group_used_count": "topk_group",
            "nextn_predict_layers": "num_nextn_predict_layers",
        },
        absent={"first_k_dense_replace": 0, "norm_topk_prob": False},
        required={
            "expert_count": "n_routed_experts",
            **EXPERTS_USED,
            **INNER_WIDTH,
            "expert_shared_count": "n_shared_experts",
        },
        only={"expert_gating_func": 2},  # sigmoid
        biases=ATTENTION_BIAS | {"use_qk_norm": "blk.0.attn_q_norm.weight"},
        partial="partial_rotary_factor",
        fixed=SILU,
        never=OUTPUT_BIAS,
    ),
    Architecture(
        name="gpt-oss",
        model_type="gpt_oss",
        class_name="GptOssForCausalLM",
        modules=ROUTED | {"ffn_gate_inp": "mlp.router", "post_attention_norm": "post_attention_layernorm"},
        attributes=WINDOW,
        required={
            "expert_count": "num_local_experts",
            **EXPERTS_USED,
            "expert_feed_forward_length": "intermediate_size",
        },
        biases=ATTENTION_BIAS,
        fixed=SILU,
        untruncated_yarn=True,
        always=("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"),
    ),
)
MIXTRAL = Architecture(
    name="llama",
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    modules=ROUTED,
    permutes_rotary_rows=True,
    required={"expert_count": "num_local_experts", **EXPERTS_USED},
    fixed=SILU,
    equal=SAME_WIDTH,
    rope_tables=(ROPE_FACTORS,),
)
_OF_NAME = {architecture.name: architecture for architecture in TEXT}


def _text_half(of: str, *model_types: str, name: str = "", **others: Any) -> Architecture:
    """Returns the architecture of text halves of models of images and text, which are read as models of `of`."""
    return dataclasses.replace(_OF_NAME[of], name=name or of, also=model_types, sections=True, **others)


TEXT_HALVES = (
    _text_half("qwen2", "qwen2_vl_text", "qwen2_5_vl_text", name="qwen2vl"),
    _text_half("qwen3", "qwen3_vl_text", name="qwen3vl", ignored=(DEEPSTACK,)),
    _text_half("qwen3moe", "qwen3_vl_moe_text", name="qwen3vlmoe", ignored=(DEEPSTACK,)),
)
GLM4V, GLM4V_MOE = _text_half("glm4", "glm4v_text", rotary_halves=True), _text_half("glm4moe", "glm4v_moe_text")
# Architectures that have the name of another one; a key that files of the other one lack tells them apart.
OF_KEY = {("llama", "expert_count"): MIXTRAL, ("glm4", SECTIONS): GLM4V, ("glm4moe", SECTIONS): GLM4V_MOE}
ARCHITECTURES = _OF_NAME | {architecture.name: architecture for architecture in TEXT_HALVES}
# The first architecture of a model_type is the one that is written.
OF_MODEL_TYPE = {
    kind: each
    for each in reversed((*ARCHITECTURES.values(), *OF_KEY.values()))
    for kind in (each.model_type, *each.also)
}
