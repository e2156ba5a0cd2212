"""Text halves of Qwen-VL and GLM-V models, whose rotary embedding has three positions per token (M-RoPE).

Time, height and width each rotate a section of the dimensions. A token of text has one position for all three, so on
text the rotation is that of one of the other families, and these configs become configs of it.
"""

import dataclasses
from collections.abc import Callable, Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import glm4, glm4_moe, qwen2, qwen3, qwen3_moe
from qlora_jax.models.families.attributes import DEFAULT_COUNTS

ROPE_ATTRIBUTES = ("rope_parameters", "rope_scaling")
SECTIONS = ("mrope_section", "mrope_interleaved")
KINDS, MROPE = ("rope_type", "type"), "mrope"
# Tokens of images, which published configs repeat for the text half.
IMAGE_TOKENS = tuple(
    f"{kind}_{place}token_id" for kind in ("image", "video", "vision") for place in ("", "start_", "end_")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextHalf:
    """A kind of text half.

    Attributes:
      family: `from_hf` of the family that computes the same on text.
      defaults: transformers' defaults that differ from the family's.
      fixed: attributes of the family that this kind implies, whatever its config says.
    """

    family: Callable[[Mapping[str, object], str], ModelConfig]
    defaults: Mapping[str, object] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, object] = dataclasses.field(default_factory=dict)


def _glm4v(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a config of GLM-4.1V's text half, whose heads are always as wide as the residual stream together."""
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int) and heads > 0:
        config = {**config, "head_dim": width // heads}
    return glm4.from_hf(config, name)


QWEN2 = TextHalf(
    family=qwen2.from_hf,
    defaults={"rope_theta": 1e6, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_window_layers": 80},
)
HALVES = {
    "qwen2_vl_text": QWEN2,
    "qwen2_5_vl_text": QWEN2,
    "qwen3_vl_text": TextHalf(
        family=qwen3.from_hf,
        defaults={"rope_theta": 5e5, "max_position_embeddings": 128000},
        fixed={"use_sliding_window": False},
    ),
    "qwen3_vl_moe_text": TextHalf(
        family=qwen3_moe.from_hf,
        defaults={
            "rope_theta": 5e5,
            "max_position_embeddings": 128000,
            "num_key_value_heads": 16,
            "num_local_experts": DEFAULT_COUNTS["qwen3_vl_moe_text"],
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
        },
        fixed={"norm_topk_prob": True, "use_sliding_window": False},
    ),
    "glm4v_text": TextHalf(
        family=_glm4v,
        defaults={"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0},
        fixed={"attention_bias": True},
    ),
    "glm4v_moe_text": TextHalf(
        family=glm4_moe.from_hf,
        defaults={"max_position_embeddings": 65536, "attention_bias": True},
        fixed={"use_qk_norm": False},
    ),
}
MODEL_TYPES = tuple(HALVES)


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of a text half to features.

    Raises:
      ValueError: all attributes that the family of its text does not support.
    """
    half = HALVES[str(config["model_type"])]
    stated = {key: value for key, value in config.items() if value is not None and key not in IMAGE_TOKENS}
    rotations = {key: _of_text(stated[key]) for key in ROPE_ATTRIBUTES if key in stated}
    return half.family({**half.defaults, **stated, **rotations, **half.fixed}, name)


def sections_of(config: Mapping[str, object]) -> list[object] | None:
    """Returns the numbers of rotary pairs that turn by time, height and width, unchecked; None without them."""
    stated = (config.get(name) for name in ROPE_ATTRIBUTES)
    sections = [numbers.get(SECTIONS[0]) for numbers in stated if isinstance(numbers, Mapping)]
    return next((each for each in sections if isinstance(each, list)), None)


def _of_text(numbers: object) -> object:
    """Returns the numbers of a rotary embedding without its sections."""
    if not isinstance(numbers, Mapping):
        return numbers  # reported by the family
    kept = {key: value for key, value in numbers.items() if key not in SECTIONS}
    return kept | {key: "default" for key in KINDS if kept.get(key) == MROPE}
