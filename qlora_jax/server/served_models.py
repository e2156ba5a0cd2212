"""The models that a server answers for: a base, and the runs on it."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.reply_format import ReplyFormat, reply_format
from qlora_jax.server.errors import ApiError
from qlora_jax.untrusted_json import shorten

type Embeddings = Callable[[], Float64[np.ndarray, "texts width"]]  # the embeddings of a few texts, of length 1
type Embed = Callable[[Sequence[str]], tuple[list[Embeddings], int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model by its name in requests.

    Attributes:
      adapter: its name in the engine; None for the base.
      tokenizer: with the model's chat template and its variables.
      form: how its replies write calls and reasoning; None without a chat template.
      stop_ids: ids that end a text; `turn_end_ids` are those that end a turn of a chat.
      positions: largest number of tokens of a prompt and its reply, for which the cache has room, too.
      root: the path that it was loaded from.
      parent: name of its base; None for the base.
      embed: encodes texts: (functions that compute the embeddings of a few texts each, in order; the number of tokens).
        None for a model that writes text.
      status: returns the state of the run, which the page shows next to a chat; None for a model without a run.
    """

    name: str
    adapter: str | None
    tokenizer: Tokenizer
    form: ReplyFormat | None
    stop_ids: frozenset[int]
    turn_end_ids: frozenset[int]
    positions: int
    root: str
    parent: str | None = None
    embed: Embed | None = None
    status: Callable[[], Mapping[str, object]] | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def described(self) -> dict[str, object]:
        """Returns the model's entry in /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "qlora_jax",
            "root": self.root,
            "parent": self.parent,
            "max_model_len": self.positions,
        }


def chat_format(tokenizer: Tokenizer) -> ReplyFormat | None:
    """Returns how a model's replies are written; None without a chat template."""
    return None if tokenizer.chat_template is None else reply_format(tokenizer)


class ServedModels:
    """Models by their names."""

    def __init__(self, models: Sequence[ServedModel]):
        self._models = {model.name: model for model in models}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter([*self._models.values()])

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def add(self, model: ServedModel) -> None:
        """Adds a model with a new name."""
        self._models[model.name] = model

    def remove(self, name: str) -> ServedModel:
        """Removes a model and returns it; raises ApiError for a name that is not served."""
        model = self.get(name)
        del self._models[name]
        return model

    def get(self, name: str) -> ServedModel:
        """Returns a model; raises ApiError for a name that is not served."""
        if name not in self._models:
            known = ", ".join(self._models)
            message = f"model: {shorten(name)} is not served (expected one of {known}). Use one of these names"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._models[name]

    def writing(self, name: str, *, chat: bool) -> ServedModel:
        """Returns a model that writes text, for a chat or not; raises ApiError for another."""
        model = self.get(name)
        if model.embed is not None:
            raise ApiError(
                400, f"model: {name} gives embeddings, and writes no text. Use /v1/embeddings", param="model"
            )
        if chat and model.form is None:
            message = f"model: {name} has no chat template. Use /v1/completions, or serve it with --chat_template"
            raise ApiError(400, message, param="model")
        return model
