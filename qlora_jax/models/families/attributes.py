"""Reads a Hugging Face config so that no attribute is overlooked."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, cast

from pydantic import Field

from qlora_jax.models.config import MAX_EXPERTS, ExpertsConfig
from qlora_jax.nn.router import BEST_OF_GROUP
from qlora_jax.untrusted_json import JsonObject, Kind, find_problems, shorten, shorten_key

MAX_NUMBER = 1e30  # f32 holds it, and its product with a size
type Positive = Annotated[float, Field(gt=0, le=MAX_NUMBER)]
type NotNegative = Annotated[float, Field(ge=0, le=MAX_NUMBER)]

# Sizes beyond these, a multiple of the largest published models', are damage. They are refused before anything loops
# over layers or computes with shapes.
LIMITS = {
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), MAX_EXPERTS),
    "n_shared_experts": 1 << 8,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 1 << 20),
}
DEFAULT_LIMIT = 2**31 - 1

# {Hugging Face's name of an activation: ours}; several of theirs are one function.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Attributes that do not change what a forward pass computes: names, training-time and generation settings.
HARMLESS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "label2id",
        "model_type",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "quantization_config",
        "resid_pdrop",
        "return_dict",
        "rope_interleaved",
        "router_aux_loss_coef",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
        "cache_implementation",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "hidden_dropout",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "problem_type",
        "tokenizer_class",
        # Generation settings, which older versions of transformers wrote into a `text_config`.
        *("length_penalty", "max_length", "num_beam_groups", "num_beams", "num_return_sequences"),
        *("repetition_penalty", "temperature", "top_k", "top_p", "typical_p", "_attn_implementation_autoset"),
        "is_composition",
    ]
)


@functools.cache
def _whole(limit: int) -> Kind:
    return Annotated[int, Field(ge=1, le=limit)]


class Attributes:
    """A config's attributes. It records which ones were read, and `finish` raises all problems at once."""

    def __init__(self, config: Mapping[str, object], name: str):
        """`name` is the config's file, for messages."""
        self._config, self._name = config, name
        self._read = set(HARMLESS)
        self._problems: list[str] = []

    def _get[T](self, name: str, default: object, kind: Kind, replacement: T) -> T:
        """Reads a value of type `kind`; one of another type is a problem, and `replacement` is returned."""
        self._read.add(name)
        value = self._config.get(name)
        if value is None:
            value = default
        problems = [f"{name}: missing"] if value is None else find_problems(value, kind, name)
        self._problems += problems
        return replacement if problems else cast(T, value)

    def integer(self, name: str, default: int | None = None) -> int:
        """Reads a whole number from 1 to the limit of its name; 0 stands for a wrong one."""
        return self._get(name, default, _whole(LIMITS.get(name, DEFAULT_LIMIT)), 0)

    def number(self, name: str, default: float, kind: Kind = Positive) -> float:
        """Reads a number above 0, or of another `kind`."""
        return float(self._get(name, default, kind, default))

    def boolean(self, name: str, default: bool) -> bool:
        """Reads true or false."""
        return self._get(name, default, bool, default)

    def optional(self, name: str, absent: float | None, kind: Kind = Positive) -> float | None:
        """Reads a number above zero; None if the config has null, `absent` if it has no such attribute."""
        self._read.add(name)
        value = self._config.get(name, absent)
        return None if value is None else self._get(name, value, kind, None)

    def window(self, name: str, absent: int | None) -> int | None:
        """Reads a whole number above zero, as `optional` does."""
        value = self.optional(name, absent, _whole(DEFAULT_LIMIT))
        return None if value is None else int(value)

    def activation(self, name: str, default: str) -> str:
        """Reads an activation, and returns our name of it."""
        value = self._get(name, default, str, default)
        if value not in ACTIVATIONS:
            self.refuse(f"{name}={shorten(value)} is not supported: known are {sorted(ACTIVATIONS)}")
        return ACTIVATIONS.get(value, "silu")

    def by_layer[T](self, name: str, layers: int, default: Sequence[T], accepted: Sequence[T]) -> list[T]:
        """Reads a list with one of `accepted` per layer."""
        value = self._get(name, list(default), list[object], [])
        if value and (len(value) < layers or any(item not in accepted for item in value)):
            self.refuse(f"{name}: found {shorten(value)}, expected {layers} of {list(accepted)}")
            return list(default)
        return list(value)[:layers] if value else list(default)

    def numbers(self, name: str, kind: Kind) -> list[float]:
        """Reads a list of numbers of type `kind`; none is an empty list."""
        return self._get(name, [], list[kind], [])

    def mapping(self, name: str, kind: Kind) -> JsonObject | None:
        """Reads an object of type `kind`, or None."""
        return self._get(name, {}, kind, None) or None

    def require_only(self, values: Mapping[str, object]) -> None:
        """Reports each attribute whose value differs from the one given here."""
        for name, only in values.items():
            self._read.add(name)
            value = self._config.get(name)
            if value is not None and value != only:
                self.refuse(f"{name}={shorten(value)} is not supported (only {only!r})")

    def ignore(self, names: Iterable[str]) -> None:
        """Marks these as read, whatever their values."""
        self._read.update(names)

    def refuse(self, problem: str) -> None:
        """Adds a problem, which `finish` raises."""
        self._problems.append(problem)

    def finish(self) -> None:
        """Raises ValueError if there are problems, or attributes that were not read."""
        unread = {k: v for k, v in self._config.items() if k not in self._read and v not in (None, False, {}, [])}
        unknown = [
            f"{shorten_key(k)}={shorten(v)} is not known to this model family" for k, v in sorted(unread.items())
        ]
        if problems := [*dict.fromkeys(self._problems + unknown)]:
            lines = "\n  ".join(problems)
            raise ValueError(f"{self._name}: describes a model that is not supported. Use another model:\n  {lines}")


# Names of the number of experts in configs of mixtures.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# transformers' default of it, by model_type.
DEFAULT_COUNTS = {
    **{"mixtral": 8, "qwen2_moe": 60, "qwen3_moe": 128, "olmoe": 64, "glm4_moe": 128, "gpt_oss": 128},
    **{"qwen3_vl_moe_text": 60, "glm4v_moe_text": 128},
}


def expert_count(config: Mapping[str, object]) -> int:
    """Returns the number of experts per layer; 0 for a dense model, or a number that `model_config` refuses."""
    stated = (config.get(name) for name in COUNTS)
    default = DEFAULT_COUNTS.get(str(config.get("model_type")), 0)
    count = next((each for each in stated if each is not None), default)
    return count if isinstance(count, int) and 0 < count <= MAX_EXPERTS else 0


def experts_from_hf(
    attributes: Attributes, layers: tuple[int, ...], count: int, per_token: int, **features: Any
) -> ExpertsConfig | None:
    """Returns the experts of the sparse layers, or None without sparse layers.

    Args:
      per_token: default of `num_experts_per_tok`.
      features: further fields of Experts.
    """
    experts = ExpertsConfig(
        count=count, per_token=attributes.integer("num_experts_per_tok", per_token), layers=layers, **features
    )
    if experts.per_token > count:
        attributes.refuse(f"num_experts_per_tok: found {experts.per_token}, expected at most {count}, the experts")
    groups, best = experts.groups, experts.groups_per_token
    if not groups or experts.count % groups or (groups > 1 and experts.count // groups < BEST_OF_GROUP):
        attributes.refuse(
            f"n_group: found {groups}, expected a number that divides {experts.count} experts into groups of at least "
            f"{BEST_OF_GROUP}"
        )
    elif best > groups or best * (experts.count // groups) < experts.per_token:
        attributes.refuse(
            f"topk_group: found {best} of {groups} groups, expected enough for {experts.per_token} experts"
        )
    return experts if layers else None


def sparse_layers(attributes: Attributes) -> tuple[int, ...]:
    """Returns the sparse layers of Qwen models: every `decoder_sparse_step`-th, except `mlp_only_layers`."""
    layers, step = attributes.integer("num_hidden_layers"), attributes.integer("decoder_sparse_step", 1) or 1
    dense = set(attributes.numbers("mlp_only_layers", NotNegative))
    return tuple(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)
