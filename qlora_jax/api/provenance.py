"""Records where a loaded model comes from, so that training and export can identify its base."""

import dataclasses
from collections.abc import Mapping

from flax import nnx

from qlora_jax.config import LoraArgs
from qlora_jax.config.fields import TemplateValue
from qlora_jax.io.initial_file import InitialAdapter
from qlora_jax.io.pretrained import OpenedModel
from qlora_jax.io.run_folder.checkpoint import Run
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.objectives.head_objective import TrainedHead

_ATTRIBUTE = "provenance"


# Compared by identity: flax hashes static attributes of modules, and some of these fields have no hash.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Provenance:
    """The files, weight format and adapter of a loaded model.

    Fields:
      opened: the base's files, tokenizer and weight format, and the run or PEFT adapter that was loaded with it.
      chat_template: path of the jinja file that replaced the model's template.
      chat_template_kwargs: variables for the template.
      fingerprint: of the base, as a run's checkpoint stores it.
      lora_args: settings of the adapter; None for a base.
      initial: the initial adapter, if it is a part of the weights (PiSSA, LoftQ).
      head: the sequence head that was trained, if any.
      rounded: see `Run.rounded`.
    """

    opened: OpenedModel
    chat_template: str | None
    fingerprint: str
    chat_template_kwargs: Mapping[str, TemplateValue] = dataclasses.field(default_factory=dict)
    lora_args: LoraArgs | None = None
    initial: InitialAdapter | None = None
    head: TrainedHead | None = None
    rounded: bool = True

    def as_run(self, parts: ModelParts) -> Run:
        """The model's adapter as a run, for the exporters.

        Raises:
          ValueError: the model has no adapter.
        """
        if self.lora_args is None:
            raise ValueError("model: has no adapter. Add one with qlora_jax.add_adapter and train it")
        loaded = self.opened.run
        return Run(
            path=self.opened.source.path,
            model=self.opened.args,
            lora_args=self.lora_args,
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
            step=None,
            lora=parts.lora,
            fingerprint=self.fingerprint,
            new_ids=self.opened.tokenizer.new_ids,
            initial=self.initial,
            tables={} if loaded is None else loaded.tables,
            frozen={} if loaded is None else loaded.frozen,
            head=self.head,
            rounded=self.rounded,
        )


def attach(model: CausalLM, provenance: Provenance) -> CausalLM:
    """Returns the model with the record as an attribute, which `nnx.split` and `nnx.merge` preserve."""
    setattr(model, _ATTRIBUTE, provenance)
    return model


def provenance_of(model: nnx.Module) -> Provenance:
    """The record of a model that `load` returned.

    Raises:
      ValueError: the model was made in another way.
    """
    found = getattr(model, _ATTRIBUTE, None)
    if not isinstance(found, Provenance):
        raise ValueError(
            f"model: was not loaded by qlora_jax.load (found {type(model).__name__}), so its base is unknown. Load it "
            "with qlora_jax.load; for a model of your own, use qlora_jax.quantize_model and your own training loop"
        )
    return found


def head_of_model(model: nnx.Module) -> TrainedHead | None:
    """The sequence head that trained with the model, if any; None for a model made in another way."""
    found = getattr(model, _ATTRIBUTE, None)
    return found.head if isinstance(found, Provenance) else None


def parts_of(model: nnx.Module) -> ModelParts:
    """The parts of the model without its record, which share the model's arrays.

    Models with the same structure then share compiled programs.
    """
    copy = combine(partition(model))
    if hasattr(copy, _ATTRIBUTE):
        delattr(copy, _ATTRIBUTE)
    return partition(copy)
