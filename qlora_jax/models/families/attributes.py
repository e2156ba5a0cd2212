"""Reads a Hugging Face config so that no attribute is overlooked."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
        "pad_token_id",
        "quantization_config",
        "resid_pdrop",
        "return_dict",
        "rope_interleaved",
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
    ]
)


class Attributes:
    """A config's attributes. It records which ones were read, and `finish` raises all problems at once."""

    def __init__(self, config: Mapping[str, object]):
        self._config = config
        self._read = set(HARMLESS)
        self._problems: list[str] = []

    def _get(self, name: str, default: Any, accepted: type | tuple[type, ...], expected: str) -> Any:
        self._read.add(name)
        value = self._config.get(name)
        if value is None:
            value = default
        if value is None:
            self.refuse(f"{name}: missing, expected {expected}")
            return 0
        if not isinstance(value, accepted) or (isinstance(value, bool) and accepted is not bool):
            self.refuse(f"{name}: found {value!r}, expected {expected}")
            return 0
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """Reads a whole number of at least 1."""
        value = self._get(name, default, int, "a whole number of at least 1")
        if value < 1 and not self._problems:
            self.refuse(f"{name}: found {value}, expected a whole number of at least 1")
        return value

    def number(self, name: str, default: float) -> float:
        """Reads a number."""
        return float(self._get(name, default, (int, float), "a number"))

    def boolean(self, name: str, default: bool) -> bool:
        """Reads true or false."""
        return bool(self._get(name, default, bool, "true or false"))

    def optional(self, name: str, absent: float | None) -> float | None:
        """Reads a number above zero; None if the config has null, `absent` if it has no such attribute."""
        self._read.add(name)
        value = self._config.get(name, absent)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            self.refuse(f"{name}: found {value!r}, expected a number above zero or null")
            return None
        return value

    def window(self, name: str, absent: int | None) -> int | None:
        """Reads a whole number above zero, as `optional` does."""
        value = self.optional(name, absent)
        if isinstance(value, float):
            self.refuse(f"{name}: found {value!r}, expected a whole number or null")
            return None
        return value

    def activation(self, name: str, default: str) -> str:
        """Reads an activation, and returns our name of it."""
        value = self._get(name, default, str, "the name of an activation")
        if value not in ACTIVATIONS:
            self.refuse(f"{name}={value!r} is not supported: known are {sorted(ACTIVATIONS)}")
        return ACTIVATIONS.get(value, "silu")

    def by_layer(self, name: str, layers: int, default: Sequence[Any], accepted: Sequence[Any]) -> list[Any]:
        """Reads a list with one of `accepted` per layer."""
        value = self._get(name, list(default), list, f"a list of {layers}")
        if value and (len(value) < layers or any(item not in accepted for item in value)):
            self.refuse(f"{name}: found {value!r}, expected {layers} of {list(accepted)}")
        return list(value)[:layers] if value else list(default)

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        """Reads an object, or None."""
        self._read.add(name)
        value = self._config.get(name)
        if value is not None and not isinstance(value, Mapping):
            self.refuse(f"{name}: found {value!r}, expected an object")
            return None
        return value

    def require_only(self, values: Mapping[str, object]) -> None:
        """Reports each attribute whose value differs from the one given here."""
        for name, only in values.items():
            self._read.add(name)
            value = self._config.get(name)
            if value is not None and value != only:
                self.refuse(f"{name}={value!r} is not supported (only {only!r})")

    def ignore(self, names: Iterable[str]) -> None:
        """Marks these as read, whatever their values."""
        self._read.update(names)

    def refuse(self, problem: str) -> None:
        """Adds a problem, which `finish` raises."""
        self._problems.append(problem)

    def finish(self) -> None:
        """Raises ValueError if there are problems, or attributes that were not read."""
        unread = {k: v for k, v in self._config.items() if k not in self._read and v not in (None, False, {}, [])}
        problems = self._problems + [f"{k}={v!r} is not known to this model family" for k, v in sorted(unread.items())]
        if problems:
            raise ValueError("config of the model:\n  " + "\n  ".join(problems))
