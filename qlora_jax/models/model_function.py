"""Jitted functions of a model outside of training steps, which fetch experts ahead if they are in host memory."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate

import jax

from pallas_kernels.devices import target_device
from qlora_jax.models.offloaded_experts import has_experts_on_host
from qlora_jax.models.partition import ModelParts
from qlora_jax.models.prefetched_layers import COPIES_AT_ONCE

type Models = ModelParts | tuple[ModelParts, ...]


class ModelFunction[**Inputs, Result]:
    """A function that is jitted twice, because JAX compiles one jitted function with the same options for all inputs.

    Attributes:
      plain: for models on the device.
      prefetching: for models with experts in host memory, on a GPU.
    """

    def __init__(self, function: Callable[Concatenate[Any, Inputs], Result], **settings: Any):
        """Jits a function whose first argument is a model, or a tuple of models.

        Args:
          settings: further arguments of `jax.jit`.
        """
        functools.update_wrapper(self, function)
        self.plain = jax.jit(function, **settings)
        self.prefetching = jax.jit(function, compiler_options=COPIES_AT_ONCE, **settings)

    def __call__(self, model: Models, *args: Inputs.args, **kwargs: Inputs.kwargs) -> Result:
        """Calls the function."""
        return self.jitted(model)(model, *args, **kwargs)

    def trace(self, model: Models, *args: object, **kwargs: object) -> jax.stages.Traced:
        """Traces the function, as a jitted function does."""
        return self.jitted(model).trace(model, *args, **kwargs)

    def lower(self, model: Models, *args: object, **kwargs: object) -> jax.stages.Lowered:
        """Lowers the function, as a jitted function does."""
        return self.jitted(model).lower(model, *args, **kwargs)

    def jitted(self, model: Models) -> jax.stages.Wrapped:
        """Returns the jitted function for a model. A loop that calls it for each token asks once."""
        models = model if isinstance(model, tuple) else (model,)
        prefetches = target_device().platform == "gpu" and any(map(has_experts_on_host, models))
        return self.prefetching if prefetches else self.plain
