"""Reading a Hugging Face config so that nothing in it is overlooked."""

from collections.abc import Iterable, Mapping
from typing import Any

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
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "problem_type",
        "is_llama_config",
    ]
)


class Attributes:
    """A config's attributes, each marked as read, with every problem collected and raised by `finish`."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self._read = set(HARMLESS)
        self._problems: list[str] = []

    def _get(self, name: str, default: Any, accepted: type | tuple[type, ...], expected: str) -> Any:
        self._read.add(name)
        value = self._config.get(name)
        if value is None:
            value = default
        if value is None:
            self.refuse(f"{name} is missing: {expected} is needed")
            return 0
        if not isinstance(value, accepted) or (isinstance(value, bool) and accepted is not bool):
            self.refuse(f"{name}={value!r}: {expected} is needed")
            return 0
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._get(name, default, int, "a whole number of at least 1")
        if value < 1 and not self._problems:
            self.refuse(f"{name}={value}: a whole number of at least 1 is needed")
        return value

    def number(self, name: str, default: float) -> float:
        """A number."""
        return float(self._get(name, default, (int, float), "a number"))

    def boolean(self, name: str, default: bool) -> bool:
        """true or false."""
        return bool(self._get(name, default, bool, "true or false"))

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        """An object, or None."""
        self._read.add(name)
        value = self._config.get(name)
        if value is not None and not isinstance(value, Mapping):
            self.refuse(f"{name}={value!r}: an object is needed")
            return None
        return value

    def require_only(self, values: Mapping[str, Any]) -> None:
        """Refuses each attribute that is given with another value than here."""
        for name, only in values.items():
            self._read.add(name)
            value = self._config.get(name)
            if value is not None and value != only:
                self.refuse(f"{name}={value!r} is not supported (only {only!r})")

    def ignore(self, names: Iterable[str]) -> None:
        """Takes these as read, whatever they say."""
        self._read.update(names)

    def refuse(self, problem: str) -> None:
        """Notes a problem."""
        self._problems.append(problem)

    def finish(self) -> None:
        """Raises ValueError if any problem was noted, or any attribute was given that nobody read."""
        unread = {k: v for k, v in self._config.items() if k not in self._read and v not in (None, False, {}, [])}
        problems = self._problems + [f"{k}={v!r} is not known to this model family" for k, v in sorted(unread.items())]
        if problems:
            raise ValueError("config of the model:\n  " + "\n  ".join(problems))
