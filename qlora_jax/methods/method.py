"""The protocol of finetuning methods, and what they attach themselves to.

A method is a file of this folder, or of another package. It has a module that it puts into a model, such as a
`LinearAdapter`, and one instance of a `Method`, which its declaration (config/methods.py) names.
"""

import abc
import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import ClassVar, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qlora_jax.config import LoraArgs
from qlora_jax.config.methods import METHODS, method_with_peft_type
from qlora_jax.config.parse import from_dict
from qlora_jax.config.registry import load_implementation
from qlora_jax.methods.adapter_cost import AdapterShape, StepSizes, Work
from qlora_jax.methods.peft_form import NO_ARRAYS, PeftForm
from qlora_jax.methods.targets import target_layers
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import Lora
from qlora_jax.nn.linear import QLinear
from qlora_jax.nn.norm import LayerNorm, RMSNorm

FINAL_NORM = "model.norm"

Factors = Mapping[str, Mapping[str, jax.Array | np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """Values that the start of a run gives a method.

    Attributes:
      key: draws initial values; those of a module depend on it and on the module's name alone.
      initial: initial values in place of drawn ones (`lora.init`), in the form of `ModelParts.lora`.
      frozen: arrays of the base that the method does not train, by name; empty: those of `Method.frozen_arrays`.
      mesh: devices that the weights are cut over; None: the default device.
    """

    key: jax.Array
    initial: Factors | None = None
    frozen: Mapping[str, np.ndarray] = NO_ARRAYS
    mesh: Mesh | None = None


class Correction(NamedTuple):
    """A change of the gradients before each update.

    Fields:
      compute: returns arrays by module, from the leaves that do not train; called once.
      apply: returns the gradients of the trained leaves, corrected by these arrays.
    """

    compute: Callable[[Lora], dict[str, jax.Array]]
    apply: Callable[[Lora, dict[str, jax.Array]], Lora]


class Method(abc.ABC):
    """A finetuning method; one instance, without state.

    Attributes:
      peft: how PEFT stores it; None: PEFT has no such method, for a reason in its declaration's `refused_exports`.
      merged_products: with `lora.merge_into`, the products of all rows with each of A and B that their gradients take;
        0: A and B get theirs from the gradient of the weight; None: it has other arrays.
    """

    peft: ClassVar[PeftForm | None] = None
    merged_products: ClassVar[int | None] = None

    def targets(self, config: ModelConfig, spec: LoraArgs) -> Collection[str]:
        """Returns what trains, by Hugging Face's names without the layer's index; empty: the same in every model.

        Raises:
          ValueError: the settings name something that the model does not have, or cannot adapt.
        """
        return ()

    @abc.abstractmethod
    def attach(self, model: CausalLM, spec: LoraArgs, given: Given) -> None:
        """Adds adapters in place, or makes weights trainable; the model's outputs stay as they are.

        Raises:
          ValueError: as `targets`, or the model cannot train by this method.
        """

    @abc.abstractmethod
    def shape(self, config: ModelConfig, spec: LoraArgs) -> AdapterShape:
        """Returns where the adapters are, and what they read."""

    def work(self, sizes: StepSizes) -> tuple[Work, ...]:
        """Returns the FLOP that the adapters add to a micro-batch, beside those that follow from `shape`."""
        return ()

    def saved(self, sizes: StepSizes) -> dict[str, int]:
        """Returns the bytes that a step saves for the adapters' backward pass, by the names of `checkpoint_name`."""
        return {}

    def correction(self, config: ModelConfig, spec: LoraArgs) -> Correction | None:
        """Returns how gradients are corrected; None: not at all."""
        return None

    def frozen_arrays(self, config: ModelConfig, spec: LoraArgs) -> dict[str, np.ndarray]:
        """Returns arrays that the method adds to the base, which follow from the settings; files may have others."""
        return {}


def form_of(peft_type: str) -> PeftForm | None:
    """Returns the form of a `peft_type`; None if no method has it."""
    name = method_with_peft_type(peft_type)
    return None if name is None else method_of(name).peft


def method_of(name: str) -> Method:
    """Returns the method of a name in METHODS, whose module it imports.

    Raises:
      ValueError: the module cannot be imported, or does not have the method.
    """
    return _imported(name, METHODS[name].implementation)


@functools.cache
def _imported(name: str, place: str) -> Method:
    found = load_implementation("lora.method", name, place)
    if not isinstance(found, Method):
        raise ValueError(
            f"lora.method: {name!r} is declared as {place}, which is not a method (found {type(found).__name__}, "
            "expected an instance of qlora_jax.methods.method.Method). Repair or uninstall its package"
        )
    return found


def options_of[Options](spec: LoraArgs, kind: type[Options]) -> Options:
    """Returns `lora.options` as the dataclass that the method's declaration names."""
    return from_dict(kind, spec.options)


def our_names(config: ModelConfig) -> dict[str, str]:
    """Returns {Hugging Face name: our name} of each projection; ours are like `model.layers.self_attn.q_proj`."""
    names = (f"model.layers.{name}" for name in config.linear_shapes())
    return {config.hugging_face_name(name): name for name in names}


def target_shapes(config: ModelConfig, spec: LoraArgs) -> dict[str, tuple[int, int]]:
    """Returns {Hugging Face name: (N, K)} of each targeted projection."""
    shapes = {config.hugging_face_name(f"model.layers.{n}"): shape for n, (shape, _) in config.linear_shapes().items()}
    return {name: shapes[name] for name in target_layers(config, spec)}


def linears(model: CausalLM) -> Iterator[tuple[str, QLinear]]:
    """Yields (Hugging Face name without the layer's index, projection) of each projection."""
    for name in model.config.linear_shapes():
        linear: QLinear = operator.attrgetter(name)(model.model.layers)
        yield linear.name, linear


def norms(model: CausalLM) -> Iterator[tuple[str, RMSNorm | LayerNorm]]:
    """Yields (Hugging Face name without the layer's index, norm) of each norm."""
    for name in model.config.norm_widths():
        norm: RMSNorm | LayerNorm = operator.attrgetter(name)(model.model.layers)
        yield model.config.hugging_face_name(f"model.layers.{name}"), norm
    yield model.config.hugging_face_name(FINAL_NORM), model.model.norm


def norm_widths(config: ModelConfig) -> dict[str, int]:
    """Returns {Hugging Face name without the layer's index: width} of each norm, as `norms` yields them."""
    widths = {f"model.layers.{name}": width for name, width in config.norm_widths().items()}
    return {config.hugging_face_name(name): width for name, width in (widths | {FINAL_NORM: config.embed_dim}).items()}
